"""Every command of docs/evaluation.md on small encoders and sets, lengths cut down; each leaves what it promises."""

from __future__ import annotations

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torchvision
from PIL import Image

from moe_cl.config import ModelConfig
from moe_cl.evals.cli import PROTOCOLS
from moe_cl.evals.sweep import PROTOCOLS as PROBES
from moe_cl.tracking.journal import Journal
from moe_cl.tracking.tail import read
from tests import guide
from tests.evals.run_dir import TINY, make_dtd, make_images, make_run
from tests.evals.test_detection import make_coco

TEXT = (guide.DOCS / "evaluation.md").read_text()
BLOCKS = guide.commands("evaluation")
# The table of linear probes: `eval linear --protocol NAME` in its cells.
PROBE_ROWS = re.findall(r"^\|[^|]+\| `eval (linear[^`]*)`", TEXT, re.MULTILINE)
ALL = [b.removeprefix("python -m moe_cl eval ") for b in BLOCKS] + [f"{p} --checkpoint runs/esvit" for p in PROBE_ROWS]
CUT = {
    "linear": ["--epochs", "1", "--probe-batch", "16"],
    "logistic": ["--iterations", "3"],
    "finetune": ["--epochs", "1", "--train-batch", "8", "--repeats", "1"],
    "detection": ["--iterations", "1", "--train-batch", "2", "--min-size", "64", "--rois", "4", "--precise-bn", "1",
                  "--trials", "2"],
}  # fmt: skip
VIT = ModelConfig("vit", TINY | {"depth": 4})
RUNS = {"quickstart": (None, "odd"), "crmoe": (None, "odd"), "esvit": (VIT, "none"), "mocov3_vit": (VIT, "none")}
RUNS |= {name: (ModelConfig("resnet18"), "none") for name in ("moco_cifar", "mocov2", "jcl")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the runs and sets that the guide names."""
    base = tmp_path_factory.mktemp("guide")
    images = make_images(base / "images")
    for name, (model, moe) in RUNS.items():
        make_run(base / "runs" / name, images, model, moe)
        Journal(base / "runs" / name / "journal.jsonl").close("FINISHED")
    (base / "imagenet_1percent.txt").write_text("class0/000.png 0\nclass1/001.png 1\ntrain/class2/006.png 2\n")
    make_dtd(base / "data" / "dtd" / "dtd", images)
    make_cifar100(base / "data" / "cifar-100-python")
    make_voc(base / "data" / "VOCdevkit")
    coco = base / "data" / "coco"
    (coco / "annotations").mkdir(parents=True)
    for seed, split in enumerate(("train2017", "val2017")):
        folder = make_coco(coco / split, 3, seed)
        shutil.move(folder / "coco.json", coco / "annotations" / f"instances_{split}.json")
    return base


def make_cifar100(root):
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        data = {"data": rng.integers(0, 255, (12, 3072)).astype(np.uint8), "fine_labels": [i % 3 for i in range(12)]}
        (root / split).write_bytes(pickle.dumps(data))
    (root / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b", "c"]}))


def make_voc(root):
    for year, splits in (("2007", ("trainval", "test")), ("2012", ("trainval",))):
        for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
            (root / f"VOC{year}" / folder).mkdir(parents=True)
        for split in splits:
            (root / f"VOC{year}/ImageSets/Main/{split}.txt").write_text(f"{year}{split}\n")
            box = "<xmin>11</xmin><ymin>5</ymin><xmax>40</xmax><ymax>50</ymax>"
            thing = f"<object><name>dog</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
            size = "<size><width>64</width><height>64</height></size>"
            xml = f"<annotation>{size}{thing}</annotation>"
            (root / f"VOC{year}/Annotations/{year}{split}.xml").write_text(xml)
            Image.new("RGB", (64, 64), "gray").save(root / f"VOC{year}/JPEGImages/{year}{split}.jpg")


@pytest.mark.parametrize("command", ALL)
def test_command(place, monkeypatch, capsys, command):
    monkeypatch.chdir(place)
    # torchvision compares checksums of the published files
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    protocol, name = command.split()[0], "again"
    guide.run(f"python -m moe_cl eval {command} --name {name}", CUT.get(protocol, []))
    out = place / "runs" / re.search(r"--checkpoint runs/(\w+)", command).group(1)
    text, found = capsys.readouterr().out, json.loads((out / "evals" / f"{name}.json").read_text())
    assert found["values"] and found["setting"]["protocol"] == protocol and found["setting"]["step"] == 7
    assert f"{name} at step 7" in text  # the table
    line = read(out / "journal.jsonl")[-1]
    assert line["name"] == name and line["values"] == found["values"] and line["setting"] == found["setting"]


def test_the_guide_has_every_protocol():
    assert {c.split()[0] for c in ALL} == set(PROTOCOLS)
    assert {re.search(r"--protocol (\w+)", p).group(1) for p in PROBE_ROWS if "--protocol" in p} | {"fast"} == set(
        PROBES
    )
