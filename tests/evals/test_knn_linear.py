"""Features over ranks, kNN against the published hits, linear sweeps on planted data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.comm import LocalComm, SimComm
from moe_cl.config import ConfigError
from moe_cl.data.faults import SourceLost
from moe_cl.evals.features import changed, encoder, extract, fingerprint, frozen, opened
from moe_cl.evals.knn import knn, neighbours, vote
from moe_cl.evals.linear import PROTOCOLS, Protocol, Sweep, linear_probe, split, train_sweep
from moe_cl.evals.metrics import metric
from moe_cl.models.build import build_backbone

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "esvit_knn.npz")


def part(images, labels, comm, batch):
    """Rank-strided batches."""
    ids = torch.arange(len(images))[comm.rank :: comm.world]
    for index in ids.split(batch) if len(ids) else []:
        yield images[index], labels[index], index


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 13), st.integers(1, 4))
def test_features_are_whole_and_in_order_on_every_rank(world, n, batch):
    images, labels = torch.arange(n * 2.0).view(n, 2, 1, 1), torch.arange(n) % 3
    calls = []

    def one(comm):
        def encode(x):
            calls.append(comm.rank)
            return x.flatten(1)

        return extract(encode, part(images, labels, comm, batch), comm)

    for features, got in SimComm.run(world, one):
        assert torch.equal(features, images.flatten(1)) and torch.equal(got, labels)
    counts = [calls.count(r) for r in range(world)]
    assert len(set(counts)) == 1  # expert-parallel layers need as many forwards on every rank


def test_an_empty_set_is_named():
    with pytest.raises(ConfigError, match="empty"):
        extract(lambda x: x, [], LocalComm())


@pytest.mark.parametrize("error", [SourceLost("https://x is away"), ConfigError("no such data")])
def test_one_ranks_lost_data_ends_the_features_of_all(error):
    """Every rank raises what one has met; none waits for a rank that has left."""

    def broken(comm):
        yield torch.zeros(2, 1, 2, 2), torch.zeros(2).long(), torch.arange(2)
        if comm.rank == 1:
            raise error
        yield torch.zeros(2, 1, 2, 2), torch.zeros(2).long(), torch.arange(2, 4)

    def sets(comm):
        if comm.rank == 2:
            raise error
        return comm.rank

    def one(comm):
        with pytest.raises(type(error), match=str(error)):
            extract(lambda x: x.flatten(1), broken(comm), comm)
        with pytest.raises(type(error), match=str(error)):
            opened(lambda: sets(comm), comm)
        return opened(lambda: comm.rank, comm)

    assert SimComm.run(3, one) == [0, 1, 2]


@pytest.mark.parametrize("case", ["k0", "k1", "k2"])
def test_knn_golden(case):
    g = {n: torch.from_numpy(GOLDEN[f"{case}__{n}"]) for n in ("train_x", "train_y", "test_x", "test_y")}
    classes = int(GOLDEN[f"{case}__num_classes"])
    out = knn(*g.values(), classes, k=[10, 20, 100], chunk=37)
    for k in (10, 20, 100):
        want = GOLDEN[f"{case}__k{k}__top1_top5"] / 100
        np.testing.assert_allclose([out[f"k{k}/top1"], out[f"k{k}/top5"]], want, atol=1e-9)
    similarity, index = neighbours(g["train_x"], g["test_x"], 20, block=64)
    scores = vote(similarity, g["train_y"][index], classes, 0.07)
    assert np.array_equal((scores.argmax(1) == g["test_y"]).numpy(), GOLDEN[f"{case}__k20__hit1"])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 9), st.integers(2, 7), st.integers(0, 99))
def test_knn_does_not_depend_on_ranks_chunks_or_blocks(world, n, chunk, classes, seed):
    g = torch.Generator().manual_seed(seed)
    bank, test = torch.randn(50, 4, generator=g).double(), torch.randn(n, 4, generator=g).double()
    yb, yt = (torch.randint(classes, (m,), generator=g) for m in (50, n))
    want = knn(bank, yb, test, yt, classes, k=60, name="per_class")  # more neighbours than bank rows
    for got in SimComm.run(
        world, lambda c: knn(bank, yb, test, yt, classes, k=60, chunk=chunk, comm=c, name="per_class")
    ):
        assert got == pytest.approx(want)
    near = neighbours(F.normalize(bank, dim=1), F.normalize(test, dim=1), 60)
    scores = vote(near[0], yb[near[1]], classes, 0.07).numpy()
    for figure, name in (("top1", "accuracy"), ("per_class", "per_class")):
        assert want[figure] == pytest.approx(metric(name, scores, yt.numpy()))
    value, index = neighbours(bank, test, 5, block=7)
    full = (test @ bank.T).topk(5, 1)
    assert torch.equal(index, full.indices) and torch.allclose(value, full.values)


def planted(n=600, width=8, classes=4, noise=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, width, generator=torch.Generator().manual_seed(99)) * 2
    y = torch.randint(classes, (n,), generator=g)
    return means[y] + noise * torch.randn(n, width, generator=g), y


def test_separable_classes_are_found():
    x, y = planted()
    tx, ty = planted(seed=1)
    assert knn(x, y, tx, ty, 4)["top1"] > 0.99
    out = linear_probe(x, y, tx, ty, 4, epochs=10)
    assert out["top1"] > 0.99 and out["top5"] == 1.0 and out["selection"] == "held out of training"
    published = linear_probe(x, y, tx, ty, 4, protocol="crmoe", epochs=5, select="test")
    assert published["top1"] > 0.99 and "test" in published["selection"]
    random = linear_probe(torch.randn(600, 8), y, torch.randn(600, 8), ty, 4, epochs=5)
    assert random["top1"] < 0.4


def lopsided():
    """30 test images of class 0, 10 of class 1, 10 of class 2 that look like class 0: top-1 is .8, per class 2/3."""
    means = 3.0 * torch.eye(4)
    y = torch.tensor([0] * 40 + [1] * 20 + [2] * 10)
    ty = torch.tensor([0] * 30 + [1] * 10 + [2] * 10)
    noise = 0.1 * torch.randn(len(y) + len(ty), 4, generator=torch.Generator().manual_seed(0))
    return means[y] + noise[: len(y)], y, means[ty * (ty != 2)] + noise[len(y) :], ty


@pytest.mark.parametrize("world", [1, 3])
def test_small_classes_count_as_much_as_large_ones(world):
    def one(comm):
        figures = knn(*lopsided(), 4, k=[3, 5], chunk=7, comm=comm, name="per_class")  # no test image of class 3
        return figures, linear_probe(*lopsided(), 4, epochs=30, comm=comm, name="per_class")

    for figures, probe in SimComm.run(world, one):
        assert set(figures) == {f"k{k}/{n}" for k in (3, 5) for n in ("top1", "top5", "per_class")}
        assert figures["k5/top1"] == pytest.approx(0.8) and figures["k5/per_class"] == pytest.approx(2 / 3)
        assert probe["top1"] == pytest.approx(0.8) and probe["per_class"] == pytest.approx(2 / 3)
    assert "per_class" not in knn(*lopsided(), 4, k=3)


def test_a_sweep_is_torchs_sgd_on_every_head():
    x, y = planted(64)
    protocol = Protocol(lrs=(0.1, 1.0), weight_decays=(0.0, 0.01), epochs=3, batch=16, per="iteration")
    sweep = train_sweep(protocol, x, y, 4, seed=3)
    start = Sweep(protocol, 8, 4, 4, seed=3)
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(64, generator=generator).split(16) for _ in range(3)]
    for s, (lr, wd) in enumerate(sweep.settings):
        head = torch.nn.Linear(8, 4)
        with torch.no_grad():
            head.weight.copy_(start.w[:, s].T), head.bias.zero_()
        sgd = torch.optim.SGD(head.parameters(), lr * 16 / 256, momentum=0.9, weight_decay=wd)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 12)
        for index in (i for order in orders for i in order):
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(head(x[index]), y[index]).backward()
            sgd.step(), cosine.step()
        torch.testing.assert_close(sweep.w[:, s], head.weight.detach().T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sweep.b[s], head.bias.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", [2, 3])
def test_settings_are_dealt_over_ranks(world):
    x, y = planted(120)
    tx, ty = planted(50, seed=1)
    want = linear_probe(x, y, tx, ty, 4, epochs=3)
    for got in SimComm.run(world, lambda c: linear_probe(x, y, tx, ty, 4, epochs=3, comm=c)):
        assert got == pytest.approx(want)


def test_schedules_are_the_papers():
    step = Sweep(PROTOCOLS["mocov2"], 2, 2, 10)
    factors = []
    for epoch in (0, 59, 60, 79, 80, 99):
        step.step_number = epoch * 10 + 9
        factors.append(round(step.factor(), 6))
    assert factors == [1, 1, 0.1, 0.1, 0.01, 0.01] and step.lr.item() == 30
    assert Sweep(PROTOCOLS["mocov3_vit"], 2, 2, 10).lr.item() == 12
    assert len(Sweep(PROTOCOLS["crmoe"], 2, 2, 10).settings) == 70


def test_split_keeps_classes():
    y = torch.tensor([0] * 20 + [1] * 10 + [2] * 2)
    train, held = split(y, 0.2, 0)
    assert sorted(torch.cat([train, held]).tolist()) == list(range(32))
    assert [int((y[held] == c).sum()) for c in range(3)] == [4, 2, 1]


def test_frozen_leaves_every_buffer():
    net = build_backbone("resnet18_cifar")
    before = fingerprint(net)
    with frozen(net):
        features = encoder(net, dtype=torch.bfloat16)(torch.randn(4, 3, 8, 8))
        assert features.shape == (4, 512) and features.dtype == torch.float32 and not features.requires_grad
        assert encoder(net, blocks=2)(torch.randn(4, 3, 8, 8)).shape == (4, 768)
    assert net.training and changed(net, before) == []
    net([torch.randn(4, 3, 8, 8)])
    assert "bn1.running_mean" in changed(net, before)
