"""Index files, scans of tars, and the data set that a pattern names."""

import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.config import ConfigError
from moe_cl.data.index import BrokenTar, Dataset, Shard, ShardIndex, TruncatedTar, load_index, resolve, save, scan
from tests.data_prep.images import encoded, shard_members, write_tar


def test_scan_finds_image_bytes_label_size_and_name(tmp_path):
    picture = encoded(1, height=20, width=30)
    members = [
        ("a/x.jpg", picture), ("a/x.cls", b"7"), ("a/x.json", b'{"name": "src/x.JPEG", "label": 3}'),
        ("a/y.png", encoded(2, "PNG")), ("a/y.json", b'{"label": 4}'), ("a/z.txt", b"no picture"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "s.tar", members)
    index = scan(str(path))
    assert index.keys == ["a/x", "a/y"] and index.ext == ["jpg", "png"] and index.names == ["src/x.JPEG", ""]
    assert index.label.tolist() == [7, 4] and (index.width[0], index.height[0]) == (30, 20)
    assert index.ignored == 1 and index.bytes == path.stat().st_size
    start = index.offset[0]
    assert path.read_bytes()[start : start + index.size[0]] == picture


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_reads_every_tar_format(tmp_path, style):
    long = "deep/" * 15 + "name" if style == tarfile.USTAR_FORMAT else "deep/" * 50 + "n" * 120
    path = write_tar(tmp_path / "s.tar", [(f"{long}.jpg", encoded(0)), (f"{long}.cls", b"1")], format=style)
    index = scan(str(path))
    assert index.keys == [long] and index.label.tolist() == [1] and index.width.tolist() == [32]


def test_scan_names_unsafe_and_empty_members(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("0.jpg", b""), ("../1.jpg", encoded(1)), ("2.jpg", encoded(2))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    index = scan(str(path))
    assert index.faults == {0: "zero_length_member", 1: "unsafe_member", 3: "unsafe_member"}
    assert index.size.tolist()[1] == 0 and index.size[2] > 0


def test_an_unreadable_image_stays_a_sample_without_a_size(tmp_path):
    index = scan(str(write_tar(tmp_path / "s.tar", [("0.jpg", b"not a picture"), ("0.cls", b"1")])))
    assert len(index) == 1 and index.width.tolist() == [0] and not index.faults


@settings(max_examples=60, deadline=None)
@given(fraction=st.floats(0, 1))
def test_a_cut_tar_is_never_taken_for_a_whole_one(tmp_path_factory, fraction):
    folder = tmp_path_factory.mktemp("cut")
    whole = write_tar(folder / "whole.tar", shard_members(4))
    data, full = whole.read_bytes(), scan(str(whole))
    end = max(int(full.offset[-1] + full.size[-1]), data.rstrip(b"\0").__len__())
    cut = folder / "cut.tar"
    cut.write_bytes(data[: int(fraction * end)])
    with pytest.raises(BrokenTar) as caught:
        scan(str(cut))
    if isinstance(caught.value, TruncatedTar):
        kept = caught.value.index
        assert kept.keys == full.keys[: len(kept)] and np.array_equal(kept.offset, full.offset[: len(kept)])
        assert all(o + s <= fraction * end for o, s in zip(kept.offset, kept.size, strict=True))


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"x" * 4096)
    with pytest.raises(BrokenTar, match="not a tar"):
        scan(str(tmp_path / "s.tar"))


def test_index_file_round_trip_and_refusal(tmp_path):
    path = write_tar(tmp_path / "s.tar", shard_members(3))
    index = scan(str(path))
    index.sha256, index.skipped, index.faults = "ab", [("name", "why")], {1: "zero_length_member"}
    save(index, path)
    again = load_index(str(path))
    assert again.to_json("s.tar") == index.to_json("s.tar")
    assert again.offset.dtype == np.int64 and again.faults == index.faults and again.skipped == index.skipped
    (tmp_path / "s.index.json").write_text('{"format": "other"}')
    with pytest.raises(ConfigError, match="not a shard index"):
        load_index(str(path))
    (tmp_path / "s.index.json").unlink()
    with pytest.raises(ConfigError, match="data_prep index"):
        load_index(str(path))


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_locate_is_the_inverse_of_counting(counts):
    dataset = Dataset([Shard(f"{i}.tar", n) for i, n in enumerate(counts)], [])
    expected = [(shard, row) for shard, n in enumerate(counts) for row in range(n)]
    assert [dataset.locate(i) for i in range(len(dataset))] == expected
    with pytest.raises(IndexError):
        dataset.locate(len(dataset))


def make_folder(folder, counts, splits=None):
    """Indexed shards; with ``splits`` (file name -> split) also a dataset.json."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for number, count in enumerate(counts):
        path = write_tar(folder / f"x-{number:02d}.tar", shard_members(count))
        index = scan(str(path))
        save(index, path)
        shard = {"file": path.name, "samples": count, "bytes": index.bytes, "sha256": ""}
        if splits:
            entry = entries.setdefault(splits[number], {"shards": [], "shuffled": True, "class_names": ["a", "b", "c"]})
            entry["shards"].append(shard)
    if splits:
        (folder / "dataset.json").write_text(json.dumps({"splits": entries}))
    return str(folder)


def test_resolve_patterns_folders_and_several_sources(tmp_path):
    one = make_folder(tmp_path / "one", [2, 3], {0: "train", 1: "train"})
    two = make_folder(tmp_path / "two", [1, 4], {0: "train", 1: "test"})
    bare = make_folder(tmp_path / "bare", [5])
    assert [s.samples for s in resolve(one).shards] == [2, 3]
    assert resolve(one).class_names == ("a", "b", "c") and resolve(one).sources[0].shuffled is True
    assert len(resolve(f"{two}/test")) == 4 and len(resolve(f"{one}/dataset.json")) == 5
    assert len(resolve(f"{one}/x-{{00..01}}.tar")) == 5 and len(resolve(f"{bare}/*.tar")) == 5
    assert resolve(bare).sources[0].shuffled is None
    both = resolve(f"{one}::{two}/train::{bare}")
    assert [(s.start, s.stop) for s in both.sources] == [(0, 2), (2, 3), (3, 4)]
    assert both.locate(5) == (2, 0) and both.index(3).keys[0] == "00000"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "empty"),
        ("{tmp}/nowhere", "does not exist"),
        ("{tmp}/empty", "neither dataset.json nor a .tar"),
        ("{tmp}/none-{{0..3}}.tar", "does not exist; check the shard pattern"),
        ("{tmp}/none-*.tar", "no file matches"),
        ("{tmp}/x-{{0..3.tar", "braces do not match"),
        ("{tmp}/two", "has the splits"),
        ("{tmp}/two/val", "no split 'val'"),
        ("{tmp}/unindexed.tar", "data_prep index"),
        ("{tmp}/unfinished", "not finished"),
        ("{tmp}/gone", "not in the folder"),
        ("{tmp}/broken", "not valid JSON"),
        ("{tmp}/shardless", "split 'train' does not list its shards"),
        ("{tmp}/shardless/train", "split 'train' does not list its shards"),
        ("{tmp}/hollow.tar", "has no bytes"),
        ("{tmp}/index/x-00.tar", "not a shard index"),
        ("{tmp}/parts", "write .*parts/train"),
    ],
)
def test_resolve_says_in_one_line_what_to_change(tmp_path, pattern, message):
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path / "two", [1, 1], {0: "train", 1: "test"})
    write_tar(tmp_path / "unindexed.tar", shard_members(1))
    make_folder(tmp_path / "unfinished", [1])
    (tmp_path / "unfinished" / "x-train.plan").touch()
    make_folder(tmp_path / "gone", [1], {0: "train"})
    (tmp_path / "gone" / "x-00.tar").unlink()
    (tmp_path / "broken").mkdir()
    (tmp_path / "shardless").mkdir()
    (tmp_path / "shardless" / "dataset.json").write_text('{"splits": {"train": {"samples": 3}}}')
    (tmp_path / "hollow.tar").touch()
    make_folder(tmp_path / "index", [1])
    (tmp_path / "index" / "x-00.index.json").write_text('["not", "an", "index"]')
    for split in ("test", "train"):
        make_folder(tmp_path / "parts" / split, [1], {0: split})
    (tmp_path / "broken" / "dataset.json").write_text("{")
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(pattern.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


def test_resolve_by_url(tmp_path):
    import fsspec

    make_folder(tmp_path / "d", [2, 3], {0: "train", 1: "train"})
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "d").iterdir():
        memory.pipe(f"/bucket/d/{path.name}", path.read_bytes())
    try:
        for pattern in ("memory://bucket/d", "memory://bucket/d/train", "memory://bucket/d/x-{00..01}.tar"):
            dataset = resolve(pattern)
            assert len(dataset) == 5 and len(dataset.index(1)) == 3
        assert scan("memory://bucket/d/x-01.tar").keys == dataset.index(1).keys
        with pytest.raises(ConfigError, match="no index"):
            resolve("memory://bucket/d/y-{00..01}.tar")
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_count_that_disagrees_with_the_index(tmp_path):
    folder = make_folder(tmp_path / "d", [2], {0: "train"})
    tree = json.loads((tmp_path / "d" / "dataset.json").read_text())
    tree["splits"]["train"]["shards"][0]["samples"] = 9
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="2 samples, but dataset.json says 9"):
        resolve(folder).index(0)


def test_an_empty_data_set_is_refused(tmp_path):
    make_folder(tmp_path / "d", [0], {0: "train"})
    with pytest.raises(ConfigError, match="without a single sample"):
        resolve(str(tmp_path / "d"))


def test_columns_of_rows():
    row = {"key": "k", "name": "n", "ext": "jpg", "offset": 512, "size": 3, "label": 2, "width": 4, "height": 5}
    index = ShardIndex.from_rows([row, row | {"fault": "unsafe_member"}], bytes=10)
    assert len(index) == 2 and index.faults == {1: "unsafe_member"} and index.width.dtype == np.int32
