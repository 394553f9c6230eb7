"""openclipart: which drawings are taken, on white, the same every time; and the package's name in every error."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_prep import clipart, fetch
from data_prep.cli import main
from moe_cl.data.index import resolve


@pytest.fixture
def png(tmp_path):
    """A folder like the package's: two classes, one too small, one that is no class, a link, a transparent drawing."""
    root = tmp_path / "png"
    for name, count in (("animals", 20), ("food", 16), ("buttons", 3), ("unsorted", 30)):
        (root / name / "deep").mkdir(parents=True)
        for i in range(count):
            at = root / name / ("deep" if i % 2 else ".") / f"{i}.png"
            Image.new("RGBA", (120, 200), (i, 0, 0, 255)).save(at)
    (root / "food" / "linked.png").symlink_to("../animals/0.png")
    clear = np.zeros((40, 50, 4), np.uint8)
    clear[:20] = (10, 20, 30, 255)
    Image.fromarray(clear).save(root / "animals" / "0.png")
    return root


def test_set_and_split(png, tmp_path, capsys):
    assert main(["fetch", "openclipart", "--from", str(png), "--out", str(tmp_path / "a")]) == 0
    assert "2 classes, 29 drawings to train on, 7 to test on" in capsys.readouterr().err
    parts = {split: tmp_path / "a" / split for split in ("train", "test")}
    files = {split: {p.relative_to(part) for p in part.rglob("*.png")} for split, part in parts.items()}
    assert len(files["train"]) == 29 and not files["train"] & files["test"]
    assert not any("linked" in str(p) for part in files.values() for p in part)
    assert sum(p.parent.name == "animals" for p in files["test"]) == 4
    assert "deep--1.png" in {p.name for p in files["train"] | files["test"]}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*.png")}
    assert main(["fetch", "openclipart", "--from", str(png), "--out", str(tmp_path / "a")]) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*.png")} == before


def test_on_white_and_smaller(png):
    drawing = np.array(clipart.on_white(png / "animals" / "0.png"))
    assert drawing.shape == (40, 50, 3) and (drawing[0] == (10, 20, 30)).all() and (drawing[-1] == 255).all()
    assert clipart.on_white(png / "food" / "0.png").size == (96, 160)


def test_a_drawing_too_large_is_left_out(png, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(clipart, "MAX_PIXELS", 10_000)  # all but the transparent one
    assert main(["fetch", "openclipart", "--from", str(png), "--out", str(tmp_path / "a")]) == 0
    assert "35 left out" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "a").rglob("*.png")] == ["0.png"]


def test_shards_of_it(png, tmp_path):
    assert main(["fetch", "openclipart", "--from", str(png), "--out", str(tmp_path / "a")]) == 0
    for split in ("train", "test"):
        command = ["shard", str(tmp_path / "a"), "--split", split, "--out", str(tmp_path / "s"), "--workers", "1"]
        assert main(command) == 0
    assert len(resolve(str(tmp_path / "s" / "train"))) == 29 and len(resolve(str(tmp_path / "s" / "test"))) == 7


def test_errors_name_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(fetch.DEBIAN, "openclipart", ("openclipart-png", tmp_path / "absent"))
    monkeypatch.setattr(fetch.os, "geteuid", lambda: 1000)
    assert main(["fetch", "openclipart", "--out", str(tmp_path / "a")]) == 2
    assert "openclipart-png" in (error := capsys.readouterr().err) and "--from" in error
    (tmp_path / "empty").mkdir()
    assert main(["fetch", "openclipart", "--from", str(tmp_path / "empty"), "--out", str(tmp_path / "a")]) == 2
    assert "at least 15 drawings" in capsys.readouterr().err
