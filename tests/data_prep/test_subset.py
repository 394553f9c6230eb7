"""Parts of a set: published lists by name, stratified parts, nested few-shot splits, named classes."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli import main
from data_prep.subset import few_shot, stratified
from moe_cl.config import ConfigError
from moe_cl.data.index import resolve
from tests.data_prep.images import image_folder

LABELS = st.lists(st.integers(-1, 6), min_size=1, max_size=200).filter(lambda x: max(x) >= 0)


@given(labels=LABELS, small=st.floats(0.01, 1), large=st.floats(0.01, 1), seed=st.integers(0, 2**40))
@settings(max_examples=150, deadline=None)
def test_stratified_parts_are_nested_and_proportional(labels, small, large, seed):
    labels = np.array(labels)
    small, large = sorted((small, large))
    inner, outer = stratified(labels, small, seed), stratified(labels, large, seed)
    assert set(inner) <= set(outer) and np.all(np.diff(outer) > 0) and np.all(labels[outer] >= 0)
    for label in set(labels[labels >= 0].tolist()):
        count = int((labels == label).sum())
        assert int((labels[outer] == label).sum()) == max(int(np.floor(count * large + 0.5)), 1)


@given(labels=st.lists(st.integers(0, 3), min_size=40, max_size=90), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_few_shot_splits_are_nested(labels, seed):
    labels = np.array(labels)
    most = min(int((labels == c).sum()) for c in set(labels.tolist()))
    parts = [set(few_shot(labels, n, seed).tolist()) for n in range(1, most + 1)]
    assert all(a < b for a, b in zip(parts, parts[1:], strict=False))
    assert all(len(p) == n * len(set(labels.tolist())) for n, p in enumerate(parts, 1))
    with pytest.raises(ConfigError, match="every class"):
        few_shot(labels, most + 1, seed)


def test_seeds_draw_differently():
    labels = np.arange(400) % 4
    draws = [tuple(few_shot(labels, 10, seed)) for seed in range(5)]
    assert len(set(draws)) == 5
    often = np.bincount(np.concatenate([few_shot(labels, 50, s) for s in range(60)]), minlength=400)
    assert 15 < often.min() and often.max() < 45  # each sample is drawn 30 times of 60 on average


@pytest.fixture
def shards(tmp_path):
    source = image_folder(tmp_path / "images", classes=4, each=10)
    assert main(["shard", str(source), "--out", str(tmp_path / "set"), "--max-count", "15", "--workers", "1"]) == 0
    return tmp_path / "set"


def subset(shards, *args):
    return main(["subset", str(shards), "--out", str(shards.parent / "lists"), *map(str, args)])


def test_lists_and_their_ids(shards, tmp_path):
    assert subset(shards, "--fraction", "0.1,0.5", "--seeds", "0,1") == 0
    lists = tmp_path / "lists"
    assert {p.stem for p in lists.glob("*.txt")} == {f"{p}percent-seed{s}" for p in (10, 50) for s in (0, 1)}
    about = json.loads((lists / "50percent-seed0.json").read_text())
    dataset = resolve(str(shards))
    names = (lists / "50percent-seed0.txt").read_text().split()
    assert about["samples"] == len(names) == 20 and about["names"] == names
    for sample, name, label in zip(about["ids"], names, about["labels"], strict=True):
        shard, row = dataset.locate(sample)
        assert dataset.index(shard).names[row] == name and dataset.index(shard).label[row] == label


def test_a_published_list_of_names(shards, tmp_path):
    wanted = ["n02_3.JPEG", "n00_0.JPEG", "n03/n03_9.JPEG"]
    (tmp_path / "1percent.txt").write_text("\n".join(wanted) + "\n")
    assert subset(shards, "--names", tmp_path / "1percent.txt") == 0
    assert {n.split("/")[-1] for n in (tmp_path / "lists" / "1percent.txt").read_text().split()} == {
        w.split("/")[-1] for w in wanted
    }


def test_named_classes_as_shards_are_numbered_anew(shards, tmp_path):
    (tmp_path / "two.txt").write_text("n03 a comment\nn01\n")
    assert subset(shards, "--classes", tmp_path / "two.txt", "--shards", tmp_path / "part") == 0
    part = resolve(str(tmp_path / "part"))
    assert len(part) == 20 and part.class_names == ("n01", "n03")
    index = part.index(0)
    assert {(n.split("/")[0], int(label)) for n, label in zip(index.names, index.label, strict=True)} == {
        ("n01", 0),
        ("n03", 1),
    }


def test_a_few_shot_part_as_shards_keeps_labels(shards, tmp_path):
    assert subset(shards, "--per-class", 2, "--shards", tmp_path / "part") == 0
    assert sorted(resolve(str(tmp_path / "part")).index(0).label.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--fraction", "0"], "above 0"), (["--fraction", "x"], "numbers separated"),
        (["--per-class", "11"], "class 0 has 10"), (["--per-class", "1", "--seeds", "0,-1"], "whole numbers from 0"),
        (["--names", "{tmp}/names.txt"], "1 of 2 names are not in the shards, the first nobody.JPEG"),
        (["--names", "{tmp}/gone.txt"], "no readable"), (["--classes", "{tmp}/names.txt"], "is no class"),
        (["--per-class", "1,2", "--shards", "{tmp}/x"], "writes one part"),
    ],
)  # fmt: skip
def test_bad_input(shards, tmp_path, capsys, args, message):
    (tmp_path / "names.txt").write_text("n00_1.JPEG\nnobody.JPEG\n")
    capsys.readouterr()
    assert subset(shards, *(a.format(tmp=tmp_path) for a in args)) == 2
    assert message in capsys.readouterr().err


def test_names_that_are_not_unique_need_their_folder(tmp_path, capsys):
    source = tmp_path / "images"
    image_folder(source, classes=2, each=2)
    for folder in ("n00", "n01"):
        (source / folder / f"{folder}_0.JPEG").rename(source / folder / "same.JPEG")
    assert main(["shard", str(source), "--out", str(tmp_path / "set"), "--workers", "1"]) == 0
    (tmp_path / "l.txt").write_text("same.JPEG\n")
    assert subset(tmp_path / "set", "--names", tmp_path / "l.txt") == 2
    (tmp_path / "l.txt").write_text("n01/same.JPEG\n")
    assert subset(tmp_path / "set", "--names", tmp_path / "l.txt") == 0
