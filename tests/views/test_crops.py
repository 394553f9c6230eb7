"""Patch matching against values recorded from the published code, and against an explicit IoU matrix."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.views.crops import match

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "crmoe_match.npz")


def check(boxes1, boxes2, grid, prefix, threshold):
    found = match(torch.from_numpy(boxes1), torch.from_numpy(boxes2), grid, threshold)
    for side, index, valid in ((1, *found[:2]), (2, *found[2:])):
        mask, iou, margin = (GOLDEN[f"{prefix}_{name}{side}"] for name in ("mask", "maxiou", "margin"))
        clear = np.abs(iou - threshold) > 1e-5
        assert (valid.numpy() == mask)[clear].all() and clear.mean() > 0.95
        certain = mask & (margin > 1e-5)
        assert (index.numpy() == GOLDEN[f"{prefix}_idx{side}"])[certain].all() and certain.any()


@pytest.mark.parametrize("grid", [4, 14])
def test_published_matches(grid):
    check(GOLDEN["bbox1"], GOLDEN["bbox2"], grid, f"g{grid}", float(GOLDEN["threshold"]))


@pytest.mark.parametrize("grid", [4, 14])
def test_published_edge_cases(grid):
    check(GOLDEN["edge_bbox1"], GOLDEN["edge_bbox2"], grid, f"edge_g{grid}", float(GOLDEN["threshold"]))


@pytest.mark.parametrize("threshold", ["0.1", "0.3", "0.5"])
def test_published_counts_at_other_thresholds(threshold):
    boxes = [torch.from_numpy(GOLDEN[f"bbox{v}"]) for v in (1, 2)]
    _, valid1, _, valid2 = match(*boxes, 14, float(threshold))
    for valid, side in ((valid1, 1), (valid2, 2)):
        difference = valid.sum(1).numpy() - GOLDEN[f"g14_nmatch{side}_thr{threshold}"]
        assert np.abs(difference).max() <= 14 and (difference == 0).mean() > 0.97


def explicit(box1, box2, grid, threshold):
    """The IoU matrix itself, in float64."""
    patches = []
    for x, y, w, h, flip in (box1, box2):
        places = [(r, grid - 1 - c if flip else c) for r in range(grid) for c in range(grid)]
        patches.append([(x + c * w / grid, y + r * h / grid, w / grid, h / grid) for r, c in places])
    iou = np.zeros((grid**2, grid**2))
    for i, (ax, ay, aw, ah) in enumerate(patches[0]):
        for j, (bx, by, bw, bh) in enumerate(patches[1]):
            shared = max(0, min(ax + aw, bx + bw) - max(ax, bx)) * max(0, min(ay + ah, by + bh) - max(ay, by))
            iou[i, j] = shared / (aw * ah + bw * bh - shared)
    return iou


unit = st.floats(0.0, 0.5)
side = st.floats(0.05, 0.5)
boxes = st.tuples(unit, unit, side, side, st.sampled_from([0.0, 1.0]))


@settings(max_examples=40, deadline=None)
@given(boxes, boxes, st.integers(1, 5), st.sampled_from([0.0, 0.2, 0.5]))
def test_best_partner_is_a_maximum_of_the_iou_matrix(box1, box2, grid, threshold):
    iou = explicit(box1, box2, grid, threshold)
    tensors = [torch.tensor([box], dtype=torch.float64) for box in (box1, box2)]
    idx1, valid1, idx2, valid2 = (t[0].numpy() for t in match(*tensors, grid, threshold))
    rows = np.arange(grid**2)
    for index, valid, values in ((idx1, valid1, iou), (idx2, valid2, iou.T)):
        best = values.max(1)
        assert np.allclose(values[rows, index], best, atol=1e-9)
        clear = np.abs(best - threshold) > 1e-9
        assert (valid == (best > threshold))[clear].all()


def test_every_row_of_a_batch_is_its_own_image():
    one = torch.rand(6, 5) * 0.5
    two = torch.rand(6, 5) * 0.5
    whole = match(one, two, 7)
    for b in range(6):
        for a, c in zip(match(one[b : b + 1], two[b : b + 1], 7), whole, strict=True):
            assert torch.equal(a[0], c[b])
