"""Whole steps of MoCo v1/v2/v3 and CR-MoE: the published network's state in, one of our steps, its state out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_cl.comm import Comm, LocalComm, SimComm
from moe_cl.config import MoEConfig
from moe_cl.interop.official import Official, split
from moe_cl.losses.balance import balance
from moe_cl.losses.consistency import consistency
from moe_cl.methods import crmoe, moco, mocov3, routing
from moe_cl.methods.base import Method
from moe_cl.models.build import build_backbone
from moe_cl.models.norm import shuffle, unshuffle
from tests.conformance.harness import Golden, Report
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


def ours(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Student's tensors (gradients, weights) by our names."""
    return split(dict(arrays)).student


def compare(report: Report, case: str, run: Run, want: Official, tolerance: float, **more: Any) -> None:
    """State of both networks and the method after a step, as far as the file has it."""
    sides = {"student": (run.student, want.student), "method": (run.method, want.method)}
    if run.teacher is not None:
        sides["teacher"] = (run.teacher.module, want.teacher)
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
    for tag in z.cases(r"(v\d)/"):
        state = split(z.under(f"{tag}/sd0/"))
        head = "mlp" if "heads.fc.2.weight" in state.student else "linear"
        params = moco.Params(float(z[f"{tag}/T"]), int(z["C"]), int(z["K"]), head)
        run = tiny(moco.MoCo(params, LocalComm()), state)
        logits = spied(run.method)
        options = {"lr": "lr", "momentum": "sgd_momentum", "weight_decay": "weight_decay"}
        run.optimize(torch.optim.SGD(run.student.parameters(), **{k: float(z[n]) for k, n in options.items()}))
        for s in range(len(z.cases(rf"{tag}/im_q(\d+)"))):
            x = torch.cat([z.tensor(f"{tag}/im_{n}{s}") for n in "qk"])
            report.same(tag, f"rows {s}", len(x), 2 * int(z["N"]))
            loss = run.step(batch_of([x]), float(z["m"]))
            report.close(tag, f"loss {s}", loss, z[f"{tag}/loss{s}"], F64)
            report.close(tag, f"logits {s}", logits[-1], z[f"{tag}/logits{s}"], F64)
            report.each(tag, f"gradients {s}", run.grads, ours(z.under(f"{tag}/grad{s}/")), F64)
            compare(report, f"{tag} after {s}", run, split(z.under(f"{tag}/sd{s + 1}/")), F64)


def spied(method: Any) -> list[Tensor]:
    """The logits that ``method`` computes from now on."""
    seen: list[Tensor] = []
    plain = method.logits

    def logits(*args: Tensor) -> Tensor:
        seen.append(plain(*args))
        return seen[-1]

    method.logits = logits
    return seen


def v12_shufflebn(z: Golden, report: Report) -> None:
    """MoCo v2 with shuffled batch norm: on as many ranks as published, and split on one."""
    world, start = int(z["world"]), split(z.under("sd0/"))
    rows = {r: {n: z.tensor(f"rank{r}/{n}") for n in ("im_q", "im_k", "shuf_x", "back")} for r in range(world)}
    gathered, idx = z.tensor("gathered_im_k"), z.tensor("idx_shuffle")
    report.same("shuffle", "gathered", torch.cat([rows[r]["im_k"] for r in rows]), gathered)
    report.same("shuffle", "undone by", torch.argsort(idx), z["idx_unshuffle"])

    def moved(comm: Comm) -> tuple[Tensor, Tensor]:
        out = shuffle(rows[comm.rank]["im_k"], idx, comm)
        return out, unshuffle(out, idx, comm)

    for r, (out, back) in enumerate(SimComm.run(world, moved)):
        report.same("shuffle", f"rank {r} in", out, rows[r]["shuf_x"])
        report.same("shuffle", f"rank {r} back", back, rows[r]["back"])

    order = z.tensor("fwd_idx_shuffle")
    after = [split(z.under(f"rank{r}/sd1/")) for r in range(world)]
    grads, queue = ours(z.under("ddp_grad/")), z.under("sd1/")

    def one(comm: Comm) -> None:
        parts = world // comm.world
        params = moco.Params(float(z["T"]), int(z["C"]), int(z["K"]), bn_groups=parts)
        run = tiny(moco.MoCo(params, comm), start)
        run.method.order = lambda batch, rows: order
        logits = spied(run.method)
        mine = range(comm.rank * parts, (comm.rank + 1) * parts)
        x = torch.cat([rows[r][n] for n in ("im_q", "im_k") for r in mine])
        loss = run.step(batch_of([x]), float(z["m"]))
        case = f"{comm.world} ranks, rank {comm.rank}"
        report.close(case, "loss", loss, np.mean([z[f"rank{r}/loss"] for r in mine]), F64)
        report.close(case, "logits", logits[0], np.concatenate([z[f"rank{r}/logits"] for r in mine]), F64)
        report.each(case, "gradients", run.grads, grads, F64)
        report.each(case, "queue", run.method.state_dict(), queue, F64)
        for side, module in (("student", run.student), ("teacher", run.teacher.module)):
            states = [getattr(after[r], side) for r in mine]
            mean = {k: np.mean([s[k] for s in states], 0) for k in states[0]}
            report.each(case, f"{side} state", module.state_dict(), mean, F64)

    SimComm.run(world, one)
    one(LocalComm())
    report.same("shuffle", "rows a rank", len(rows[0]["im_q"]), int(z["N_per_rank"]))


def v3_forward(z: Golden, report: Report) -> None:
    """MoCo v3 on a tiny net or a ViT: one rank; two ranks with local and with synchronised batch norm."""
    start = split(z.under("world1/sd0/"))
    vit = "backbone.cls_token" in start.student
    params = mocov3.Params(float(z["T"]), int(z["dim"]), int(z["mlp_dim"]), "vit" if vit else "resnet")

    def build(comm: Comm, sync: bool, heads: int) -> Run:
        method = mocov3.MoCoV3(params, comm if sync else LocalComm())
        if not vit:
            run = tiny(method, start, method.comm)
        else:
            size = z["world1/x1"].shape[-1]
            nets = [
                build_backbone("vit", comm=method.comm, **vit_options(start.student, size, heads)) for _ in range(2)
            ]
            parts = (method, method.build_student(nets[0]).double(), method.build_teacher(nets[1]).double())
            load(parts, start)
            run = Run(*parts)
        return Run(method, run.student, run.teacher.module, comm)

    def one(comm: Comm, mode: str, sync: bool) -> None:
        many = comm.world > 1
        run = build(comm, sync, heads)
        at = f"world{comm.world}_localbn/rank{comm.rank}/" if many else "world1/"
        batch = batch_of([torch.cat([z.tensor(at + n) for n in ("x1", "x2")])])
        report.same(mode, "rows a rank", len(batch.sample_ids), int(z["N_per_rank"]))
        loss = run.step(batch, float(z["m"]))
        out = f"{mode}/rank{comm.rank}/" if many else "world1/"
        case = f"{mode}, rank {comm.rank}"
        report.close(case, "loss", loss, z[out + "loss"], F64)
        losses[comm.rank] = float(loss)
        grads = z.under(f"{mode}/ddp_grad/")
        report.each(case, "gradients", run.grads, ours(grads), 1e-8)
        report.same(case, "trained", sorted(run.grads), sorted(ours(dict.fromkeys(grads, 0))))
        if not many:
            names = {str(n): 0 for n in z["world1/trainable"]}
            trained = [n for n, p in run.student.named_parameters() if p.requires_grad]
            report.same(case, "trainable", sorted(trained), sorted(ours(names)))
        compare(report, case, run, split(z.under((out if many and not sync else f"{mode}/") + "sd1/")), F64)

    losses: dict[int, float] = {}
    whole = batch_of([torch.cat([z.tensor(f"world1/{n}") for n in ("x1", "x2")])])
    heads = fitted(
        start.student if vit else None,
        lambda h: float(build(LocalComm(), True, h).step(whole, float(z["m"]))),
        float(z["world1/loss"]),
    )
    one(LocalComm(), "world1", True)
    for mode in z.cases(r"(world[2-9]_\w+)/"):
        world = int(mode[5])
        SimComm.run(world, lambda comm, mode=mode: one(comm, mode, "sync" in mode))
        if f"{mode}/mean_loss" in z:
            report.close(mode, "mean loss", np.mean([losses[r] for r in range(world)]), z[f"{mode}/mean_loss"], F64)


def fitted(student: Mapping[str, Any] | None, loss_of: Callable[[int], float], want: float) -> int:
    """Number of attention heads, which no array says: 4 as the spec has it, or the divisor of the width that fits."""
    if student is None:
        return 0
    dim = len(student["backbone.norm.weight"])
    best, error = 4, float("inf")
    for heads in [4, *(h for h in range(1, dim + 1) if dim % h == 0 and h != 4)]:
        if dim % heads == 0 and (off := abs(loss_of(heads) - want)) < error:
            best, error = heads, off
        if error < 1e-4 * abs(want):
            break
    return best


def vit_options(student: Mapping[str, Any], size: int, heads: int) -> dict[str, Any]:
    """Sizes of a ViT from its published state."""
    proj = student["backbone.patch_embed.proj.weight"]
    depth = 1 + max(int(k.split(".")[2]) for k in student if k.startswith("backbone.blocks."))
    fc1 = [v.shape[0] for k, v in student.items() if k.endswith("mlp.fc1.weight")]
    return {
        "dim": proj.shape[0], "depth": depth, "heads": heads, "patch_size": proj.shape[2], "img_size": size,
        "in_chans": proj.shape[1], "mlp_ratio": fc1[0] / proj.shape[0],
    }  # fmt: skip


def crmoe_e2e(z: Golden, report: Report) -> None:
    """One step of CR-MoE, float32 as published; on one rank and, statistics over all, on two."""
    start = split(z.under("sd/"))
    moe_blocks = sorted({int(k.split(".")[2]) for k in start.student if ".mlp.router." in k})
    dim, experts = start.student[f"backbone.blocks.{moe_blocks[0]}.mlp.router.weight"].shape
    hidden = start.student[f"backbone.blocks.{moe_blocks[0]}.mlp.experts.w1"].shape[1]
    top_k = int((z["q1_gate_layer0"][0, 0] > 0).sum())
    moe = MoEConfig(blocks=moe_blocks, experts=experts, top_k=top_k, hidden_ratio=hidden / dim)
    out_dim, mlp_dim = start.student["heads.predictor.3.weight"].shape
    params = crmoe.Params(
        temperature=float(z["T"]), dim=out_dim, mlp_dim=mlp_dim, balance_weight=float(z["w_lb"]),
        consistency_weight=float(z["w_G"]), alpha=float(z["alpha"]), threshold=float(z["threshold"]),
    )  # fmt: skip
    x = [z.tensor(n) for n in ("x1", "x2")]
    boxes = torch.stack([z.tensor(n) for n in ("bbox1", "bbox2")])
    options = vit_options(start.student, x[0].shape[-1], 4) | {
        "moe": moe,
        "freeze_patch": False,
    }  # as its command had it

    def one(comm: Comm) -> tuple[Run, float]:
        method = crmoe.CRMoE(params, comm)
        student = method.build_student(build_backbone("vit", **options))
        teacher = method.build_teacher(build_backbone("vit", **options))
        load((method, student, teacher), start)
        run = Run(method, student, teacher, comm)
        run.optimize(torch.optim.AdamW(student.parameters(), 1e-3, weight_decay=0.1))
        rows = slice(comm.rank, None, comm.world)
        batch = batch_of([torch.cat([v[rows] for v in x])], boxes[:, rows])
        return run, float(run.step(batch, float(z["m"])))

    def contrastive_with(heads: int) -> float:
        options["heads"] = heads
        run, _ = one(LocalComm())
        return float(run.metrics["loss/contrastive"])

    options["heads"] = fitted(start.student, contrastive_with, float(z["loss_cl"]))
    published_balance = float(z["w_lb"]) * float(z["lb_base_unweighted"])
    total = float(z["loss_total"]) - float(z["w_lb"]) * float(
        z["lb_momentum_unweighted"]
    )  # a constant without gradient
    report.close("one step", "weighted balance", z["loss_lb_weighted"],
                 float(z["w_lb"]) * (z["lb_base_unweighted"] + z["lb_momentum_unweighted"]), 5e-6)  # fmt: skip
    for world in (1, 2):
        out = SimComm.run(world, one) if world > 1 else [one(LocalComm())]
        run, case = out[0][0], f"{world} ranks" if world > 1 else "one step"
        metric = {k: np.mean([float(r.metrics[k]) for r, _ in out]) for k in run.metrics if k.startswith("loss/")}
        report.close(case, "contrastive", metric["loss/contrastive"], z["loss_cl"], 5e-6)
        report.close(case, "consistency", metric["loss/consistency"], z["loss_gate_weighted"], 5e-6)
        report.close(case, "balance", metric["loss/balance"], published_balance, 5e-6)
        report.close(case, "total", np.mean([loss for _, loss in out]), total, 5e-6)
        grads = {k: zeros_cut(k, v) for k, v in z.under("grad/").items() if k != "base_encoder.norm.bias"}
        got = {k: zeros_cut(k, v) for k, v in run.grads.items()}
        report.each(case, "gradients", got, ours(grads), 5.5e-5)
    run = one(LocalComm())[0]
    report.same("one step", "trainable", sorted(run.grads), sorted(ours({str(n): 0 for n in z["requires_grad_names"]})))
    compare(report, "one step", run, split(z.under("after/")), 5e-6, floor=2e-2)
    _routing(z, report, build_first(params, options, start), x, boxes)
    after, grads = run.student.state_dict(), ours(z.under("grad/"))
    sure = {k: np.abs(g) > 1e-5 * np.abs(g).max() for k, g in grads.items() if not k.endswith("backbone.norm.bias")}
    want = {k: v for k, v in ours(z.under("adamw/")).items() if k in sure}
    for k in want:
        if k.endswith("qkv.bias"):
            third = len(sure[k]) // 3
            sure[k][third : 2 * third] = False  # the keys' bias has no gradient by maths
    report.each("one step", "after AdamW", {k: after[k].numpy() * sure[k] for k in want},
                {k: v * sure[k] for k, v in want.items()}, 1.5e-6, absolute=True)  # fmt: skip


def zeros_cut(name: str, grad: Any) -> np.ndarray:
    """A gradient without the third of a qkv bias that is zero by maths (float noise)."""
    grad = np.asarray(grad)
    third = len(grad) // 3 if grad.ndim else 0
    return np.delete(grad, slice(third, 2 * third)) if name.endswith("qkv.bias") else grad


def build_first(params: Any, options: dict[str, Any], start: Official) -> Run:
    """The networks before the step, both with the published start."""
    method = crmoe.CRMoE(params, LocalComm())
    parts = [method, *(b(build_backbone("vit", **options)) for b in (method.build_student, method.build_teacher))]
    load(tuple(parts), start)
    return Run(*parts)


def _routing(z: Golden, report: Report, run: Run, x: list[Tensor], boxes: Tensor) -> None:
    """Gate vectors, their balance and consistency a layer, student before and teacher after its EMA."""
    with torch.no_grad():
        student = run.student("encode", [torch.cat(x)], None, [2])
        run.teacher.update(float(z["m"]))
        teacher = run.teacher("encode", [torch.cat(x)], None, [2])
    for name, encoded in (("lb_base_unweighted", student), ("lb_momentum_unweighted", teacher)):
        got = balance(routing.balance_sums(encoded, len(x[0])), LocalComm())[0]
        report.close("one step", name, got, z[name], 5e-6)
    q_idx, q_w, experts = routing.sparse_gates(student, 2, "gated")
    k_idx, k_w, _ = routing.sparse_gates(teacher, 2, "gated")
    for layer in range(len(q_w)):
        for name, idx, w, view in (("q1", q_idx, q_w, 0), ("k2", k_idx, k_w, 1)):
            dense = torch.zeros(*w.shape[2:4], experts).scatter(-1, idx[layer, view], w[layer, view])
            report.close("one step", f"{name} gate {layer}", dense, z[f"{name}_gate_layer{layer}"], 5e-6, absolute=True)
    match = run.method.match(boxes, q_w.shape[3] - 1)
    _, per_layer = consistency(
        q_idx, q_w, k_idx, k_w, experts, LocalComm(), match, float(z["T"]), float(z["alpha"])
    )  # fmt: skip
    report.close("one step", "consistency a layer", per_layer, z["gate_loss_per_layer_unweighted"], 5e-6)


CHECKS = {
    "moco_v12_e2e": v12_e2e,
    "moco_v12_shufflebn*": v12_shufflebn,
    "moco_v3_forward*": v3_forward,
    "crmoe_e2e": crmoe_e2e,
}
