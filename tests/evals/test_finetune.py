"""Fine-tuning: it learns, its parts and batches are what they should be, and ranks change nothing."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_cl.cli import main
from moe_cl.config import ConfigError
from moe_cl.evals import finetune
from moe_cl.evals.context import Context
from moe_cl.evals.finetune import PRESETS, Classifier, Recipe, groups, learning_rate, order, seeded
from moe_cl.evals.sets import images_of
from moe_cl.evals.subset import chosen, names_of, part_of
from moe_cl.models.backbone import set_drop_path
from moe_cl.models.build import build_backbone
from tests.evals.run_dir import TINY, make_images, make_run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


def test_it_learns_from_a_tenth_of_the_labels(images, tmp_path):
    out = tmp_path / "out"
    make_run(out, images)
    options = ["--preset", "plain", "--epochs", "20", "--train-batch", "8", "--base-lr", "0.2", "--weight-decay", "0"]
    assert main(["eval", "finetune", "--checkpoint", str(out), *options, "--fraction", "0.5", "--first-layer"]) == 0
    found = json.loads((out / "evals" / "finetune.json").read_text())
    assert found["values"]["images"] == 18 and found["values"]["top1"] > 0.6
    assert found["losses"][-1] < found["losses"][0] and len(found["losses"]) == 20
    assert found["setting"]["fine_tuning"]["batch"] == 8


def one_rank(comm, images, recipe):
    args = Namespace(seed=0, dtype="fp32", workers=0, device="cpu", size=16, normalize="imagenet")
    ctx = Context(args, comm)
    torch.manual_seed(0)
    model = Classifier(build_backbone("vit", **TINY), 3).double().train()
    set_drop_path(model.backbone, recipe.drop_path)
    data = images_of(f"folder:{images / 'train'}", True, 16)
    losses = finetune.train(model, _Double(data), np.arange(36), 3, recipe, ctx)
    return losses, model.head.weight.detach()


class _Double:
    def __init__(self, images):
        self.images = images

    def __getitem__(self, i):
        return self.images[i]


@pytest.mark.processes
def test_ranks_train_the_same_model(images, pool):
    recipe = Recipe(2, 12, base_lr=0.01, warmup=0.0, mixup=0.0, cutmix=0.0, auto_augment=None, erasing=0.0, repeats=2,
                    drop_path=0.0)  # fmt: skip
    (alone,) = pool.run(1, one_rank, images, recipe)
    two = pool.run(2, one_rank, images, recipe)
    assert torch.equal(two[0][1], two[1][1])
    np.testing.assert_allclose(two[0][0], alone[0], rtol=1e-5)
    torch.testing.assert_close(two[0][1], alone[1], rtol=1e-5, atol=1e-7)


@pytest.mark.processes
def test_ranks_mix_and_drop_the_same(images, pool):
    """Five pairs over two ranks: the mixing, its partners, stochastic depth, and parts of unequal size."""
    recipe = Recipe(2, 10, base_lr=0.01, warmup=0.0, auto_augment=None, erasing=0.0, repeats=1, drop_path=0.5)
    (alone,) = pool.run(1, one_rank, images, recipe)
    two = pool.run(2, one_rank, images, recipe)
    np.testing.assert_allclose(two[0][0], alone[0], rtol=1e-5)
    torch.testing.assert_close(two[1][1], alone[1], rtol=1e-5, atol=1e-7)
    (plain,) = pool.run(1, one_rank, images, replace(recipe, drop_path=0.0))
    assert abs(plain[0][0] - alone[0][0]) > 1e-4  # it does drop


def test_pairs_need_two_images_a_rank():
    finetune._check_shares(8, PRESETS["deit"], 4)
    finetune._check_shares(4, PRESETS["plain"], 4)
    finetune._check_shares(1, PRESETS["deit"], 1)
    with pytest.raises(ConfigError, match="7 training images a batch are too few for 4 ranks that mix.* take 8"):
        finetune._check_shares(7, PRESETS["deit"], 4)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_batches_do_not_depend_on_ranks(n, batch, repeats, world, epoch):
    recipe = Recipe(batch=batch, repeats=repeats)
    chosen = np.arange(100, 100 + n)
    whole = order(chosen, epoch, recipe, 0, 0, 1)
    parts = [order(chosen, epoch, recipe, 0, r, world) for r in range(world)]
    for number, keys in enumerate(whole):
        assert sorted(k for part in parts for k in part[number]) == sorted(keys)
    keys = [k for b in whole for k in b]
    size = min(n, batch)
    assert {len(b) for b in whole} == {size // 2 * 2 if size > 1 else 1} and len(whole) == max(1, n // batch)
    assert len(set(keys)) == len(keys)
    assert {k[1] for k in keys} <= set(chosen.tolist()) and all(k[2] < repeats for k in keys)


def test_parts_of_a_set(tmp_path):
    labels = np.array([0] * 50 + [1] * 20 + [2] * 3)
    part = part_of(labels, 0.1, None, 0)
    assert np.bincount(labels[part]).tolist() == [5, 2, 1]
    assert np.array_equal(part, part_of(labels, 0.1, None, 0)) and len(part_of(labels, None, None, 0)) == 73
    np.save(tmp_path / "a.npy", np.array([3, 5]))
    (tmp_path / "a.txt").write_text("3\n5")  # no newline at the end
    for name in ("a.npy", "a.txt"):
        assert part_of(labels, None, str(tmp_path / name), 0).tolist() == [3, 5]
    (tmp_path / "b.txt").write_text("73\n")
    for listed, fraction in ((str(tmp_path / "b.txt"), None), ("/nowhere", None), (None, 2.0)):
        with pytest.raises(ConfigError):
            part_of(labels, fraction, listed, 0)


def test_a_published_list_names_its_images(images, tmp_path):
    """ "path label" lines of the papers, with more or fewer folders before the name, and keys without a suffix."""
    data = images_of(f"folder:{images / 'train'}", True, 16)
    assert names_of(data)[13] == "class1/001.png"
    (tmp_path / "list.txt").write_text("train/class1/001.png 7\nclass0/003 0\n\nclass2/011.png")
    assert chosen(data, None, str(tmp_path / "list.txt"), 0).tolist() == [13, 3, 35]
    for line, text in (("class1/099.png 1", "'class1/099.png' is no image"), ("001.png 1", "or several")):
        (tmp_path / "list.txt").write_text(line)
        with pytest.raises(ConfigError, match=text):
            chosen(data, None, str(tmp_path / "list.txt"), 0)


def test_a_linear_probe_of_a_list_trains_on_it_alone(images, tmp_path):
    out = tmp_path / "out"
    make_run(out, images)
    (tmp_path / "list.txt").write_text("".join(f"class{c}/{i:03d}.png {c}\n" for c in range(3) for i in range(4)))
    options = ["--protocol", "crmoe", "--epochs", "2", "--probe-batch", "8", "--list", str(tmp_path / "list.txt")]
    assert main(["eval", "linear", "--checkpoint", str(out), *options]) == 0
    found = json.loads((out / "evals" / "linear.json").read_text())
    assert found["setting"]["images"] == 12 and found["setting"]["probe"] == "crmoe"
    assert found["setting"]["which"] == "teacher" and found["setting"]["recipe"] == "small"


def test_what_deit_and_swin_leave_undecayed():
    def names(net, number):
        of = {id(p): name for name, p in net.named_parameters()}
        return {of[id(p)] for p in groups(net, 0.1)[number]["params"]}

    vit = Classifier(build_backbone("vit", **TINY, pos_embed="learned"), 3).requires_grad_(True)
    assert {"backbone.cls_token", "backbone.pos_embed", "head.bias"} <= names(vit, 1)
    assert names(vit, 0) == {n for n, p in vit.named_parameters() if n.endswith("weight") and p.ndim > 1}
    swin = Classifier(build_backbone("swin", dim=8, depths=[1, 1], heads=[1, 2], img_size=16), 3)
    tables = {n for n, _ in swin.named_parameters() if n.endswith("relative_position_bias_table")}
    assert tables and tables <= names(swin, 1)


def test_learning_rate_and_presets():
    recipe = PRESETS["deit"]
    assert learning_rate(0, 10, recipe) == 1e-6
    assert learning_rate(50, 10, recipe) == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * 5 / 150)))
    assert learning_rate(1499, 10, recipe) < 1.2e-5
    assert PRESETS["cifar100"].mixup == 0.5 and PRESETS["flowers"].weight_decay == 0.3 and not PRESETS["pets"].drop_path


def test_random_state_outside_is_left_alone():
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    want = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    with seeded(1, 2):
        inside = torch.rand(1), random.random(), np.random.rand()
    assert (torch.rand(1), random.random(), np.random.rand()) == want
    with seeded(1, 2):
        assert (torch.rand(1), random.random(), np.random.rand()) == inside


def test_drop_path_of_a_built_backbone():
    net = build_backbone("vit", **(TINY | {"depth": 3}))
    set_drop_path(net, 0.4)
    assert [b.drop2.rate for b in net.blocks] == [0.0, 0.2, 0.4]
