"""CR-MoE's routing: gates, balance, patch matching, consistency, the contrastive loss, the MoE layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_cl.comm import Comm, LocalComm, SimComm
from moe_cl.config import MoEConfig
from moe_cl.losses.balance import balance, cv2, expert_sums
from moe_cl.losses.consistency import Match, as_sparse, consistency
from moe_cl.losses.info_nce import contrastive, gather_keys
from moe_cl.moe.experts import SparseMLP
from moe_cl.moe.router import Router, Routing
from moe_cl.moe.shazeer import ShazeerRouter
from moe_cl.views import crops
from tests.conformance.harness import Golden, Report

SURE = 1e-6  # top-k margins below this are ties


def routed(router: Router, x: Tensor, noise: Tensor | None, train: bool) -> Routing:
    """Routing of (n, D) rows, each a row of one token, with the file's noise in the place of ours."""
    router.train(train)
    if noise is not None:
        router._noise = lambda *_: noise.view(len(x), 1, -1)
    return router(x[:, None])


def dense(routing: Routing) -> Tensor:
    """Sparse gate vectors (n, E)."""
    n, _, k = routing.weights.shape
    return torch.zeros(n, routing.experts).scatter(1, routing.indices.view(n, k), routing.weights.view(n, k))


def aux(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """Balance of all rows as one view, its sums (2, E) and its two parts."""
    sums = expert_sums(routing.indices, routing.weights, routing.experts, routing.load)
    loss, parts = balance(sums[None, None], LocalComm())
    return loss, sums.sum(0), parts[0, 0]


def gate(z: Golden, report: Report) -> None:
    """Every case in every mode: choices, weights, gate vectors, balance and its gradient; both forms of the load."""
    for case in z.cases(r"([A-Z]+)_x$"):
        x, w, k = z.tensor(f"{case}_x"), z.tensor(f"{case}_w_gate"), int(z[f"{case}_top_k"])
        for mode in z.cases(rf"{case}_(eval|train\d+)_topk_idx"):
            _gate_mode(z, report, case, mode, x, w, k)
        _shazeer(z, report, case, x, w, k)
        if f"{case}_accum2_aux_loss" in z:
            router = vmoe(w, k, 0.0, "published")
            total = sum(aux(routed(router, part, None, True))[0] for part in x.chunk(2))
            report.close(case, "two views", total, z[f"{case}_accum2_aux_loss"], 2.5e-6)


def vmoe(w: Tensor, k: int, noise_std: float, load: str) -> Router:
    """A router with the file's weight."""
    router = Router(w.shape[0], MoEConfig(experts=w.shape[1], top_k=k, noise_std=noise_std, load=load))
    router.weight.data.copy_(w)
    return router


def _gate_mode(z: Golden, report: Report, case: str, mode: str, x: Tensor, w: Tensor, k: int) -> None:
    at, name = f"{case}_{mode}_", f"{case} {mode}"
    train, std = bool(z[at + "train"]), float(z[at + "noise_std_cfg"])
    noise = z.tensor(at + "noise") if at + "noise" in z else None
    router = vmoe(w, k, std, "published")
    sigma = router.noise_std / router.experts if train else 0.0
    report.close(name, "sigma", sigma, z[at + "noise_stddev"], 1e-6)
    routing = routed(router, x, noise, train)
    sure = z[at + "tie_margin"] > SURE
    report.same(name, "choices", routing.indices[:, 0].numpy()[sure], z[at + "topk_idx"][sure])
    report.close(name, "weights", routing.weights[:, 0], z[at + "topk_w"], 5e-6, absolute=True)
    report.close(name, "gate vectors", dense(routing), z[at + "activation"], 5e-6, absolute=True)
    report.close(name, "softmax", routing.probabilities[:, 0], z[at + "softmax_activation"], 5e-6, absolute=True)
    if not train:
        return
    loss, sums, parts = aux(routing)
    loss.backward()
    report.close(name, "importance", sums[0], z[at + "importance"], 2.5e-6)
    report.close(name, "load", sums[1], z[at + "load"], 2.5e-6)
    report.close(name, "cv2 importance", parts[0], z[at + "cv2_importance"], 5e-6)
    report.close(name, "cv2 load", parts[1], z[at + "cv2_load"], 5e-6)
    report.close(name, "balance", loss, z[at + "aux_loss"], 5e-6)
    report.close(name, "gradient", router.weight.grad, z[at + "grad_w_gate_aux"], 5e-5)
    if noise is not None:
        report.close(name, "load a token", routing.load, z[at + "load_prob"], 1.1e-4, absolute=True)
        right = vmoe(w, k, std, "corrected")
        routing = routed(right, x, noise, train)
        load = routing.load.sum(0)
        cv2(load).backward()
        report.close(name, "corrected load a token", routing.load, z[at + "fixed_load_prob"], 1.1e-4, absolute=True)
        report.close(name, "corrected load", load, z[at + "fixed_load"], 2.5e-6)
        report.close(name, "corrected cv2", cv2(load), z[at + "fixed_cv2_load"], 2e-5)
        report.close(name, "corrected gradient", right.weight.grad, z[at + "fixed_grad_w_gate_cv2_load"], 5e-5)


def _shazeer(z: Golden, report: Report, case: str, x: Tensor, w: Tensor, k: int) -> None:
    for mode in z.cases(rf"{case}_shz_(\w+?)_topk_idx"):
        at, name = f"{case}_shz_{mode}_", f"{case} shazeer {mode}"
        router = ShazeerRouter(w.shape[0], MoEConfig(experts=w.shape[1], top_k=k))
        router.weight.data.copy_(w)
        noise = None
        if mode == "train":
            router.noise_weight.data.copy_(z.tensor(at + "w_noise"))
            noise = z.tensor(at + "noise")
        routing = routed(router, x, noise, mode == "train")
        report.same(name, "choices", routing.indices[:, 0], z[at + "topk_idx"])
        report.close(name, "weights", routing.weights[:, 0], z[at + "topk_w"], 5e-6, absolute=True)
        # its gate vector is the noisy logits; here their softmax is kept
        want = torch.from_numpy(z[at + "activation"]).softmax(-1)
        report.close(name, "softmax of logits", routing.probabilities[:, 0], want, 5e-6, absolute=True)
        if mode == "train":
            report.close(name, "balance", aux(routing)[0], z[at + "aux_loss"], 2e-5)


def match(z: Golden, report: Report) -> None:
    """Boxes from pixels, patches, best partners, valid matches at every threshold."""
    raw = z["raw_crops"].astype(np.float64)
    for view, first in ((1, 2), (2, 7)):
        size = np.stack([raw[:, 0], raw[:, 1], raw[:, 0], raw[:, 1]], 1)
        boxes = np.concatenate([raw[:, first : first + 4] / size, raw[:, first + 4 : first + 5]], 1)
        report.close("crops", f"boxes {view}", boxes, z[f"bbox{view}"], 1e-6, absolute=True)
    report.same("edge", "cases", len(z["edge_names"]), len(z["edge_bbox1"]))
    threshold = float(z["threshold"])
    for prefix in z.cases(r"((?:edge_)?g\d+)_idx1"):
        kind = "edge_" if prefix.startswith("edge_") else ""
        boxes = [z.tensor(f"{kind}bbox{v}") for v in (1, 2)]
        _match_grid(z, report, prefix, boxes, int(prefix.rsplit("g", 1)[1]), threshold)


def _match_grid(z: Golden, report: Report, at: str, boxes: list[Tensor], g: int, threshold: float) -> None:
    out = crops.match(*boxes, g, threshold)
    for view in (1, 2):
        idx, valid = (t.numpy() for t in out[2 * view - 2 : 2 * view])
        mask, best = z[f"{at}_mask{view}"], z[f"{at}_maxiou{view}"]
        sure = mask & (z[f"{at}_margin{view}"] > 1e-5)
        report.same(at, f"partners {view}", idx[sure], z[f"{at}_idx{view}"][sure])
        clear = np.abs(best - threshold) > 1e-5
        report.same(at, f"valid {view}", valid[clear], mask[clear])
        off = np.abs(valid.sum(1) - z[f"{at}_nmatch{view}"]) - (~clear).sum(1)
        report.close(at, f"matches {view}", max(off.max(), 0), 0, 0.0, absolute=True)
        # the overlap of the partner we take is the best there is, whichever of several equal ones it is
        for name in (f"{at}_iou", f"{at}_iou_first6"):
            if name in z:
                iou = z[name] if view == 1 else z[name].swapaxes(1, 2)
                mine = np.take_along_axis(iou, idx[: len(iou), :, None], 2)[..., 0]
                report.close(at, f"overlap {view}", mine, best[: len(iou)], 3e-5, absolute=True)
        for t in z.cases(rf"{at}_nmatch{view}_thr(.+)"):
            count = crops.match(*boxes, g, float(t))[2 * view - 1].sum(1).numpy()
            off = np.abs(count - z[f"{at}_nmatch{view}_thr{t}"])
            report.close(at, f"matches {view} at {t}", off.mean(), 0, 0.05 if float(t) else 1.0, absolute=True)
        for name in (f"{at}_patch_xyxy{view}", f"{at}_patch_xyxy{view}_first6"):
            if name in z:
                report.close(
                    at, f"patches {view}", patches(boxes[view - 1], g, len(z[name])), z[name], 3e-5, absolute=True
                )


def patches(boxes: Tensor, g: int, count: int) -> Tensor:
    """(n, P, 4) x0, y0, x1, y1 of the first ``count`` views' patches, from the edges that ``crops.match`` works on."""
    boxes = boxes[:count]
    x, y = crops._edges(boxes, 0, g, boxes[:, 4] > 0.5), crops._edges(boxes, 1, g)
    x, y = x[:, None].expand(-1, g, -1, -1), y[:, :, None].expand(-1, -1, g, -1)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1).flatten(1, 2)


def _gates(z: Golden, kind: str, rows: slice = slice(None)) -> tuple[Any, ...]:
    """Indices and values of both sides, and the student's leaves."""
    z_q = [z.tensor(f"z_{n}")[rows].requires_grad_() for n in ("q1", "q2")]
    sides = []
    for x in (z_q, [z.tensor(f"z_{n}")[rows] for n in ("k1", "k2")]):
        p = torch.stack(x).softmax(-1)[None]
        if kind == "softmax":
            sides += as_sparse(p)
        else:
            w, i = p.topk(int((z["gated_act_q1"][0, 0] > 0).sum()))
            sides += [i, w]
    return *sides, z_q


def _overlap(z: Golden, threshold: float, rows: slice = slice(None)) -> Match:
    grid = math.isqrt(z["z_q1"].shape[1] - 1)
    return Match(*crops.match(z.tensor("bbox1")[rows], z.tensor("bbox2")[rows], grid, threshold))


def gate_consistency(z: Golden, report: Report) -> None:
    """Every kind of gate vector and form of the loss, thresholds and weights, gradients, and no overlap at all."""
    experts, recipe = z["z_q1"].shape[-1], _overlap(z, 0.2)
    report.same("match", "valid 1", int(recipe.valid1.sum()), int(z["nvalid1"]))
    report.same("match", "valid 2", int(recipe.valid2.sum()), int(z["nvalid2"]))
    i, w = _gates(z, "gated")[:2]
    for v in (0, 1):
        vectors = torch.zeros(w.shape[2:4] + (experts,)).scatter(-1, i[0, v], w[0, v].detach())
        report.close("gated", f"vectors q{v + 1}", vectors, z[f"gated_act_q{v + 1}"], 5e-6, absolute=True)
    i, w = _gates(z, "gated")[2:4]
    for v in (0, 1):
        vectors = torch.zeros(w.shape[2:4] + (experts,)).scatter(-1, i[0, v], w[0, v])
        report.close("gated", f"vectors k{v + 1}", vectors, z[f"gated_act_k{v + 1}"], 5e-6, absolute=True)
    for kind in z.cases(r"(\w+)_loss_clsonly"):

        def loss(match: Match | None, alpha: float = 0.3, kind: str = kind, **more: Any) -> tuple[Tensor, list[Tensor]]:
            *sides, leaves = _gates(z, kind)
            return consistency(*sides, experts, LocalComm(), match, 0.2, alpha, **more)[0], leaves

        for name in z.cases(rf"{kind}_loss_iou_(a[\d.]+_t[\d.]+)"):
            alpha, threshold = (float(v[1:]) for v in name.split("_"))
            total, leaves = loss(_overlap(z, threshold), alpha)
            report.close(kind, name, total, z[f"{kind}_loss_iou_{name}"], 2e-6)
            if name == "a0.3_t0.2":
                total.backward()
                for q, leaf in zip(("q1", "q2"), leaves, strict=True):
                    want = z[f"{kind}_grad_z_{q}"]
                    report.close(kind, f"gradient {q}", leaf.grad, want, 1e-5, floor=1e-12)
        forms = {"clsonly": "cls", "iou_simmode": "similarity", "esvit": "nearest", "pool": "pool"}
        for name, mode in forms.items():
            if f"{kind}_loss_{name}" in z:
                got = loss(recipe, mode=mode)[0]
                report.close(kind, mode, got, z[f"{kind}_loss_{name}"], 1e-5 if mode == "nearest" else 2e-6)
        # one direction, one kind of token at a time: the others' validity or weight is taken away
        for way, (first, second) in {"q1k2": (True, False), "q2k1": (False, True)}.items():
            part = Match(recipe.idx1, recipe.valid1 & first, recipe.idx2, recipe.valid2 & second)
            report.close(kind, f"patches {way}", loss(part, 1.0)[0], z[f"{kind}_patch_{way}"], 2e-6)
        cls = z[f"{kind}_cls_q1k2"] + z[f"{kind}_cls_q2k1"]
        report.close(kind, "cls", loss(None)[0], cls, 2e-6)
        nothing = Match(recipe.idx1, recipe.valid1 & False, recipe.idx2, recipe.valid2 & False)
        report.close(kind, "no overlap", loss(nothing)[0], 0.7 * cls, 2e-6)  # nan in the published code
        report.same(kind, "no overlap, published", bool(np.isnan(z[f"{kind}_loss_nomatch_ref"])), True)


def moco_loss(z: Golden, report: Report) -> None:
    """The symmetric contrastive loss, float32."""
    for t in z.cases(r"T([\d.]+)_loss_sym"):
        q1, q2 = (z.tensor(n).requires_grad_() for n in ("q1", "q2"))
        g1, g2 = gather_keys(z.tensor("k1"), z.tensor("k2"), comm=LocalComm())
        one, two = contrastive(q1, g2, float(t)).loss, contrastive(q2, g1, float(t)).loss
        (one + two).backward()
        values = {"loss_q1k2": one, "loss_q2k1": two, "loss_sym": one + two}
        for name, value in values.items():
            report.close(f"T{t}", name, value, z[f"T{t}_{name}"], 1e-6)
        for name, leaf in (("grad_q1", q1), ("grad_q2", q2)):
            report.close(f"T{t}", name, leaf.grad, z[f"T{t}_{name}"], 5e-6, floor=1e-12)


def world2(z: Golden, report: Report) -> None:
    """Two ranks of the consistency and contrastive files of the same folder, statistics per rank as published."""
    gates, pairs = z.sibling("crmoe_consistency"), z.sibling("crmoe_moco")
    experts = gates["z_q1"].shape[-1]

    def half(comm: Comm, n: int) -> slice:
        return slice(comm.rank * n // comm.world, (comm.rank + 1) * n // comm.world)

    def rank(comm: Comm) -> dict[str, Any]:
        rows = half(comm, len(gates["bbox1"]))
        *sides, _ = _gates(gates, "gated", rows)
        match = _overlap(gates, 0.2, rows)
        total = consistency(*sides, experts, comm, match, statistics="published")[0]
        rows = half(comm, len(pairs["q1"]))
        q1, q2, k1, k2 = (pairs.tensor(n)[rows] for n in ("q1", "q2", "k1", "k2"))
        q1.requires_grad_()
        g1, g2 = gather_keys(k1, k2, comm=comm)
        loss = contrastive(q1, g2, 0.2, comm.rank).loss + contrastive(q2, g1, 0.2, comm.rank).loss
        loss.backward()
        return {"gate_loss": total, "moco_loss": loss, "moco_grad_q1": q1.grad}

    world = len(z.cases(r"gate_loss_rank(\d+)"))
    for r, values in enumerate(SimComm.run(world, rank)):
        for name, value in values.items():
            tolerance = 5e-6 if "grad" in name else 2e-6
            report.close(f"rank {r}", name, value, z[f"{name}_rank{r}"], tolerance, floor=1e-12)


def layer(z: Golden, report: Report) -> None:
    """Forward and all gradients of the MoE layer, in every mode, on one rank and with the experts over two."""
    w = z.tensor("w_gate")
    weights = {"w1": "htoh4_weight", "b1": "htoh4_bias", "w2": "h4toh_weight", "b2": "h4toh_bias"}
    experts, hidden, dim = z["htoh4_weight"].shape
    x, r = z.tensor("x"), z.tensor("r")

    def one(comm: Comm, mode: str) -> None:
        noise = z.tensor(f"{mode}_noise") if f"{mode}_noise" in z else None
        train = mode.startswith("train")
        std = float(mode.removeprefix("train")) if train else 0.0
        moe = MoEConfig(experts=experts, hidden_ratio=hidden / dim, noise_std=std, load="published")
        net = SparseMLP(dim, moe, comm=comm).train(train)
        mine = slice(comm.rank * experts // comm.world, (comm.rank + 1) * experts // comm.world)
        net.router.weight.data.copy_(w)
        for name, theirs in weights.items():
            getattr(net.experts, name).data.copy_(z.tensor(theirs)[mine])
        if noise is not None:
            net.router._noise = lambda *_: noise.view(*x.shape[:2], -1)
        mine_x = x.clone().requires_grad_()
        y, routing = net(mine_x)
        (y * r).sum().backward()
        case = f"{mode}, {comm.world} ranks, rank {comm.rank}"
        report.close(case, "y", y, z[f"{mode}_y"], 3.5e-6, absolute=True)
        if f"{mode}_aux_loss" in z:
            flat = Routing(routing.indices.flatten(0, 1)[:, None], routing.weights.flatten(0, 1)[:, None], experts)
            if routing.load is None:
                report.close(case, "balance", aux(flat)[0], z[f"{mode}_aux_loss"], 5e-6)
            else:
                sums = expert_sums(routing.indices, routing.weights, experts, routing.load)
                report.close(case, "balance", balance(sums[None, None], LocalComm())[0], z[f"{mode}_aux_loss"], 5e-6)
        report.close(case, "gradient x", mine_x.grad, z[f"{mode}_grad_x"], 2e-5)
        report.close(case, "gradient w_gate", net.router.weight.grad, z[f"{mode}_grad_w_gate"], 2e-5)
        for name, theirs in weights.items():
            grad = getattr(net.experts, name).grad / comm.world  # every rank had the same rows
            report.close(case, f"gradient {theirs}", grad, z[f"{mode}_grad_{theirs}"][mine], 2e-5)

    for mode in z.cases(r"(\w+)_y$"):
        run: Callable[[Comm], None] = lambda comm, mode=mode: one(comm, mode)  # noqa: E731
        run(LocalComm())
        SimComm.run(2, run)


CHECKS = {
    "crmoe_gate": gate,
    "crmoe_match": match,
    "crmoe_consistency": gate_consistency,
    "crmoe_moco": moco_loss,
    "crmoe_world*": world2,
    "crmoe_moelayer": layer,
}
