"""Sets whose metric is the mean over classes report it beside top-1."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from moe_cl import config
from moe_cl.cli import main
from moe_cl.evals.sets import images_of
from tests.evals.run_dir import make_run


@pytest.fixture
def caltech(tmp_path):
    """Caltech-101's folders with 30, 15 and 5 pictures."""
    categories = tmp_path / "caltech101" / "101_ObjectCategories"
    (categories / "BACKGROUND_Google").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("airplanes", 30), ("lotus", 15), ("yin_yang", 5)):
        (categories / name).mkdir()
        for i in range(1, count + 1):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(categories / name / f"image_{i:04d}.jpg")
    return f"torchvision:Caltech101:{tmp_path}"


def test_knn_and_fewshot(caltech, tmp_path, capsys):
    """Votes of the whole bank that all weigh the same go to the largest class: top-1 is its share of the test pictures
    and the mean per class one in three."""
    run = tmp_path / "run"
    make_run(run)
    test = [label for _, label in images_of(caltech, False, 16)]
    assert set(test) == {0, 1, 2}
    options = ["--checkpoint", str(run), "--train", caltech, "--test", caltech]
    assert main(["eval", "knn", *options, "--k", "40", "--temperature", "1e9"]) == 0
    values = json.loads((run / "evals" / "knn.json").read_text())["values"]
    assert values["k40/per_class"] == pytest.approx(1 / 3)
    assert values["k40/top1"] == pytest.approx(test.count(0) / len(test))
    assert "per_class" in capsys.readouterr().out
    assert main(["eval", "fewshot", *options, "--shots", "2", "--seeds", "2", "--methods", "ridge"]) == 0
    out = json.loads((run / "evals" / "fewshot.json").read_text())
    assert len(out["draws"]["2-shot/ridge/per_class"]) == 2
    assert {"2-shot/ridge", "2-shot/ridge/per_class", "2-shot/ridge/per_class/interval"} <= set(out["values"])


def test_summary(caltech, tmp_path, capsys):
    cfg = make_run(tmp_path / "run")
    cfg.eval.temperature = 1e9
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000007"):
        config.save(cfg, folder / "config.yaml")
    options = ["--train", caltech, "--test", caltech, "--k", "40", "--rows", "trained", "--shots", "2", "--draws", "2"]
    assert main(["eval", "summary", "--checkpoint", str(tmp_path / "run"), *options]) == 0
    values = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert values["knn_trained/per_class"] == pytest.approx(1 / 3) and values["knn_trained"] > 1 / 3
    protocols = ("linear", "2-shot/ridge", "2-shot/logistic")
    assert all(0 <= values[f"{protocol}_trained/per_class"] <= 1 for protocol in protocols)
    assert not any("per_class_trained" in key for key in values)
    assert "per_class" in capsys.readouterr().out
