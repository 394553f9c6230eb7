"""Fetch: the order of the ways, and one line that names them all when none works."""

import gzip

import numpy as np
import pytest

from data_prep import fetch
from data_prep.cli import main
from data_prep.sources import SourceOptions, open_source
from data_prep.sources.arrays import read_idx, write_idx
from moe_cl.config import ConfigError

NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def idx_folder(folder, shade, zipped=True):
    folder.mkdir(parents=True)
    for name in NAMES:
        array = np.full((3, 4, 4) if "images" in name else 3, shade, np.uint8)
        write_idx(folder / f"{name}.gz", array)
        if not zipped:
            (folder / name).write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))
            (folder / f"{name}.gz").unlink()
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_a_named_folder_comes_first(tmp_path, monkeypatch, capsys, zipped):
    mine, debian = idx_folder(tmp_path / "mine", 1, zipped), idx_folder(tmp_path / "debian", 2)
    monkeypatch.setitem(fetch.DEBIAN, "fashion-mnist", ("dataset-fashion-mnist", debian))
    assert main(["fetch", "fashion-mnist", "--from", str(mine), "--out", str(tmp_path / "a")]) == 0
    assert main(["fetch", "fashion-mnist", "--out", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "a"), str(tmp_path / "b")]
    for folder, shade in (("a", 1), ("b", 2)):
        source = open_source(f"fashion-mnist:{tmp_path / folder}", SourceOptions("train"))
        assert {i.label for i in source.items} == {shade}
    # what is there already is not fetched again
    monkeypatch.setitem(fetch.DEBIAN, "fashion-mnist", ("dataset-fashion-mnist", idx_folder(tmp_path / "new", 3)))
    assert main(["fetch", "fashion-mnist", "--out", str(tmp_path / "b")]) == 0
    assert open_source(f"fashion-mnist:{tmp_path / 'b'}", SourceOptions("train")).items[0].label == 2


def test_torchvision_is_the_last_way(tmp_path, monkeypatch):
    def download(name, root, split, download):
        assert name == "FashionMNIST" and download
        idx_folder(tmp_path / "out" / "FashionMNIST" / "raw", 4)

    monkeypatch.setattr("data_prep.sources.torchvision_sets.torchvision_dataset", download)
    monkeypatch.setitem(fetch.DEBIAN, "fashion-mnist", ("dataset-fashion-mnist", tmp_path / "absent"))
    monkeypatch.setattr(fetch.os, "geteuid", lambda: 1000)
    assert main(["fetch", "fashion-mnist", "--out", str(tmp_path / "out")]) == 0
    assert open_source(f"fashion-mnist:{tmp_path / 'out'}", SourceOptions("test")).items[0].label == 4


def test_when_all_fail_every_way_is_named(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise ConfigError("no network")

    monkeypatch.setattr("data_prep.sources.torchvision_sets.torchvision_dataset", refuse)
    monkeypatch.setitem(fetch.DEBIAN, "fashion-mnist", ("dataset-fashion-mnist", tmp_path / "absent"))
    monkeypatch.setattr(fetch.os, "geteuid", lambda: 1000)
    assert main(["fetch", "fashion-mnist", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    assert all(way in message for way in ("--from", "dataset-fashion-mnist", "torchvision", "needs root", "no network"))


def test_a_named_folder_that_does_not_do_is_an_error(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert main(["fetch", "fashion-mnist", "--from", str(tmp_path / "mine"), "--out", str(tmp_path / "out")]) == 2
    assert "lacks some of the four" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_digits_need_nothing(tmp_path):
    assert main(["fetch", "digits", "--out", str(tmp_path)]) == 0
    images = read_idx(tmp_path / "train-images-idx3-ubyte.gz")
    assert images.shape == (1438, 8, 8) and images.max() == 255
    assert len(open_source(f"digits:{tmp_path}", SourceOptions("test")).items) == 359


def test_unknown_name(capsys):
    assert main(["fetch", "imagenette"]) == 2
    assert "fetch knows fashion-mnist" in capsys.readouterr().err
