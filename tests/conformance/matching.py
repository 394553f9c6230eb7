"""Crop boxes and overlapping patches of CR-MoE: boxes from pixels, patches, overlaps, best partners, valid matches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_cl.views import crops
from moe_cl.views.draw import ViewParams
from tests.conformance.harness import Check, Golden, Report

IOU = 3e-5  # 5 times the specification's 6e-6
TIE = 1e-5  # overlaps nearer than this may be ordered either way in float32
TOUCH = 1e-6  # edges nearer than this may overlap or not


def match(z: Golden, report: Report) -> None:
    """Every grid of the file, random pairs and edge cases."""
    for view, first in ((1, 2), (2, 7)):
        boxes = []
        for row in z["raw_crops"].astype(float).tolist():
            (width, height), (x, y, w, h, flip) = row[:2], row[first : first + 5]
            boxes.append(ViewParams(0, "bilinear", y, x, h, w, height, width, bool(flip), ()).box)
        report.close("crops", f"boxes {view}", boxes, z[f"bbox{view}"], 1e-6, True)
    threshold = float(z["threshold"])
    for prefix in z.cases(r"((?:edge_)?g\d+)_idx1$"):
        kind = "edge_" if prefix.startswith("edge_") else ""
        boxes = [z.tensor(f"{kind}bbox{v}") for v in (1, 2)]
        grid = int(prefix.rsplit("g", 1)[1])
        for v in (1, 2):
            _direction(z, report, prefix, v, boxes, grid, threshold)
        if kind and "edge_names" in z:
            report.same(prefix, "cases", len(crops.match(*boxes, grid, threshold)[0]), len(z["edge_names"]))


def overlaps(boxes1: Tensor, boxes2: Tensor, g: int, grown: float = 0.0) -> Tensor:
    """(n, P, P) IoU of all patches, from the edges and overlaps that ``crops.match`` works on; view 1 ``grown``."""
    x, y = ([_edges(b, axis, g) for b in (boxes1, boxes2)] for axis in (0, 1))
    grow = torch.tensor([-grown, grown])
    along_x, along_y = crops._overlap(x[0] + grow, x[1]), crops._overlap(y[0] + grow, y[1])
    shared = (along_y[:, :, None, :, None] * along_x[:, None, :, None, :]).flatten(3).flatten(1, 2)
    total = (boxes1[:, 2] * boxes1[:, 3] + boxes2[:, 2] * boxes2[:, 3])[:, None, None] / g**2
    return shared / (total - shared)


def _edges(boxes: Tensor, axis: int, g: int) -> Tensor:
    return crops._edges(boxes, axis, g, None if axis else boxes[:, 4] > 0.5)


def patches(boxes: Tensor, g: int) -> Tensor:
    """(n, P, 4) x0, y0, x1, y1 of every patch."""
    x, y = _edges(boxes, 0, g), _edges(boxes, 1, g)
    x, y = x[:, None].expand(-1, g, -1, -1), y[:, :, None].expand(-1, -1, g, -1)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1).flatten(1, 2)


def _direction(z: Golden, report: Report, at: str, view: int, boxes: list[Tensor], g: int, threshold: float) -> None:
    """From the patches of ``view`` to those of the other."""
    idx, valid = (t.numpy() for t in crops.match(*boxes, g, threshold)[2 * view - 2 : 2 * view])
    iou = overlaps(*boxes, g)
    iou = iou if view == 1 else iou.mT
    top = iou.topk(min(2, iou.shape[2]), 2).values
    best = z[f"{at}_maxiou{view}"]
    report.close(at, f"best overlap {view}", top[..., 0], best, IOU, True)
    # the overlap of the partner we take, and of the file's, is the best there is, whichever of several equal ones it is
    index = z[f"{at}_idx{view}"].astype(np.int64)
    for whose, chosen in (("our", idx), ("the file's", index)):
        mine = iou.gather(2, torch.from_numpy(chosen)[..., None])[..., 0]
        report.close(at, f"overlap {view}, {whose} partner", mine, best, IOU, True)
    if f"{at}_margin{view}" in z:
        margin = z[f"{at}_margin{view}"]
        report.close(at, f"margins {view}", top[..., 0] - top[..., -1], margin, 2 * IOU, True)
        sure = z[f"{at}_mask{view}"] & (margin > TIE)
        report.same(at, f"partners {view}", idx[sure], index[sure])
    none = (best == 0) & (top[..., 0].numpy() == 0)
    report.same(at, f"partners {view} of none", idx[none], index[none])
    clear = np.abs(best - threshold) > TIE
    report.same(at, f"valid {view}", valid[clear], z[f"{at}_mask{view}"][clear])
    for name, t in [("", threshold), *((f"_thr{t}", float(t)) for t in z.cases(rf"{at}_nmatch{view}_thr(.+)$"))]:
        if f"{at}_nmatch{view}{name}" not in z:
            continue
        count = crops.match(*boxes, g, t)[2 * view - 1].sum(1).numpy()
        if t == 0:  # edges that touch
            near = overlaps(*boxes, g, TOUCH)
            unsure = ((near if view == 1 else near.mT).amax(2).numpy() > 0) & (best < TIE)
        else:
            unsure = np.abs(best - t) <= TIE
        off = np.abs(count - z[f"{at}_nmatch{view}{name}"]) - unsure.sum(1)
        report.close(at, f"matches {view}{name}", max(off.max(), 0), 0, 0.0, True)
    for end in ("", "_first6"):
        if f"{at}_iou{end}" in z and view == 1:
            want = z[f"{at}_iou{end}"]
            report.close(at, "overlaps", iou[: len(want)], want, IOU, True)
        if f"{at}_patch_xyxy{view}{end}" in z:
            want = z[f"{at}_patch_xyxy{view}{end}"]
            report.close(at, f"patches {view}", patches(boxes[view - 1][: len(want)], g), want, IOU, True)


CHECKS = {"crmoe_match": Check(match, (r"^raw_crops$", r"_idx1$"))}
