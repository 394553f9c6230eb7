"""Shards: the same bytes for every number of workers, readable by others, resumed after a kill, never mixed."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.cli import main
from data_prep.plan import Settings, make_plan
from data_prep.sources import Item
from data_prep.writer import ShardFile, member
from moe_cl.config import ConfigError
from moe_cl.data.index import resolve, scan
from tests.data_prep.images import encoded, image_folder, tree


def shard(*args):
    return main(["shard", *map(str, args)])


def command(*args):
    return subprocess.run([sys.executable, "-m", "data_prep", "shard", *map(str, args)], capture_output=True, text=True)


@given(names=st.lists(st.from_regex(r"[a-z0-9]{1,80}\.jpg", fullmatch=True), unique=True, max_size=5), data=st.data())
@settings(max_examples=40, deadline=None)
def test_members_are_what_tarfile_reads(names, data):
    contents = [data.draw(st.binary(max_size=1500)) for _ in names]
    raw = b"".join(part for n, c in zip(names, contents, strict=True) for part in member(n, c)) + bytes(1024)
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        assert [(m.name, tar.extractfile(m).read(), m.uid, m.mode) for m in tar] == [
            (n, c, 0, 0o444) for n, c in zip(names, contents, strict=True)
        ]


def test_the_writer_refuses_what_a_ustar_header_cannot_hold():
    with pytest.raises(ValueError, match="too long a name"):
        member("x" * 101, b"")


@given(
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=60),
    count=st.integers(1, 12), size=st.integers(1, 20_000), seed=st.none() | st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_a_plan_has_every_item_once_within_the_limits(sizes, count, size, seed):
    items = [Item(str(i), 0, s, None) for i, s in enumerate(sizes)]
    plan = make_plan(items, Settings("n", "train", count, size, seed))
    shards = [[plan.item(slot) for slot in plan.slots(s)] for s in range(plan.shards)]
    assert sorted(i.name for s in shards for i in s) == sorted(i.name for i in items)
    assert all(0 < len(s) <= count and (len(s) == 1 or sum(i.size for i in s) <= size) for s in shards)
    if seed is None:
        assert [i for s in shards for i in s] == items


def test_the_shuffle_is_fixed_by_its_seed():
    items = [Item(str(i), 0, 1, None) for i in range(100)]
    orders = [make_plan(items, Settings("n", "train", shuffle_seed=s)).order.tolist() for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and orders[0] != sorted(orders[0])
    assert orders[0][:5] == [66, 0, 54, 43, 69]  # written down: another order would make old and new shards differ


@pytest.mark.processes
def test_same_bytes_for_every_number_of_workers(tmp_path):
    source = image_folder(tmp_path / "images", classes=3, each=9)
    (source / "n00" / "broken.jpg").write_bytes(b"no picture")
    trees = []
    for workers in (1, 2, 3):  # the command forks its workers, in a process of one thread
        done = command(source, "--out", tmp_path / f"w{workers}", "--max-count", 5, "--workers", workers)
        assert done.returncode == 0, done.stderr
        assert "left out: n00/broken.jpg" in done.stderr
        trees.append(tree(tmp_path / f"w{workers}"))
    assert trees[0] == trees[1] == trees[2] and len(trees[0]) == 2 * 6 + 3
    # here torch is imported, so its workers are spawned: still the same
    assert shard(source, "--out", tmp_path / "spawned", "--max-count", 5, "--workers", 2) == 0
    assert tree(tmp_path / "spawned") == trees[0]


def test_what_is_written(tmp_path):
    source = image_folder(tmp_path / "images", classes=2, each=4)
    (source / "n00" / "wrong.JPEG").write_bytes(encoded(77, "PNG"))
    (source / "n01" / "old.bmp").write_bytes(encoded(78, "BMP"))
    assert shard(source, "--out", tmp_path / "out", "--name", "set", "--max-count", 4, "--workers", 1) == 0
    out = tmp_path / "out"
    assert not list(out.glob("*.part")) and not list(out.glob("*.plan"))
    about = json.loads((out / "dataset.json").read_text())["splits"]["train"]
    assert (
        about["samples"] == 10 and about["class_names"] == ["n00", "n01"] and about["class_counts"] == {"0": 5, "1": 5}
    )
    assert about["shuffled"] is True and about["settings"]["shuffle_seed"] == 0 and len(about["shards"]) == 3
    dataset = resolve(str(out))
    found = {}
    for number, entry in enumerate(dataset.shards):
        data = (out / entry.name).read_bytes()
        index, now = dataset.index(number), scan(entry.url)
        assert hashlib.sha256(data).hexdigest() == entry.sha256 == index.sha256 and len(data) == entry.bytes
        for column in ("keys", "names", "ext"):
            assert getattr(index, column) == getattr(now, column)
        for column in ("offset", "size", "label", "width", "height"):
            assert np.array_equal(getattr(index, column), getattr(now, column)), column
        for row, name in enumerate(index.names):
            found[name] = (index.ext[row], data[index.offset[row] :][: index.size[row]], int(index.label[row]))
    assert set(found) == {str(p.relative_to(source)) for p in source.rglob("*.*")}
    kept = {n: f for n, f in found.items() if not n.endswith("bmp")}
    assert all((source / n).read_bytes() == data for n, (_, data, _) in kept.items())
    assert found["n00/wrong.JPEG"][0] == "png" and found["n00/wrong.JPEG"][2] == 0
    ext, data, label = found["n01/old.bmp"]
    original = np.asarray(Image.open(source / "n01" / "old.bmp"))
    assert (ext, label) == ("png", 1) and np.array_equal(np.asarray(Image.open(io.BytesIO(data))), original)


def test_other_loaders_read_our_shards(tmp_path):
    """webdataset, timm and open_clip's count file, against our own index."""
    import webdataset
    from timm.data.readers.reader_factory import create_reader

    source = image_folder(tmp_path / "images", classes=2, each=4)
    out = tmp_path / "out"
    assert shard(source, "--out", out, "--max-count", 3, "--workers", 1) == 0
    dataset = resolve(str(out))
    ours = {}
    for number, entry in enumerate(dataset.shards):
        index, data = dataset.index(number), (out / entry.name).read_bytes()
        for row, key in enumerate(index.keys):
            ours[key] = (data[index.offset[row] :][: index.size[row]], int(index.label[row]), index.names[row])
    theirs = {}
    for sample in webdataset.WebDataset([s.url for s in dataset.shards], shardshuffle=False):
        about = json.loads(sample["json"])
        assert about["label"] == int(sample["cls"]) and (about["width"], about["height"]) == (32, 24)
        theirs[sample["__key__"]] = (sample["jpg"], int(sample["cls"]), about["name"])
    assert theirs == ours
    reader = create_reader("wds/", root=str(out), split="train", is_training=False, batch_size=1)
    assert len(reader) == len(ours)
    pairs = sorted((image.tobytes(), target) for image, target in reader)
    assert pairs == sorted((Image.open(io.BytesIO(b)).convert("RGB").tobytes(), label) for b, label, _ in ours.values())
    assert json.loads((out / "sizes.json").read_text()) == {s.name: s.samples for s in dataset.shards}


def test_two_splits_share_a_folder(tmp_path):
    source = image_folder(tmp_path / "images" / "train")
    image_folder(tmp_path / "images" / "val", each=2)
    for split in ("val", "train"):
        assert shard(tmp_path / "images", "--out", tmp_path / "out", "--split", split, "--workers", 1) == 0
    assert len(resolve(f"{tmp_path}/out/train")) == len(list(source.rglob("*.JPEG"))) == 15
    assert len(resolve(f"{tmp_path}/out/val")) == 6
    assert list(json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]) == ["train", "val"]


def test_splits_of_a_folder_number_their_classes_alike(tmp_path, capsys):
    image_folder(tmp_path / "images" / "train", classes=3)
    image_folder(tmp_path / "images" / "val", classes=2)
    args = [tmp_path / "images", "--out", tmp_path / "out", "--workers", 1]
    assert shard(*args) == 0 and shard(*args, "--split", "val") == 2
    assert "n02 is in one of them only" in capsys.readouterr().err
    (tmp_path / "images" / "val" / "n02").mkdir()
    assert shard(*args, "--split", "val") == 0
    assert resolve(f"{tmp_path}/out/val").class_names == resolve(f"{tmp_path}/out/train").class_names


def test_keep_order_says_so(tmp_path):
    source = image_folder(tmp_path / "images")
    assert shard(source, "--out", tmp_path / "out", "--keep-order", "--workers", 1) == 0
    dataset = resolve(str(tmp_path / "out"))
    assert dataset.sources[0].shuffled is False and dataset.index(0).names == sorted(dataset.index(0).names)


def test_dry_run_writes_nothing(tmp_path, capsys):
    source = image_folder(tmp_path / "images")
    assert shard(source, "--out", tmp_path / "out", "--dry-run", "--max-count", 4) == 0
    assert not (tmp_path / "out").exists() and "15" in capsys.readouterr().out


def test_a_second_run_writes_nothing_and_another_plan_is_refused(tmp_path, capsys):
    source = image_folder(tmp_path / "images")
    out = tmp_path / "out"
    assert shard(source, "--out", out, "--max-count", 4, "--workers", 1) == 0
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert shard(source, "--out", out, "--max-count", 4, "--workers", 1) == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("*.tar")} == before
    assert shard(source, "--out", out, "--max-count", 9, "--workers", 1) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in out.glob("*.tar")} == before and not list(out.glob("*.plan"))
    assert shard(source, "--out", out, "--max-count", 9, "--workers", 1, "--overwrite") == 0
    assert len(resolve(str(out)).shards) == len(list(out.glob("*.tar"))) == 2


def test_a_damaged_shard_is_written_again(tmp_path):
    source = image_folder(tmp_path / "images")
    out = tmp_path / "out"
    assert shard(source, "--out", out, "--max-count", 5, "--workers", 1) == 0
    before = tree(out)
    victim = sorted(out.glob("*.tar"))[1]
    victim.write_bytes(victim.read_bytes()[:3000])
    assert shard(source, "--out", out, "--max-count", 5, "--workers", 1) == 0
    assert tree(out) == before


@pytest.mark.kills
def test_a_killed_run_continues(tmp_path):
    source = image_folder(tmp_path / "images", classes=4, each=150)
    args = [source, "--max-count", 25, "--resize-shorter", 16, "--workers", 2]
    assert command(*args, "--out", tmp_path / "whole").returncode == 0
    out = tmp_path / "out"
    run = subprocess.Popen([sys.executable, "-m", "data_prep", "shard", *map(str, args), "--out", str(out)],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    time.sleep(0.1)  # the kernel ends the workers with their parent
    done = {p.name: p.stat().st_ino for p in out.glob("*.tar")}
    assert 3 <= len(done) < 24 and not (out / "dataset.json").exists()
    with pytest.raises(ConfigError, match="not finished"):
        resolve(str(out))
    again = command(*args, "--out", out)
    assert again.returncode == 0 and f"{len(done)} of 24 shards are complete already" in again.stderr
    assert tree(out) == tree(tmp_path / "whole")
    assert {name: (out / name).stat().st_ino for name in done} == done


def test_one_run_at_a_time(tmp_path, capsys):
    import fcntl

    source = image_folder(tmp_path / "images")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "images-train.plan", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert shard(source, "--out", tmp_path / "out", "--workers", 1) == 2
    assert "another run is writing" in capsys.readouterr().err


def test_resize(tmp_path):
    source = tmp_path / "images" / "a"
    source.mkdir(parents=True)
    big = {"wide.jpg": encoded(1, height=300, width=450, quality=95), "tall.png": encoded(2, "PNG", "RGB", 500, 200),
           "gray.jpg": encoded(3, "JPEG", "L", height=333, width=400), "cmyk.jpg": encoded(4, "JPEG", "CMYK", 200, 260),
           "small.jpg": encoded(5, height=64, width=90)}  # fmt: skip
    for name, data in big.items():
        (source / name).write_bytes(data)
    out = tmp_path / "out"
    assert shard(source.parent, "--out", out, "--resize-shorter", 128, "--quality", 95, "--workers", 1) == 0
    index, data = resolve(str(out)).index(0), next(out.glob("*.tar")).read_bytes()
    for row, name in enumerate(index.names):
        short = name.rsplit("/", 1)[-1]
        new = Image.open(io.BytesIO(data[index.offset[row] :][: index.size[row]]))
        assert new.size == (index.width[row], index.height[row])
        if short == "small.jpg":
            assert data[index.offset[row] :][: index.size[row]] == big[short]
            continue
        assert min(new.size) == 128 and new.format == "JPEG" and new.mode == ("L" if short == "gray.jpg" else "RGB")
        old = Image.open(io.BytesIO(big[short])).convert(new.mode)
        assert abs(new.width / new.height - old.width / old.height) < 0.02
        wanted = np.asarray(old.resize(new.size, Image.Resampling.BOX), np.float32)
        assert np.abs(np.asarray(new, np.float32) - wanted).mean() < 3.0, short


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{tmp}/nowhere", "--out", "{tmp}/o"], "does not exist"),
        (["{tmp}/empty", "--out", "{tmp}/o"], "holds no image"),
        (["{tmp}/text.bin", "--out", "{tmp}/o"], "no source that is known"),
        (["{tmp}/images", "--out", "{tmp}/o", "--max-size", "0"], "must be positive"),
        (["{tmp}/images", "--out", "{tmp}/o", "--quality", "101"], "1 to 100"),
        (["{tmp}/images", "--out", "{tmp}/o", "--split", "a/b"], "--split"),
        (["{tmp}/images", "--out", "{tmp}/text.bin"], "text.bin"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, args, message):
    image_folder(tmp_path / "images")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.bin").write_bytes(b"x")
    assert main(["shard", *(a.format(tmp=tmp_path) for a in args)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and message in lines[0]


def test_bad_size_is_refused_by_the_parser(tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["shard", "x", "--out", "y", "--max-size", "lots"])
    assert caught.value.code == 2


def test_a_failing_shard_leaves_no_name(tmp_path):
    file = ShardFile(tmp_path / "x-000000.tar")
    file.add("0", "jpg", encoded(0), {"name": "n", "label": 0, "width": 1, "height": 1, "json": {}}, {})
    file.discard()
    assert os.listdir(tmp_path) == []
