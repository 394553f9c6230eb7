"""Consistency of routing: published values, no overlap, any number of ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.comm import LocalComm, SimComm
from moe_cl.losses import consistency as module
from moe_cl.losses.consistency import Match, as_sparse, consistency
from moe_cl.views import crops

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "crmoe_consistency.npz")


def golden_match(threshold=0.2, rows=slice(None)):
    boxes = [torch.from_numpy(GOLDEN[n][rows]) for n in ("bbox1", "bbox2")]
    return Match(*crops.match(*boxes, math.isqrt(GOLDEN["z_q1"].shape[1] - 1), threshold))


def gates(kind, names, rows=slice(None)):
    z = [torch.from_numpy(GOLDEN[f"z_{n}"][rows]) for n in names]
    p = torch.stack([x.requires_grad_(names[0] == "q1").softmax(-1) for x in z])[None]
    if kind == "softmax":
        return (*as_sparse(p), z)
    w, i = p.topk(2)
    return i, w, z


def run(kind, threshold, alpha, match=True):
    qi, qw, z = gates(kind, ("q1", "q2"))
    ki, kw, _ = gates(kind, ("k1", "k2"))
    total, _ = consistency(qi, qw, ki, kw, 16, LocalComm(), golden_match(threshold) if match else None, 0.2, alpha)
    return total, z


@pytest.mark.parametrize("kind", ["gated", "softmax"])
@pytest.mark.parametrize("alpha, threshold", [(0.3, 0.2), (0.5, 0.2), (0.3, 0), (0.3, 0.5), (1, 0.2), (0, 0.2)])
def test_published(kind, alpha, threshold):
    total, z = run(kind, threshold, alpha)
    np.testing.assert_allclose(total.item(), GOLDEN[f"{kind}_loss_iou_a{alpha}_t{threshold}"], rtol=2e-6)
    if (alpha, threshold) == (0.3, 0.2):
        total.backward()
        for name, x in zip(("q1", "q2"), z, strict=True):
            want = GOLDEN[f"{kind}_grad_z_{name}"]
            np.testing.assert_allclose(x.grad, want, atol=2e-6 * np.abs(want).max() + 1e-9)


@pytest.mark.parametrize("kind", ["gated", "softmax"])
def test_cls_alone(kind):
    total, _ = run(kind, 0.2, 0.3, match=False)
    want = GOLDEN[f"{kind}_cls_q1k2"] + GOLDEN[f"{kind}_cls_q2k1"]
    np.testing.assert_allclose(total.item(), want, rtol=2e-6)


def test_every_group_has_the_patches_that_nearest_counts_without_a_message():
    """All patches have a nearest one: their number is known, and it is the one that counting gives."""
    qi, qw, _ = gates("gated", ("q1", "q2"))
    ki, kw, _ = gates("gated", ("k1", "k2"))
    for statistics in ("global", "group: 2", "published"):
        total, _ = consistency(qi, qw, ki, kw, 16, LocalComm(), statistics=statistics, mode="nearest")
        match = module.nearest(qi, qw, ki, kw, 16)
        counted = module._aligned(qi, qw, ki, kw, match, None, (1.0, 1.0), 16, LocalComm(), 0.2, statistics)
        torch.testing.assert_close(total, counted.sum(), rtol=1e-6, atol=0)


def test_no_overlap_leaves_cls():
    """The published code gives nan here."""
    match = golden_match()
    match.valid1.zero_(), match.valid2.zero_()
    qi, qw, _ = gates("gated", ("q1", "q2"))
    ki, kw, _ = gates("gated", ("k1", "k2"))
    total, _ = consistency(qi, qw, ki, kw, 16, LocalComm(), match)
    want = 0.7 * (GOLDEN["gated_cls_q1k2"] + GOLDEN["gated_cls_q2k1"])
    np.testing.assert_allclose(total.item(), want, rtol=2e-6)


def test_two_ranks_as_published():
    z = np.load(Path(__file__).parents[1] / "golden" / "crmoe_world2.npz")

    def rank(comm):
        half = len(GOLDEN["bbox1"]) // 2
        rows = slice(comm.rank * half, (comm.rank + 1) * half)
        qi, qw, _ = gates("gated", ("q1", "q2"), rows)
        ki, kw, _ = gates("gated", ("k1", "k2"), rows)
        match = golden_match(0.2, rows)
        return consistency(qi, qw, ki, kw, 16, comm, match, statistics="published")[0].item()

    np.testing.assert_allclose(SimComm.run(2, rank), [z["gate_loss_rank0"], z["gate_loss_rank1"]], rtol=2e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["global", "group: 2", "group: 4"]), st.booleans())
def test_any_world_any_chunk(seed, statistics, small):
    g = torch.Generator().manual_seed(seed)
    layers, batch, tokens, experts, top_k = 2, 8, 5, 6, 2
    q, k = torch.rand(2, layers, 2, batch, tokens, experts, generator=g, dtype=torch.float64).softmax(-1).unbind()
    idx = torch.randint(0, tokens - 1, (2, batch, tokens - 1), generator=g)
    valid = torch.rand(2, batch, tokens - 1, generator=g) < 0.4

    def one(comm, rows):
        p = q[:, :, rows].clone().requires_grad_()
        (w, i), (kw, ki) = p.topk(top_k), k[:, :, rows].topk(top_k)
        match = Match(idx[0][rows], valid[0][rows], idx[1][rows], valid[1][rows])
        total, _ = consistency(i, w, ki, kw, experts, comm, match, statistics=statistics)
        total.backward()
        return total.item(), p.grad

    want, grad = one(LocalComm(), slice(None))
    chunk, module._CHUNK = module._CHUNK, 100 if small else module._CHUNK
    try:
        for world in (1, 2, 4):
            out = SimComm.run(world, lambda c: one(c, slice(c.rank, None, c.world)))
            assert np.mean([t for t, _ in out]) == pytest.approx(want, rel=1e-10)
            for r, (_, mine) in enumerate(out):
                torch.testing.assert_close(mine / world, grad[:, :, r::world], rtol=1e-8, atol=1e-12)
    finally:
        module._CHUNK = chunk
