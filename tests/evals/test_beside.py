"""A run that names no labelled sets is measured on its training shards and the test split beside them."""

from __future__ import annotations

import json

import pytest

from moe_cl import config
from moe_cl.cli import main
from moe_cl.evals.sets import beside
from tests.evals.run_dir import make_run, make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


def test_summary_finds_them_and_says_so(shards, tmp_path, capsys):
    cfg = make_run(tmp_path / "run")
    cfg.data.train = f"{shards}/train"
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000007"):
        config.save(cfg, folder / "config.yaml")
    assert main(["eval", "summary", "--checkpoint", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert text.count(f"labelled training set: {shards}/train") == 1
    assert text.count(f"labelled test set: {shards}/test") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["knn_pixels"] > 0.9


def test_what_is_beside(shards):
    assert beside(f"{shards}/train", True) == f"{shards}/train"
    assert beside(f"{shards}/train/", False) == f"{shards}/test"
    assert beside(f"{shards}/test", False) is None  # no training split: nothing to guess from
    assert beside(f"{shards}/set-train-{{000000..000000}}.tar", False) is None
    assert beside("nowhere/train", True) is None and beside("nowhere/train", False) is None


def test_a_run_with_neither_says_which_option(tmp_path, capsys):
    make_run(tmp_path / "run")
    assert main(["eval", "knn", "--checkpoint", str(tmp_path / "run")]) == 2
    assert "no labelled training set: give --train" in capsys.readouterr().err
