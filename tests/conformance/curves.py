"""Pieces without a network: EMA, LARS, schedules of MoCo, JCL and CR-MoE, position embedding."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_cl.config import OptimConfig, ScheduleConfig, TeacherConfig
from moe_cl.engine import schedules
from moe_cl.engine.optim import LARS
from moe_cl.engine.teacher import Teacher
from moe_cl.evals.sweep import PROTOCOLS, Sweep
from moe_cl.losses.jcl import ramp
from moe_cl.models.vit import sincos
from tests.conformance.given import module_of
from tests.conformance.harness import Check, Golden, Report

EXACT = 1e-12


def ema(z: Golden, report: Report) -> None:
    """Parameters move, buffers do not."""
    for tag in z.cases(r"(.+)/m$"):
        student, start = module_of(z.under(f"{tag}/q/")), module_of(z.under(f"{tag}/k0/"))
        state = {k: v.clone() for k, v in start.state_dict().items()}
        teacher = Teacher(start, student, contextlib.nullcontext)
        teacher.module.load_state_dict(state)  # a Teacher starts as a copy; the file's does not
        for step in sorted(map(int, z.cases(rf"{re.escape(tag)}/k([1-9]\d*)/"))):
            teacher.update(float(z[f"{tag}/m"]))
            report.each(tag, f"teacher {step}", teacher.module.state_dict(), z.under(f"{tag}/k{step}/"), 1e-9)


def moco_schedules(z: Golden, report: Report) -> None:
    """Learning rate and momentum of MoCo v3 an iteration, of v1/v2 an epoch, the probes' and JCL's ramp."""
    for case in z.cases(r"(.+)/iter$"):
        a = z.under(f"{case}/")
        n, epochs = int(a["iters_per_epoch"]), float(a["epochs"])
        peak = schedules.scaled_lr(OptimConfig(base_lr=float(a["base_lr"])), int(a["batch"]))
        cfg, teacher = ScheduleConfig(epochs=epochs, warmup_epochs=float(a["warmup"])), TeacherConfig(float(a["m0"]))
        report.close(case, "peak", peak, a["scaled_lr"], EXACT, absolute=True)
        # by iteration, and at the fractional epochs that the file says these are
        for name, at, per in (("iteration", a["iter"], n), ("epoch", a["frac_epoch"], 1)):
            lr = [schedules.learning_rate(i, per, peak, cfg) for i in at.tolist()]
            report.close(case, f"lr by {name}", lr, a["lr"], EXACT, floor=peak)
            m = [schedules.teacher_momentum(i, per, teacher, epochs) for i in at.tolist()]
            report.close(case, f"momentum by {name}", m, a["moco_m"], EXACT)
    for case in z.cases(r"(.+)/milestones$"):
        a = z.under(f"{case}/")
        stones, kind = [int(m) for m in a["milestones"]], "cosine" if a["cos"] else "step"
        cfg = ScheduleConfig(int(a["epochs"]), kind=kind, per="epoch", milestones=stones)
        lr = [schedules.learning_rate(e * 3 + 1, 3, float(a["base_lr"]), cfg) for e in range(int(a["epochs"]))]
        report.close(case, "lr", lr, a["lr_per_epoch"], EXACT)
    for case in z.cases(r"(lincls_\w+)/lr_per_epoch"):
        _probe(z, report, case)
    if "jcl_ratio_per_epoch" in z:
        ratio, weight = z["jcl_ratio_per_epoch"], float(z["jcl_lambda"])
        report.close("jcl", "ramp", [ramp(weight, e, len(ratio)) for e in range(len(ratio))], ratio, EXACT)


def _probe(z: Golden, report: Report, case: str) -> None:
    """Learning rates of a linear probe by its protocol; the file has the base rate of MoCo v3's."""
    want = z[f"{case}/lr_per_epoch"]
    protocol = replace(PROTOCOLS["mocov2" if "v12" in case else "mocov3_resnet"], epochs=len(want))
    base = float(z[f"{case}/base_lr"]) if f"{case}/base_lr" in z else protocol.lrs[0]
    if f"{case}/base_lr" not in z:
        report.suppose(f"{case}: base lr {base:g}")
    if protocol.scale:
        protocol = replace(protocol, batch=report.assume(z, f"{case}/batch", protocol.batch))
    scaling = "linear" if protocol.scale else "none"
    peak = schedules.scaled_lr(OptimConfig(base_lr=base, lr_scaling=scaling), protocol.batch)
    sweep, lr = Sweep(protocol, 1, 1, steps_per_epoch=1), []
    for epoch in range(len(want)):
        sweep.step_number = epoch
        lr.append(peak * sweep.factor())
    report.close(case, "lr", lr, want, EXACT)


def crmoe_schedules(z: Golden, report: Report) -> None:
    """CR-MoE's learning rate and momentum at fractional epochs of runs of any length."""
    published = {100: 1024, 300: 3072}  # epochs -> batch (crmoe.md 2.4)
    for e in map(int, z.cases(r"ep(\d+)_epoch$")):
        at, want, momenta = (z[f"ep{e}_{n}"] for n in ("epoch", "lr", "m"))
        case, warmup = f"ep{e}", report.assume(z, f"ep{e}_warmup", 40.0)
        base = report.assume(z, "base_lr", 5e-4)
        cfg = ScheduleConfig(e, warmup_epochs=min(warmup, e))
        if f"ep{e}_batch" in z or e in published:
            peak = schedules.scaled_lr(OptimConfig(base_lr=base), report.assume(z, f"ep{e}_batch", published.get(e, 0)))
        else:  # no paper's run: the peak that the largest rate of the file stands for
            top = int(np.argmax(want))
            peak = float(want[top]) / schedules.learning_rate(at[top], 1, 1.0, cfg)
            report.suppose(f"{case} batch {peak / base * 256:g} fits")
        report.close(case, "lr", [schedules.learning_rate(x, 1, peak, cfg) for x in at], want, EXACT)
        teacher = TeacherConfig(report.assume(z, f"ep{e}_m0", 0.99))
        m = [schedules.teacher_momentum(x, 1, teacher, e) for x in at]
        report.close(case, "momentum", m, momenta, EXACT)


def lars(z: Golden, report: Report) -> None:
    """Steps on tensors of every kind: matrices, vectors, a scalar, zero norms, no gradient."""
    for tag in dict.fromkeys(z.cases(r"([^/]+)/p0/")):
        a = z.under(f"{tag}/")
        start = z.under(f"{tag}/p0/")
        params = {n: torch.nn.Parameter(torch.from_numpy(np.array(v))) for n, v in start.items()}
        options = [float(a[k]) for k in ("lr", "weight_decay", "momentum", "trust_coefficient")]
        optimizer = LARS(list(params.values()), *options)
        for s in sorted(map(int, z.cases(rf"{re.escape(tag)}/g(\d+)/"))):
            for n, p in params.items():
                p.grad = torch.from_numpy(np.array(a[f"g{s}/{n}"])) if f"g{s}/{n}" in a else None
            optimizer.step()
            after, mu = z.under(f"{tag}/p{s + 1}/"), z.under(f"{tag}/mu{s + 1}/")
            report.each(tag, f"weights {s}", {n: p.detach() for n, p in params.items()}, after, 1e-9)
            state = {n: _momentum(optimizer.state[p]) for n, p in params.items() if n in mu}
            report.each(tag, f"momentum {s}", state, mu, 1e-9)


def _momentum(state: Mapping[str, Any]) -> Tensor:
    return next(v for v in state.values() if isinstance(v, Tensor))


def position(z: Golden, report: Report) -> None:
    """The sin-cos table of each grid."""
    for name in z.cases(r"(.+)/shape$"):
        a = z.under(f"{name}/")
        length, dim = (int(v) for v in np.ravel(a["shape"])[-2:])
        side = math.isqrt(length - 1)
        grid = re.search(r"(\d+)x(\d+)", name)
        rows, cols = (int(v) for v in grid.groups()) if grid else (side, side)
        table = sincos(dim, rows, cols)[0]
        report.same(name, "shape", table.shape[-2:], (length, dim))
        places = {"cls_row": 0, "first_patch_r0c0": 1, "patch_r0c1": 2, "patch_r1c0": 1 + cols, "last_patch": -1}
        for part, at in places.items():
            if part in a:
                report.close(name, part, table[at], a[part].reshape(-1), 1e-6, absolute=True)
        if "full" in a:
            report.close(name, "full", table, a["full"].reshape(table.shape), 1e-6, absolute=True)
        for part, dims in (("row_sums", 1), ("col_sums", 0)):
            if part in a:
                report.close(name, part, table.double().sum(dims), a[part].reshape(-1), 1e-4, absolute=True)


CHECKS = {
    "moco_v12_ema": Check(ema, (r"^[^/]+/m$", r"/k0/")),
    "moco_schedules": Check(moco_schedules, (r"/iters_per_epoch$|/lr_per_epoch$|^jcl_ratio_per_epoch$",)),
    "moco_lars": Check(lars, (r"/trust_coefficient$", r"/p0/")),
    "moco_sincos": Check(position, (r"/shape$", r"/cls_row$|/full$")),
    "crmoe_sched": Check(crmoe_schedules, (r"^ep\d+_epoch$", r"^ep\d+_lr$")),
}
