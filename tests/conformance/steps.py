"""Whole steps of MoCo v1/v2/v3: the published network's state in, one of our steps, its state out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_cl.comm import Comm, LocalComm, SimComm
from moe_cl.config import OptimConfig
from moe_cl.engine.optim import build, param_groups
from moe_cl.interop.official import Official, split
from moe_cl.methods import moco, mocov3
from moe_cl.methods.base import Method
from moe_cl.models.build import build_backbone
from moe_cl.models.norm import shuffle, unshuffle
from tests.conformance.given import spied
from tests.conformance.harness import Check, Golden, Report
from tests.plain import Run, batch_of
from tests.tiny import TinyNet

F64 = 1e-9


def load(run_of: tuple[Method, nn.Module, nn.Module], state: Official) -> None:
    """Put a published state into student, teacher and method."""
    method, student, teacher = run_of
    for module, part in ((student, state.student), (teacher, state.teacher)):
        module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in part.items()}, strict=True)
    for name, value in state.method.items():
        getattr(method, name).copy_(torch.from_numpy(np.array(value)))


def compared(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The student's tensors (gradients, weights) by our names; there must be no others."""
    parts = split(arrays)
    if parts.teacher or parts.method:
        raise ValueError(f"not the student's: {[*parts.teacher, *parts.method][:3]}")
    return parts.student


def compare(report: Report, case: str, run: Run, want: Official, tolerance: float, **more: Any) -> None:
    """State of both networks and the method after a step, as far as the file has it."""
    sides = {
        "student": (run.student, want.student),
        "teacher": (run.teacher and run.teacher.module, want.teacher),
        "method": (run.method, want.method),
    }
    for side, (module, state) in sides.items():
        if state:
            report.each(case, f"{side} state", module.state_dict(), state, tolerance, **more)


def tiny(method: Method, state: Official, comm: Comm | None = None) -> Run:
    """A run on the tiny encoder of the files."""
    width, inputs = state.student["backbone.stem.weight"].shape
    parts = (
        method.double(),
        method.build_student(TinyNet(inputs, width, comm)).double(),
        method.build_teacher(TinyNet(inputs, width, comm)).double(),
    )
    load(parts, state)
    return Run(*parts, method.comm)


def v12_e2e(z: Golden, report: Report) -> None:
    """MoCo v1 and v2 on one rank: several steps with SGD."""
    cfg = OptimConfig(name="sgd", momentum=float(z["sgd_momentum"]), weight_decay=float(z["weight_decay"]))
    for tag in z.cases(r"([^/]+)/T$"):
        state = split(z.under(f"{tag}/sd0/"))
        head = "mlp" if "heads.fc.2.weight" in state.student else "linear"
        params = moco.Params(float(z[f"{tag}/T"]), int(z["C"]), int(z["K"]), head)
        run = tiny(moco.MoCo(params, LocalComm()), state)
        logits = spied(run.method, "logits")
        run.optimize(build(param_groups(run.student, cfg), cfg, float(z["lr"])))
        for s in sorted(map(int, z.cases(rf"{tag}/im_q(\d+)$"))):
            x = torch.cat([z.tensor(f"{tag}/im_{n}{s}") for n in "qk"])
            report.same(tag, f"rows {s}", len(x), 2 * int(z["N"]))
            loss = run.step(batch_of([x]), float(z["m"]))
            report.close(tag, f"loss {s}", loss, z[f"{tag}/loss{s}"], F64)
            report.close(tag, f"logits {s}", logits[-1][1], z[f"{tag}/logits{s}"], F64)
            report.each(tag, f"gradients {s}", run.grads, compared(z.under(f"{tag}/grad{s}/")), F64)
            compare(report, f"{tag} after {s}", run, split(z.under(f"{tag}/sd{s + 1}/")), F64)


def v12_shufflebn(z: Golden, report: Report) -> None:
    """MoCo v2 with shuffled batch norm: on as many ranks as published, and split on one."""
    world, start = int(z["world"]), split(z.under("sd0/"))
    rows = {r: {n: z.tensor(f"rank{r}/{n}") for n in ("im_q", "im_k", "shuf_x", "back")} for r in range(world)}
    idx = z.tensor("idx_shuffle")
    report.same("shuffle", "undone by", unshuffle(torch.arange(len(idx)), idx, LocalComm()), z["idx_unshuffle"])

    def moved(comm: Comm) -> tuple[Tensor, Tensor, Tensor]:
        mine = rows[comm.rank]["im_k"]
        out = shuffle(mine, idx, comm)
        return comm.all_gather(mine), out, unshuffle(out, idx, comm)

    for r, (gathered, out, back) in enumerate(SimComm.run(world, moved)):
        report.same("shuffle", f"rank {r} gathered", gathered, z["gathered_im_k"])
        report.same("shuffle", f"rank {r} in", out, rows[r]["shuf_x"])
        report.same("shuffle", f"rank {r} back", back, rows[r]["back"])
        report.same("shuffle", f"rank {r} rows", len(out), int(z["N_per_rank"]))

    order = z.tensor("fwd_idx_shuffle")
    after = [split(z.under(f"rank{r}/sd1/")) for r in range(world)]
    grads, common = compared(z.under("ddp_grad/")), Official("moco", method=dict(z.under("sd1/")))
    heads = "mlp" if "heads.fc.2.weight" in start.student else "linear"

    def one(comm: Comm) -> None:
        parts = world // comm.world
        params = moco.Params(float(z["T"]), int(z["C"]), int(z["K"]), heads, bn_groups=parts)
        run = tiny(moco.MoCo(params, comm), start)
        run.method.order = lambda batch, rows: order
        logits = spied(run.method, "logits")
        mine = range(comm.rank * parts, (comm.rank + 1) * parts)
        x = torch.cat([rows[r][n] for n in ("im_q", "im_k") for r in mine])
        loss = run.step(batch_of([x]), float(z["m"]))
        case = f"{comm.world} ranks, rank {comm.rank}"
        report.close(case, "loss", loss, np.mean([z[f"rank{r}/loss"] for r in mine]), F64)
        report.close(case, "logits", logits[0][1], np.concatenate([z[f"rank{r}/logits"] for r in mine]), F64)
        report.each(case, "gradients", run.grads, grads, F64)
        compare(report, case, run, common, F64)
        means = [
            {k: np.mean([getattr(after[r], side)[k] for r in mine], 0) for k in getattr(after[mine[0]], side)}
            for side in ("student", "teacher", "method")
        ]
        compare(report, case, run, Official("moco", *means), F64)

    SimComm.run(world, one)
    one(LocalComm())


def v3_forward(z: Golden, report: Report) -> None:
    """MoCo v3 on a tiny net or a ViT: one rank; two ranks with local and with synchronised batch norm."""
    start = split(z.under("world1/sd0/"))
    vit = "backbone.cls_token" in start.student
    trainable = {str(n): 0 for n in z["world1/trainable"]}
    params = mocov3.Params(float(z["T"]), int(z["dim"]), int(z["mlp_dim"]), "vit" if vit else "resnet")

    def build(comm: Comm, sync: bool, heads: int) -> Run:
        method = mocov3.MoCoV3(params, comm if sync else LocalComm())
        if not vit:
            run = tiny(method, start, method.comm)
        else:
            size = z["world1/x1"].shape[-1]
            options = vit_options(start.student, size, heads) | {
                "freeze_patch": not any("patch_embed" in n for n in trainable)
            }
            nets = [build_backbone("vit", comm=method.comm, **options) for _ in range(2)]
            parts = (method, method.build_student(nets[0]).double(), method.build_teacher(nets[1]).double())
            load(parts, start)
            run = Run(*parts)
        return Run(method, run.student, run.teacher.module, comm)

    def one(comm: Comm, mode: str, sync: bool) -> None:
        many = comm.world > 1
        run = build(comm, sync, heads)
        places = [f"{m}/rank{comm.rank}/" for m in (mode, f"world{comm.world}_localbn")] if many else ["world1/"]
        at = next(p for p in places if f"{p}x1" in z)  # both kinds of batch norm had the same rows
        batch = batch_of([torch.cat([z.tensor(at + n) for n in ("x1", "x2")])])
        report.same(mode, "rows a rank", len(batch.sample_ids), int(z["N_per_rank"]))
        loss = run.step(batch, float(z["m"]))
        out = f"{mode}/rank{comm.rank}/" if many else "world1/"
        case = f"{mode}, rank {comm.rank}"
        report.close(case, "loss", loss, z[out + "loss"], F64)
        losses[comm.rank] = float(loss)
        grads = compared(z.under(f"{mode}/ddp_grad/"))
        report.each(case, "gradients", run.grads, grads, F64)
        report.same(case, "trained", sorted(run.grads), sorted(grads))
        trained = [n for n, p in run.student.named_parameters() if p.requires_grad]
        report.same(case, "trainable", sorted(trained), sorted(compared(trainable)))
        for place in {out, f"{mode}/"}:  # a rank's own statistics, and those that all ranks share
            if after := z.under(f"{place}sd1/"):
                compare(report, case, run, split(after), F64)

    losses: dict[int, float] = {}
    whole = batch_of([torch.cat([z.tensor(f"world1/{n}") for n in ("x1", "x2")])])
    want, heads = float(z["world1/loss"]), 0
    if vit:
        run_with = lambda h: float(build(LocalComm(), True, h).step(whole, float(z["m"])))  # noqa: E731
        heads = report.fit("heads", heads_of(start.student), lambda h: abs(run_with(h) / want - 1), F64)
    one(LocalComm(), "world1", True)
    for mode in z.cases(r"(world\d+_\w+)/"):
        world = int(mode.removeprefix("world").split("_")[0])
        SimComm.run(world, lambda comm, mode=mode: one(comm, mode, "sync" in mode))
        if f"{mode}/mean_loss" in z:
            report.close(mode, "mean loss", np.mean([losses[r] for r in range(world)]), z[f"{mode}/mean_loss"], F64)


def heads_of(student: Mapping[str, Any]) -> list[int]:
    """Numbers of attention heads that a ViT's width allows, the specification's 4 first: no array says how many."""
    dim = len(student["backbone.norm.weight"])
    return sorted((h for h in range(1, dim + 1) if dim % h == 0), key=lambda h: (h != 4, h))


def vit_options(student: Mapping[str, Any], size: int, heads: int) -> dict[str, Any]:
    """Sizes of a ViT from its published state."""
    proj = student["backbone.patch_embed.proj.weight"]
    depth = 1 + max(int(k.split(".")[2]) for k in student if k.startswith("backbone.blocks."))
    fc1 = [v.shape[0] for k, v in student.items() if k.endswith("mlp.fc1.weight")]
    return {
        "dim": proj.shape[0], "depth": depth, "heads": heads, "patch_size": proj.shape[2], "img_size": size,
        "in_chans": proj.shape[1], "mlp_ratio": fc1[0] / proj.shape[0],
    }  # fmt: skip


CHECKS = {
    "moco_v12_e2e": Check(v12_e2e, (r"^sgd_momentum$", r"/im_q\d+$")),
    "moco_v12_shufflebn": Check(v12_shufflebn, (r"^idx_shuffle$",)),
    "moco_v3_forward": Check(v3_forward, (r"^world1/sd0/", r"^world1/trainable$")),
}
