"""Losses and small pure pieces: MoCo v1/v2/v3, JCL, NT-Xent, EMA, LARS, schedules, position embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_cl.comm import Comm, LocalComm, SimComm
from moe_cl.config import OptimConfig, ScheduleConfig, TeacherConfig
from moe_cl.engine import schedules
from moe_cl.engine.optim import LARS
from moe_cl.engine.teacher import ema_
from moe_cl.losses.info_nce import accuracy, contrastive, first_is_positive, gather_keys
from moe_cl.losses.jcl import Joint, joint, ramp
from moe_cl.losses.ntxent import ntxent
from moe_cl.methods import jcl, moco
from moe_cl.models.vit import sincos
from tests.conformance.harness import Golden, Report

F64 = 1e-9


def v12_loss(z: Golden, report: Report) -> None:
    """Logits, loss, gradient, queue and pointer over several steps."""
    for tag in z.cases(r"(v\d+)_T"):
        t = float(z[f"{tag}_T"])
        method = moco.MoCo(moco.Params(t, int(z["C"]), int(z["K"])), LocalComm()).double()
        method.queue.copy_(z.tensor(f"{tag}_queue0"))
        for s in range(int(z["steps"])):
            q, k = (torch.from_numpy(z[f"{tag}_raw_{n}"][s].copy()) for n in "qk")
            report.same(tag, f"rows {s}", q.shape, (int(z["N"]), int(z["C"])))
            q.requires_grad_()
            logits = method.logits(q, k)
            loss = first_is_positive(logits)
            loss.backward()
            report.close(tag, f"logits {s}", logits, z[f"{tag}_logits"][s], F64)
            report.close(tag, f"loss {s}", loss, z[f"{tag}_loss"][s], F64)
            report.close(tag, f"gradient {s}", q.grad, z[f"{tag}_grad_raw_q"][s], F64)
            tops = [accuracy(logits.detach(), n) for n in (1, 5)]
            report.close(tag, f"accuracy {s}", tops, z[f"{tag}_acc1_acc5"][s], F64)
            method.commit({"keys": gather_keys(k, comm=LocalComm())[0]})
            report.close(tag, f"queue {s}", method.queue, z[f"{tag}_queue_after"][s], F64)
            report.same(tag, f"pointer {s}", int(method.queue_ptr), int(np.ravel(z[f"{tag}_ptr_after"][s])[0]))


def v12_ema(z: Golden, report: Report) -> None:
    """Parameters move, buffers do not."""
    for tag in z.cases(r"(\w+)/m$"):
        q, teacher = z.under(f"{tag}/q/"), {k: torch.from_numpy(v.copy()) for k, v in z.under(f"{tag}/k0/").items()}
        moving = [n for n in q if "running" not in n and "tracked" not in n]
        for step in range(1, 1 + len(z.cases(rf"{tag}/k([1-9]\d*)/"))):
            ema_([teacher[n] for n in moving], [torch.from_numpy(q[n].copy()) for n in moving], float(z[f"{tag}/m"]))
            report.each(tag, f"teacher {step}", teacher, z.under(f"{tag}/k{step}/"), F64)


def v3_loss(z: Golden, report: Report) -> None:
    """Both directions and their gradients, over any number of ranks."""
    for world in map(int, z.cases(r"world(\d+)/")):
        arrays = {r: z.under(f"world{world}/rank{r}/") for r in range(world)}
        temperatures = list(dict.fromkeys(k.split("/")[0][1:] for k in arrays[0] if k.startswith("T")))
        for t in temperatures:

            def rank(comm: Comm, t: str = t, arrays: Mapping[int, Any] = arrays) -> list[Any]:
                a = arrays[comm.rank]
                q1, q2, k1, k2 = (torch.from_numpy(a[n].copy()) for n in ("q1", "q2", "k1", "k2"))
                q1.requires_grad_(), q2.requires_grad_()
                g1, g2 = gather_keys(k1, k2, comm=comm)
                one = contrastive(q1, g2, float(t), comm.rank).loss
                two = contrastive(q2, g1, float(t), comm.rank).loss
                (one + two).backward()
                return [one + two, one, two, q1.grad, q2.grad]

            names = ("loss", "loss_q1k2", "loss_q2k1", "grad_q1", "grad_q2")
            for r, values in enumerate(SimComm.run(world, rank)):
                for name, value in zip(names, values, strict=True):
                    report.close(f"world{world} rank{r} T{t}", name, value, arrays[r][f"T{t}/{name}"], F64)
        rows = arrays[0]["q1"].shape
        report.same(f"world{world}", "rows", rows, (int(z["N_per_rank"]), int(z["C"])))


def simclr(z: Golden, report: Report) -> None:
    """NT-Xent on one rank."""
    for t in z.cases(r"T([\d.]+)/"):
        z0, z1 = (z.tensor(n).requires_grad_() for n in ("z0", "z1"))
        report.same(f"T{t}", "rows", z0.shape, (int(z["N"]), int(z["C"])))
        loss = ntxent(z0, z1, float(t), LocalComm()).loss
        loss.backward()
        for name, value in (("loss", loss), ("grad_z0", z0.grad), ("grad_z1", z1.grad)):
            report.close(f"T{t}", name, value, z[f"T{t}/{name}"], F64)


def _joint(report: Report, case: str, z: Golden, at: str, out: Joint, q: Tensor, s: int) -> None:
    values = {
        "logits": out.logits, "ce": out.cross_entropy, "jcl_term": out.covariance, "total": out.loss,
        "mu": out.mean, "quad_form": out.quadratic, "grad_raw_q": q.grad,
    }  # fmt: skip
    for name, value in values.items():
        report.close(case, f"{name} {s}", value, z[f"{at}{name}{s}"], F64)
    if f"{at}sigma{s}" in z:  # never formed here: its quadratic form is
        unit = torch.nn.functional.normalize(q.detach(), dim=1).numpy()
        report.close(case, f"sigma {s}", out.quadratic, np.einsum("nc,ncd,nd->n", unit, z[f"{at}sigma{s}"], unit), F64)


def jcl_loss(z: Golden, report: Report) -> None:
    """Eq. 8 and the mean keys in the queue, one rank, several steps."""
    for case in z.cases(r"(\w+)/queue0"):
        _jcl(z, report, case, f"{case}/", 1)


def jcl_2proc(z: Golden, report: Report) -> None:
    """The same over ranks: every rank's means enter the queue in rank order."""
    _jcl(z, report, "two ranks", "", int(z["world"]))


def _jcl(z: Golden, report: Report, case: str, at: str, world: int) -> None:
    t, weight, count = (float(z[at + n]) for n in ("T", "lambda_eff", "M"))
    rows = int(z[f"{at}N" if world == 1 else "N_per_rank"])
    start, steps = z.tensor(f"{at}queue0"), len(z.cases(rf"{at}queue_after(\d+)"))

    def rank(comm: Comm) -> None:
        params = jcl.Params(t, int(z[f"{at}C"]), int(z[f"{at}K"]), covariance_weight=weight)
        method = jcl.JCL(params, comm).double()
        method.queue.copy_(start)
        mine, name = (at, case) if world == 1 else (f"rank{comm.rank}/", f"rank {comm.rank}")
        for s in range(steps):
            q = z.tensor(f"{mine}raw_q{s}").requires_grad_()
            keys = z.tensor(f"{mine}raw_k{s}").view(int(count), *q.shape)
            report.same(name, f"rows {s}", len(q), rows)
            out = joint(q, keys, method.queue, t, method.weight())
            out.loss.backward()
            _joint(report, name, z, mine, out, q, s)
            method.commit({"keys": comm.all_gather(out.mean)})
            report.close(name, f"queue {s}", method.queue, z[f"{at}queue_after{s}"], F64)
            report.same(name, f"pointer {s}", int(method.queue_ptr), int(z[f"{at}ptr_after{s}"]))

    SimComm.run(world, rank)


def moco_schedules(z: Golden, report: Report) -> None:
    """Learning rate and momentum of MoCo v3 an iteration, of v1/v2 an epoch, the probes' and JCL's ramp."""
    for case in z.cases(r"(v3_\w+)/iter$"):
        a = z.under(f"{case}/")
        n, epochs = int(a["iters_per_epoch"]), float(a["epochs"])
        peak = schedules.scaled_lr(OptimConfig(base_lr=float(a["base_lr"])), int(a["batch"]))
        cfg, teacher = ScheduleConfig(epochs=epochs, warmup_epochs=float(a["warmup"])), TeacherConfig(float(a["m0"]))
        report.close(case, "peak", peak, a["scaled_lr"], 1e-12, absolute=True)
        lr = [schedules.learning_rate(int(i), n, peak, cfg) for i in a["iter"]]
        report.close(case, "lr", lr, a["lr"], 1e-12)
        m = [schedules.teacher_momentum(int(i), n, teacher, epochs) for i in a["iter"]]
        report.close(case, "momentum", m, a["moco_m"], 1e-12)
        report.close(case, "epoch", a["iter"] / n, a["frac_epoch"], 1e-12)
    for case in z.cases(r"(v[12]\w*)/lr_per_epoch"):
        a = z.under(f"{case}/")
        stones = [int(m) for m in a["milestones"]]
        cfg = ScheduleConfig(int(a["epochs"]), kind="cosine" if a["cos"] else "step", per="epoch", milestones=stones)
        lr = [schedules.learning_rate(e * 3 + 1, 3, float(a["base_lr"]), cfg) for e in range(int(a["epochs"]))]
        report.close(case, "lr", lr, a["lr_per_epoch"], 1e-12)
    for case in z.cases(r"(lincls_\w+)/lr_per_epoch"):
        want = z[f"{case}/lr_per_epoch"]
        if f"{case}/base_lr" in z:  # v3: base * 1024/256, cosine an epoch
            peak = float(z[f"{case}/base_lr"]) * 1024 / 256
            cfg = ScheduleConfig(len(want), kind="cosine", per="epoch")
        else:  # v1/v2: 30, times .1 at 60 and 80
            peak, cfg = 30.0, ScheduleConfig(len(want), kind="step", per="epoch", milestones=[60, 80])
        report.close(case, "lr", [schedules.learning_rate(e, 1, peak, cfg) for e in range(len(want))], want, 1e-12)
    ratio, weight = z["jcl_ratio_per_epoch"], float(z["jcl_lambda"])
    report.close("jcl", "ramp", [ramp(weight, e, len(ratio)) for e in range(len(ratio))], ratio, 1e-12)


def crmoe_sched(z: Golden, report: Report) -> None:
    """CR-MoE's 100 and 300 epochs at fractional epochs."""
    batch = {100: 1024, 300: 3072}
    for e in map(int, z.cases(r"ep(\d+)_epoch")):
        at = z[f"ep{e}_epoch"]
        peak = schedules.scaled_lr(OptimConfig(base_lr=5e-4), batch.get(e, 1024))
        cfg, teacher = ScheduleConfig(e, warmup_epochs=40), TeacherConfig(0.99)
        report.close(f"ep{e}", "lr", [schedules.learning_rate(x, 1, peak, cfg) for x in at], z[f"ep{e}_lr"], 1e-12)
        m = [schedules.teacher_momentum(x, 1, teacher, e) for x in at]
        report.close(f"ep{e}", "momentum", m, z[f"ep{e}_m"], 1e-12)


def lars(z: Golden, report: Report) -> None:
    """Steps on tensors of every kind: matrices, vectors, a scalar, zero norms, no gradient."""
    for tag in z.cases(r"(\w+)/p0/"):
        a = z.under(f"{tag}/")
        names = [k.removeprefix("p0/") for k in a if k.startswith("p0/")]
        params = {n: torch.nn.Parameter(torch.from_numpy(np.array(a[f"p0/{n}"]))) for n in names}
        options = [float(a[k]) for k in ("lr", "weight_decay", "momentum", "trust_coefficient")]
        optimizer = LARS(list(params.values()), *options)
        for s in range(len({k.split("/")[0] for k in a if k.startswith("g")})):
            for n, p in params.items():
                p.grad = torch.from_numpy(np.array(a[f"g{s}/{n}"])) if f"g{s}/{n}" in a else None
            optimizer.step()
            after = {k.removeprefix(f"p{s + 1}/"): v for k, v in a.items() if k.startswith(f"p{s + 1}/")}
            report.each(tag, f"weights {s}", {n: p.detach() for n, p in params.items()}, after, 1e-9)
            mu = {k.removeprefix(f"mu{s + 1}/"): v for k, v in a.items() if k.startswith(f"mu{s + 1}/")}
            state = {n: _momentum(optimizer.state[p]) for n, p in params.items() if n in mu}
            report.each(tag, f"momentum {s}", state, mu, 1e-9)


def _momentum(state: Mapping[str, Tensor]) -> Tensor:
    return next(v for v in state.values() if isinstance(v, Tensor))


def position(z: Golden, report: Report) -> None:
    """The sin-cos table of each grid."""
    for name in z.cases(r"(\w+)/shape"):
        a = z.under(f"{name}/")
        rows, cols, dim = (int(v) for v in name.split("_")[-2].split("x") + [name.split("_")[-1]])
        table = sincos(dim, rows, cols)[0]
        report.same(name, "shape", table.shape[-2:], np.ravel(a["shape"])[-2:])
        places = {"cls_row": 0, "first_patch_r0c0": 1, "patch_r0c1": 2, "patch_r1c0": 1 + cols, "last_patch": -1}
        for part, at in places.items():
            report.close(name, part, table[at], a[part].reshape(-1), 1e-6, absolute=True)
        if "full" in a:
            report.close(name, "full", table, a["full"].reshape(table.shape), 1e-6, absolute=True)
        for part, dims in (("row_sums", 1), ("col_sums", 0)):
            if part in a:
                report.close(name, part, table.sum(dims), a[part].reshape(-1), 2e-5 * table.shape[dims], absolute=True)


CHECKS = {
    "moco_v12_loss": v12_loss,
    "moco_v12_ema": v12_ema,
    "moco_v3_loss": v3_loss,
    "moco_simclr_ntxent": simclr,
    "moco_schedules": moco_schedules,
    "moco_lars": lars,
    "moco_sincos": position,
    "jcl_loss": jcl_loss,
    "jcl_2proc": jcl_2proc,
    "crmoe_sched": crmoe_sched,
}
