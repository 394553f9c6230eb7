"""Indexes for shards that others made, with each of the count files that others leave."""

import json

import pytest
import webdataset

from data_prep.cli import main
from moe_cl.data.index import load_index, resolve, scan
from tests.data_prep.images import encoded, shard_members, write_tar


def foreign(folder, counts=(3, 2)):
    """Shards from webdataset's own writer."""
    folder.mkdir(exist_ok=True)
    for number, count in enumerate(counts):
        with webdataset.TarWriter(str(folder / f"f-{number:03d}.tar")) as writer:
            for i in range(count):
                writer.write({"__key__": f"{number}_{i}", "jpg": encoded(10 * number + i), "cls": i, "json": {"id": i}})
    return folder


def index(*args):
    return main(["index", *map(str, args), "--workers", "1"])


def test_a_folder_without_any_count_file(tmp_path, capsys):
    folder = foreign(tmp_path / "d")
    assert index(folder, "--hash") == 0
    dataset = resolve(str(folder))
    assert [s.samples for s in dataset.shards] == [3, 2] and dataset.sources[0].shuffled is None
    assert dataset.index(0).label.tolist() == [0, 1, 2] and len(dataset.shards[0].sha256) == 64
    assert "header not readable" in capsys.readouterr().out
    assert main(["lint", str(folder), "--report", str(tmp_path / "r.json"), "--workers", "1"]) == 0


def test_hashes_join_indexes_that_are_there(tmp_path):
    folder = foreign(tmp_path / "d")
    assert index(folder) == 0 and not resolve(str(folder)).shards[0].sha256
    assert index(folder, "--hash") == 0 and all(len(s.sha256) == 64 for s in resolve(str(folder)).shards)


def test_timm_info_gives_splits(tmp_path):
    folder = foreign(tmp_path / "d")
    splits = {
        name: {"name": name, "num_samples": count, "filenames": [file], "shard_lengths": [count]}
        for name, count, file in (("train", 3, "f-000.tar"), ("validation", 2, "f-001.tar"))
    }
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    assert index(folder) == 0
    assert len(resolve(f"{folder}/train")) == 3 and len(resolve(f"{folder}/validation")) == 2


@pytest.mark.parametrize("style", ["sizes", "wids"])
def test_other_count_files_name_the_shards(tmp_path, capsys, style):
    folder = foreign(tmp_path / "d")
    if style == "sizes":
        (folder / "sizes.json").write_text(json.dumps({"f-000.tar": 3, "f-001.tar": 7}))
    else:
        shards = [{"url": "f-000.tar", "nsamples": 3}, {"url": "f-001.tar", "nsamples": 7}]
        (folder / "desc.json").write_text(json.dumps({"wids_version": 1, "shardlist": shards}))
    assert index(folder, "--split", "val") == 0
    assert "2 samples in the tar, 7 in the file beside it" in capsys.readouterr().err
    assert len(resolve(f"{folder}/val")) == 5


def test_a_pattern_gets_indexes_only(tmp_path):
    folder = foreign(tmp_path / "d")
    assert index(folder / "f-{000..001}.tar") == 0
    assert not (folder / "dataset.json").exists() and len(resolve(f"{folder}/f-{{000..001}}.tar")) == 5
    assert load_index(str(folder / "f-001.tar")).to_json("x") == scan(str(folder / "f-001.tar")).to_json("x")


def test_existing_indexes_stay_unless_forced(tmp_path):
    folder = foreign(tmp_path / "d")
    index(folder)
    file = folder / "f-000.index.json"
    before = file.stat().st_ino
    assert index(folder) == 0 and file.stat().st_ino == before
    assert index(folder, "--force") == 0 and file.stat().st_ino != before


@pytest.mark.parametrize("case", ["truncated", "missing", "empty", "listed", "remote"])
def test_what_cannot_be_indexed(tmp_path, capsys, case):
    folder = tmp_path / "d"
    folder.mkdir()
    pattern = folder
    if case == "truncated":
        path = write_tar(folder / "a.tar", shard_members(3))
        path.write_bytes(path.read_bytes()[:3000])
    elif case == "missing":
        pattern = folder / "a-{0..3}.tar"
    elif case == "listed":
        (folder / "sizes.json").write_text('{"gone.tar": 3}')
    elif case == "remote":
        pattern = "https://host/a-{0..3}.tar"
    assert index(pattern) == 2
    message = capsys.readouterr().err.strip()
    words = {"truncated": "lint --fix", "missing": "does not exist", "empty": "has no .tar",
             "listed": "does not exist", "remote": "where the shards lie"}  # fmt: skip
    assert len(message.splitlines()) == 1 and words[case] in message
