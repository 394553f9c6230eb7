"""One whole step of CR-MoE, float32 as published: on one rank and, with the statistics of all rows, on several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_cl.comm import Comm, LocalComm, SimComm
from moe_cl.config import MoEConfig, OptimConfig
from moe_cl.engine.optim import build, param_groups
from moe_cl.interop.official import Official, split
from moe_cl.losses.balance import balance
from moe_cl.methods import crmoe, routing
from moe_cl.models.build import build_backbone
from tests.conformance.given import ranks_of
from tests.conformance.harness import Check, Golden, Report
from tests.conformance.steps import compare, compared, heads_of, load, vit_options
from tests.plain import Run, batch_of

LOSS, GATE, GRADIENT, STEP = 5e-6, 5e-6, 5.5e-5, 1.5e-6  # 5 times what the specification observed
NOISE = 1e-5  # gradients that are 0 by maths: 1e-6 is float noise of one order or another


class Case:
    """The file's networks, batch and settings."""

    def __init__(self, z: Golden, report: Report):
        self.z, self.start = z, split(z.under("sd/"))
        state = self.start.student
        blocks = sorted({int(k.split(".")[2]) for k in state if ".mlp.router." in k})
        dim, experts = state[f"backbone.blocks.{blocks[0]}.mlp.router.weight"].shape
        hidden = state[f"backbone.blocks.{blocks[0]}.mlp.experts.w1"].shape[1]
        top_k = int((z["q1_gate_layer0"] > 0).sum(-1).max())
        moe = MoEConfig(blocks=blocks, experts=experts, top_k=top_k, hidden_ratio=hidden / dim)
        out_dim, mlp_dim = state["heads.predictor.3.weight"].shape
        self.params = crmoe.Params(
            temperature=float(z["T"]), dim=out_dim, mlp_dim=mlp_dim, balance_weight=float(z["w_lb"]),
            consistency_weight=float(z["w_G"]), alpha=float(z["alpha"]), threshold=float(z["threshold"]),
        )  # fmt: skip
        self.x = [z.tensor(n) for n in ("x1", "x2")]
        self.boxes = torch.stack([z.tensor(n) for n in ("bbox1", "bbox2")])
        patch_trained = any(
            "patch_embed" in str(n) for n in z["requires_grad_names"]
        )  # as the published command had it
        self.options: dict[str, Any] = {"moe": moe, "freeze_patch": not patch_trained}
        self.lr, self.decay = report.assume(z, "lr", 1e-3), report.assume(z, "weight_decay", 0.1)
        want = float(z["loss_cl"])

        def off(heads: int) -> float:
            self.options |= vit_options(state, self.x[0].shape[-1], heads)
            return abs(float(self.step(LocalComm()).metrics["loss/contrastive"]) / want - 1)

        heads = report.fit("heads", heads_of(state), off, LOSS)
        self.options |= vit_options(state, self.x[0].shape[-1], heads)

    def networks(self, comm: Comm) -> Run:
        """Both networks and the method with the published start."""
        method = crmoe.CRMoE(self.params, comm)
        nets = [b(build_backbone("vit", **self.options)) for b in (method.build_student, method.build_teacher)]
        load((method, *nets), self.start)
        return Run(method, *nets, comm)

    def step(self, comm: Comm) -> Run:
        """After one step with AdamW on this rank's rows; ``total`` is its loss."""
        run = self.networks(comm)
        cfg = OptimConfig(weight_decay=self.decay)
        run.optimize(build(param_groups(run.student, cfg), cfg, self.lr))
        rows = slice(comm.rank, None, comm.world)
        batch = batch_of([torch.cat([v[rows] for v in self.x])], self.boxes[:, rows])
        run.total = float(run.step(batch, float(self.z["m"])))
        return run


def step(z: Golden, report: Report) -> None:
    """Every term, all gradients, routing, statistics, EMA and weights."""
    case = Case(z, report)
    weight = float(z["w_lb"])
    base, momentum = _routing(z, report, case)
    # the published total has the teacher's balance in it, a constant without gradient
    report.close("one step", "weighted balance", weight * (base + momentum), z["loss_lb_weighted"], LOSS, floor=1e-9)
    grads = compared(z.under("grad/"))
    for world in dict.fromkeys((1, ranks_of(len(case.x[0])))):
        runs = SimComm.run(world, case.step) if world > 1 else [case.step(LocalComm())]
        at = f"{world} ranks" if world > 1 else "one step"
        metric = {k: np.mean([float(r.metrics[k]) for r in runs]) for k in runs[0].metrics if k.startswith("loss/")}
        report.close(at, "contrastive", metric["loss/contrastive"], z["loss_cl"], LOSS)
        report.close(at, "consistency", metric["loss/consistency"], z["loss_gate_weighted"], LOSS, floor=1e-9)
        balanced = metric["loss/balance"]
        report.close(at, "balance", balanced / weight, z["lb_base_unweighted"], LOSS)
        total = np.mean([r.total for r in runs]) + weight * momentum
        report.close(at, "total", total, z["loss_total"], LOSS)
        _gradients(report, at, runs[0].grads, grads)
        if world == 1:
            trained = compared({str(n): 0 for n in z["requires_grad_names"]})
            report.same(at, "trainable", sorted(runs[0].grads), sorted(trained))
            _after(z, report, runs[0], split(z.under("after/")))
            _weights(z, report, case, runs[0], grads)


def zero_by_maths(name: str, grad: np.ndarray) -> np.ndarray:
    """Entries whose true gradient is 0: the last norm's bias (a batch norm follows), a qkv bias's third of the keys."""
    out = np.full(grad.shape, name.endswith("backbone.norm.bias"))
    if name.endswith("qkv.bias"):
        third = len(grad) // 3
        out[third : 2 * third] = True
    return out


def _gradients(report: Report, at: str, got: Mapping[str, Tensor], want: Mapping[str, np.ndarray]) -> None:
    known = {n: ~zero_by_maths(n, np.asarray(g)) for n, g in want.items()}
    ours = {n: g.numpy() for n, g in got.items()}
    some = {n: keep for n, keep in known.items() if keep.any() and n in ours}
    report.each(at, "gradients", {n: ours[n][keep] for n, keep in some.items()},
                {n: g[known[n]] for n, g in want.items() if known[n].any()}, GRADIENT, floor=1e-6)  # fmt: skip
    report.each(at, "gradients, 0 by maths", {n: ours[n][~k] for n, k in known.items() if n in ours},
                {n: g[~known[n]] for n, g in want.items() if not known[n].all()}, NOISE, absolute=True)  # fmt: skip


def _after(z: Golden, report: Report, run: Run, want: Official) -> None:
    """EMA to the last bit but one, statistics of the batch norms."""
    params = {n for n, _ in run.teacher.module.named_parameters()}
    moved = {n: v for n, v in want.teacher.items() if n in params}
    report.each("one step", "teacher's weights", run.teacher.module.state_dict(), moved, 2e-7, floor=1e-3)
    for n in moved:
        del want.teacher[n]
    compare(report, "one step", run, want, LOSS, floor=2e-2)


def _weights(z: Golden, report: Report, case: Case, run: Run, grads: Mapping[str, np.ndarray]) -> None:
    """AdamW's first step is lr against the gradient's sign, so a gradient of noise says nothing."""
    after, want = run.student.state_dict(), compared(z.under("adamw/"))
    sure = {n: (np.abs(g) > 1e-5 * np.abs(g).max()) & ~zero_by_maths(n, g) for n, g in grads.items()}
    got = {n: after[n].numpy() for n in want if n in after}
    report.each("one step", "after AdamW", {n: v[sure[n]] for n, v in got.items()},
                {n: v[sure[n]] for n, v in want.items()}, STEP, absolute=True)  # fmt: skip
    report.each("one step", "after AdamW, sign open", {n: v[~sure[n]] for n, v in got.items()},
                {n: v[~sure[n]] for n, v in want.items()}, 2 * case.lr + STEP, absolute=True)  # fmt: skip


def _routing(z: Golden, report: Report, case: Case) -> tuple[float, float]:
    """Gate vectors, their balance and consistency a layer, student before and teacher after its EMA; both balances."""
    run, x = case.networks(LocalComm()), torch.cat(case.x)
    batch = batch_of([x], case.boxes)
    with torch.no_grad():
        student = run.method.encode_student(run.student, batch)
        run.teacher.update(float(z["m"]))
        teacher = run.method.encode_teacher(run.teacher, batch)
        metrics = run.method.terms(student, teacher, batch, LocalComm())[1]
    balances = []
    for name, encoded in (("lb_base_unweighted", student), ("lb_momentum_unweighted", teacher)):
        got = balance(routing.balance_sums(encoded, len(case.x[0])), LocalComm())[0]
        report.close("one step", name, got, z[name], LOSS)
        balances.append(float(got))
    sides = {"q": routing.sparse_gates(student, 2, "gated"), "k": routing.sparse_gates(teacher, 2, "gated")}
    for name in (n for n in z if "_gate_layer" in n):
        idx, w, experts = sides[name[0]]
        at, layer = int(name[1]) - 1, int(name.rsplit("layer", 1)[1])
        dense = torch.zeros(*w.shape[2:4], experts).scatter(-1, idx[layer, at], w[layer, at])
        report.close("one step", name, dense, z[name], GATE, absolute=True)
    layers = [float(metrics[f"health/consistency/L{n}"]) for n in range(len(sides["q"][1]))]
    report.close("one step", "consistency a layer", layers, z["gate_loss_per_layer_unweighted"], LOSS)
    return balances[0], balances[1]


CHECKS = {"crmoe_e2e": Check(step, (r"^gate_loss_per_layer_unweighted$", r"^sd/"))}
