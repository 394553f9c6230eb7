"""Numbers of a set from its indexes, and the contact sheet."""

import json

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.stats import CAPTION, TILE
from tests.data_prep.images import encoded, image_folder, write_tar


def test_numbers_and_sheet(tmp_path, capsys):
    source = image_folder(tmp_path / "images", classes=3, each=4)
    (source / "n00" / "big.png").write_bytes(encoded(5, "PNG", height=200, width=100))
    main(["shard", str(source), "--out", str(tmp_path / "set"), "--workers", "1"])
    args = ["--json", str(tmp_path / "s.json"), "--sheet", str(tmp_path / "s.png"), "--count", "9"]
    assert main(["stats", str(tmp_path / "set"), *args]) == 0
    numbers = json.loads((tmp_path / "s.json").read_text())
    assert numbers["samples"] == 13 and numbers["classes"] == {"n00": 5, "n01": 4, "n02": 4}
    assert numbers["width"]["most"] == 100 and numbers["height"]["most"] == 200 and numbers["height"]["median"] == 24
    assert numbers["format"] == {"jpg": 12, "png": 1} and numbers["without a label"] == 0
    picture = Image.open(tmp_path / "s.png")
    assert picture.size == (3 * TILE, 3 * (TILE + CAPTION))
    tiles = np.asarray(picture.convert("RGB"))
    assert all(tiles[50 + y * (TILE + CAPTION), 50 + x * TILE].min() < 255 for x in range(3) for y in range(3))
    first = (tmp_path / "s.png").read_bytes()
    main(["stats", str(tmp_path / "set"), *args])
    assert (tmp_path / "s.png").read_bytes() == first


def test_a_bad_image_is_red_and_counted(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.jpg", b"broken"), ("a.cls", b"0")])
    assert main(["index", str(tmp_path / "s.tar"), "--workers", "1"]) == 0
    args = ["--sheet", str(tmp_path / "s.png"), "--json", str(tmp_path / "s.json")]
    assert main(["stats", str(tmp_path / "s.tar"), *args]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["header not readable"] == 1
    assert Image.open(tmp_path / "s.png").getpixel((50, 50)) == (255, 0, 0)


def test_many_classes_show_both_ends(tmp_path, capsys):
    source = image_folder(tmp_path / "images", classes=9, each=1)
    main(["shard", str(source), "--out", str(tmp_path / "set"), "--workers", "1"])
    capsys.readouterr()
    assert main(["stats", str(tmp_path / "set"), "--classes", "4"]) == 0
    text = capsys.readouterr().out
    assert "..." in text and "n00" in text and "n08" in text and "n04" not in text


def test_bad_input(tmp_path, capsys):
    assert main(["stats", str(tmp_path / "gone")]) == 2
    with pytest.raises(SystemExit) as end:
        main(["stats", str(tmp_path), "--count", "0"])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
