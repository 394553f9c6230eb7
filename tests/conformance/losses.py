"""Losses of MoCo v1/v2/v3, JCL and SimCLR with their queues, through the methods themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from moe_cl.comm import Comm, LocalComm, SimComm
from moe_cl.losses.info_nce import contrastive, gather_keys
from moe_cl.losses.jcl import joint
from moe_cl.losses.precision import unit
from moe_cl.methods import jcl, moco, mocov3, simclr
from moe_cl.models.build import Encoded
from tests.conformance.given import networks, on_views, spied
from tests.conformance.harness import Check, Golden, Report
from tests.plain import batch_of

F64 = 1e-9


def v12_loss(z: Golden, report: Report) -> None:
    """Logits, loss, gradient, queue and pointer over several steps."""
    for tag in z.cases(r"(.+)_T$"):
        method = moco.MoCo(moco.Params(float(z[f"{tag}_T"]), int(z["C"]), int(z["K"])), LocalComm()).double()
        nets, logits = networks(method, int(z["C"])), spied(method, "logits")
        method.queue.copy_(z.tensor(f"{tag}_queue0"))
        raw = [z.tensor(f"{tag}_raw_{n}") for n in "qk"]
        for rows in raw:
            report.same(tag, "steps and rows", rows.shape, [int(z[n]) for n in ("steps", "N", "C")])
        for s in range(len(raw[0])):
            q, k = (rows[s].clone() for rows in raw)
            q.requires_grad_()
            out = on_views(method, nets, torch.cat([q, k]), 2)
            out.loss.backward()
            report.close(tag, f"logits {s}", logits[-1][1], z[f"{tag}_logits"][s], F64)
            report.close(tag, f"loss {s}", out.loss, z[f"{tag}_loss"][s], F64)
            report.close(tag, f"gradient {s}", q.grad, z[f"{tag}_grad_raw_q"][s], F64)
            tops = [out.metrics[f"accuracy/top{n}"] for n in (1, 5)]
            report.close(tag, f"accuracy {s}", tops, z[f"{tag}_acc1_acc5"][s], F64)
            method.commit(out.pending)
            report.close(tag, f"queue {s}", method.queue, z[f"{tag}_queue_after"][s], F64)
            report.same(tag, f"pointer {s}", int(method.queue_ptr), int(np.ravel(z[f"{tag}_ptr_after"][s])[0]))


def symmetric(q1: Any, q2: Any, k1: Any, k2: Any, t: float, comm: Comm) -> dict[str, Any]:
    """MoCo v3's loss on given outputs of the heads: both directions, their sum, and its gradients."""
    method = mocov3.MoCoV3(mocov3.Params(t, q1.shape[1], q1.shape[1], balance_weight=0.0), comm)
    networks(method, q1.shape[1])
    q1, q2 = (q.clone().requires_grad_() for q in (q1, q2))
    student, teacher = Encoded(torch.cat([q1, q2])), Encoded(torch.cat([k1, k2]))
    out = method.loss(student, teacher, batch_of([student.features]), comm)
    out.loss.backward()
    g1, g2 = gather_keys(k1, k2, comm=comm)
    one, two = (contrastive(q, g, t, comm.rank).loss for q, g in ((q1, g2), (q2, g1)))
    return {"loss": out.loss, "loss_q1k2": one, "loss_q2k1": two, "grad_q1": q1.grad, "grad_q2": q2.grad}


def v3_loss(z: Golden, report: Report) -> None:
    """Both directions and their gradients, over any number of ranks."""
    for world in map(int, z.cases(r"world(\d+)/")):
        arrays = {r: z.under(f"world{world}/rank{r}/") for r in range(world)}
        for r, a in arrays.items():
            report.same(f"world{world} rank{r}", "rows", a["q1"].shape, (int(z["N_per_rank"]), int(z["C"])))
        for t in dict.fromkeys(name[1:].split("/")[0] for name in arrays[0] if name.startswith("T")):

            def rank(comm: Comm, t: str = t, arrays: Mapping[int, Any] = arrays) -> dict[str, Any]:
                rows = [torch.from_numpy(arrays[comm.rank][n].copy()) for n in ("q1", "q2", "k1", "k2")]
                return symmetric(*rows, float(t), comm)

            for r, values in enumerate(SimComm.run(world, rank)):
                for name, value in values.items():
                    report.close(f"world{world} rank{r} T{t}", name, value, arrays[r][f"T{t}/{name}"], F64)


def ntxent(z: Golden, report: Report) -> None:
    """SimCLR's NT-Xent on one rank."""
    for t in z.cases(r"T([\d.]+)/"):
        rows = z.tensor("z0").shape
        report.same(f"T{t}", "rows", rows, (int(z["N"]), int(z["C"])))
        method = simclr.SimCLR(simclr.Params(float(t), rows[1]), LocalComm())
        z0, z1 = (z.tensor(n).requires_grad_() for n in ("z0", "z1"))
        out = on_views(method, networks(method, rows[1]), torch.cat([z0, z1]), 2)
        out.loss.backward()
        for name, value in (("loss", out.loss), ("grad_z0", z0.grad), ("grad_z1", z1.grad)):
            report.close(f"T{t}", name, value, z[f"T{t}/{name}"], F64)


def jcl_loss(z: Golden, report: Report) -> None:
    """Eq. 8 and the mean keys in the queue, one rank, several steps."""
    for case in z.cases(r"(.+)/queue0$"):
        _jcl(z, report, case, f"{case}/", 1)


def jcl_ranks(z: Golden, report: Report) -> None:
    """The same over ranks: every rank's means enter the queue in rank order."""
    _jcl(z, report, "ranks", "", int(z["world"]))


def _jcl(z: Golden, report: Report, case: str, at: str, world: int) -> None:
    sizes = {n: int(z[at + n]) for n in ("C", "K", "M")}
    rows = int(z[f"{at}N" if world == 1 and f"{at}N" in z else f"{at}N_per_rank"])
    params = jcl.Params(float(z[f"{at}T"]), sizes["C"], sizes["K"], covariance_weight=float(z[f"{at}lambda_eff"]))
    start, steps = z.tensor(f"{at}queue0"), z.cases(rf"{at}queue_after(\d+)$")
    ranked = f"{at}rank0/raw_q0" in z

    def rank(comm: Comm) -> None:
        method = jcl.JCL(params, comm).double()
        nets, parts = networks(method, sizes["C"]), spied(method, "output")
        method.queue.copy_(start)
        mine, name = (f"{at}rank{comm.rank}/", f"rank {comm.rank}") if ranked else (at, case)
        for s in steps:
            q, keys = z.tensor(f"{mine}raw_q{s}").requires_grad_(), z.tensor(f"{mine}raw_k{s}")
            report.same(name, f"rows {s}", (len(q), len(keys)), (rows, rows * sizes["M"]))
            out = on_views(method, nets, torch.cat([q, keys]), 1 + sizes["M"])
            out.loss.backward()
            keys = keys.view(sizes["M"], *q.shape)
            quadratic = joint(q.detach(), keys, method.queue, params.temperature, method.weight()).quadratic
            values = {
                "logits": parts[-1][0][1], "ce": out.metrics["jcl/cross_entropy"],
                "jcl_term": out.metrics["jcl/covariance"], "total": out.loss, "quad_form": quadratic,
                "mu": out.pending["keys"][comm.rank * rows : (comm.rank + 1) * rows], "grad_raw_q": q.grad,
            }  # fmt: skip
            for part, value in values.items():
                report.close(name, f"{part} {s}", value, z[f"{mine}{part}{s}"], F64)
            if f"{mine}sigma{s}" in z:  # never formed here: its quadratic form is
                u = unit(q.detach()).numpy()
                want = np.einsum("nc,ncd,nd->n", u, z[f"{mine}sigma{s}"], u)
                report.close(name, f"sigma {s}", quadratic, want, F64)
            method.commit(out.pending)
            report.close(name, f"queue {s}", method.queue, z[f"{at}queue_after{s}"], F64)
            report.same(name, f"pointer {s}", int(method.queue_ptr), int(np.ravel(z[f"{at}ptr_after{s}"])[0]))

    SimComm.run(world, rank)


CHECKS = {
    "moco_v12_loss": Check(v12_loss, (r"_queue_after$", r"_raw_q$", r"^steps$")),
    "moco_v3_loss": Check(v3_loss, (r"^world\d+/rank\d+/T[\d.]+/loss$",)),
    "moco_simclr": Check(ntxent, (r"^z0$", r"^T[\d.]+/grad_z0$")),
    "jcl_loss": Check(jcl_loss, (r"^[^/]+/lambda_eff$", r"^[^/]+/raw_q0$")),
    "jcl": Check(jcl_ranks, (r"^lambda_eff$", r"^rank0/raw_q0$")),
}
