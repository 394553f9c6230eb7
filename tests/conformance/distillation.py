"""Losses and centres of EsViT and DINO through the method: its heads are asked for rows whose logits a file has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_cl.comm import Comm, LocalComm, SimComm
from moe_cl.losses import distillation as dist
from moe_cl.losses.precision import unit
from moe_cl.methods import esvit
from moe_cl.methods.base import StepOutput
from moe_cl.models.build import Encoded
from tests.conformance.given import Logits, networks
from tests.conformance.harness import Check, Golden, Report
from tests.plain import batch_of

# common to the loss files (esvit.md section 6); which of their arrays says them where one does
SETTING = {"student_temperature": 0.1, "teacher_temperature": 0.07, "warmup_teacher_temperature": 0.04,
           "warmup_teacher_epochs": 30, "centre_momentum": 0.9}  # fmt: skip
CENTRES = {"center": "centre", "center_grid": "centre_region"}


def made(z: Golden, report: Report, k: int, regions: bool, comm: Comm) -> esvit.EsViT:
    """The method with the files' common setting and centres at 0."""
    setting = {name: report.assume(z, name, value) for name, value in SETTING.items()}
    return esvit.EsViT(esvit.Params(k, 1, 1, regions=regions, **setting), comm)


class Inputs:
    """Outputs of the networks of one call, in one type: leaves on the student's side."""

    def __init__(self, z: Golden, at: str, samples: int, kind: torch.dtype, tokens: tuple[int, int] | None = None):
        self.samples, self.tokens, self.region = samples, tokens, None
        names = ("s_cls", "t_cls") if tokens else ("student", "teacher")
        self.s_cls, self.t_cls = z.tensor(f"{at}{names[0]}", kind).requires_grad_(), z.tensor(f"{at}{names[1]}", kind)
        if tokens:
            self.region = {n: z.tensor(f"{at}{n}", kind) for n in ("s_reg", "s_fea", "t_reg", "t_fea")}
            self.s_reg = self.region["s_reg"].requires_grad_()

    def cut(self, rows: Tensor) -> list[Tensor]:
        """Rows (crop, image, token) as (V_r, B, T_r, D) a resolution; the teacher's have one."""
        at = 2 * self.samples * self.tokens[0]
        parts = [(rows[:at], self.tokens[0]), (rows[at:], self.tokens[1])]
        return [part.view(-1, self.samples, t, rows.shape[1]) for part, t in parts if len(part)]

    def loss(self, method: esvit.EsViT) -> StepOutput:
        """The method's loss where these are the networks' outputs."""
        student, teacher = networks(method, self.s_cls.shape[1])
        sides = [Encoded(self.s_cls), Encoded(self.t_cls)]
        for net, side, n in ((student, sides[0], "s"), (teacher, sides[1], "t")) if self.region else ():
            features, logits = self.cut(self.region[f"{n}_fea"]), self.cut(self.region[f"{n}_reg"])
            side.regions = [x.flatten(0, 1) for x in features]
            net.heads["region"] = Logits(*(dist.region_rows(x).flatten(0, 1) for x in (features, logits)))
        views = len(self.s_cls) // self.samples
        batch = batch_of([self.s_cls], count=views)
        return method.loss(*sides, batch, method.comm)

    def pick(self) -> Tensor:
        """(B, S, 2) the teacher's tokens that the student's are compared with."""
        return dist.match_regions(self.cut(self.region["t_fea"])[0], *self.cut(self.region["s_fea"]))


def _sizes(z: Golden, case: str) -> tuple[int, int, int, tuple[int, int] | None]:
    """B, K, local views, tokens of a global and a local view."""
    if f"{case}__meta_B_K_nlocal" in z:
        batch, k, local = (int(v) for v in z[f"{case}__meta_B_K_nlocal"])
        return batch, k, local, None
    batch, ng, nl, local, k, _ = (int(v) for v in z[f"{case}__meta_B_Ng_Nl_nlocal_K_P"])
    return batch, k, local, (ng, nl)


def _step(method: esvit.EsViT, inputs: Inputs, epoch: int) -> StepOutput:
    """Loss and update of the centres in ``epoch``."""
    method.progress.step = epoch
    out = inputs.loss(method)
    method.commit(out.pending)
    return out


def losses(z: Golden, report: Report) -> None:
    """View loss (and region loss): values, gradients, centres, matches; calls in a row; ranks; soft targets."""
    for case in z.cases(r"(c\d+)__meta"):
        batch, k, local, tokens = _sizes(z, case)
        for epoch in map(int, z.cases(rf"{case}__ep(\d+)__loss$")):
            for kind, end in ((torch.float32, ""), (torch.float64, "64")):
                inputs = Inputs(z, f"{case}__", batch, kind, tokens)
                report.same(case, "logits", inputs.s_cls.shape, ((2 + local) * batch, k))
                _epoch(z, report, case, epoch, inputs, end)
        if tokens:
            _matches(z, report, case)
        method = made(z, report, k, bool(tokens), LocalComm())
        for n in sorted(map(int, z.cases(rf"{case}__seq(\d+)__loss$"))):
            at = f"{case}__seq{n}__"
            out = _step(method, Inputs(z, at, batch, torch.float32, tokens), n)
            report.close(case, f"loss of call {n}", out.loss, z[f"{at}loss"], 1e-5)
            _centres(z, report, case, f"of call {n}", method, at, "_after", 1e-6)
    for case in z.cases(r"(ws\d+)__meta"):
        _ranks(z, report, case)
    for case in z.cases(r"(mix\d*)__meta"):
        _mixed(z, report, case)


def _centres(z: Golden, report: Report, case: str, when: str, method: Any, at: str, end: str, tolerance: float) -> None:
    for name, ours in CENTRES.items():
        if hasattr(method, ours):
            report.close(case, f"{ours} {when}", getattr(method, ours), z[f"{at}{name}{end}"], tolerance, True)


def _start(z: Golden, method: esvit.EsViT, case: str, kind: torch.dtype) -> None:
    method.to(kind)
    for name, ours in CENTRES.items():
        if hasattr(method, ours):
            getattr(method, ours).copy_(z.tensor(f"{case}__{name}_before", kind))


def _epoch(z: Golden, report: Report, case: str, epoch: int, inputs: Inputs, end: str) -> None:
    at, kind = f"{case}__ep{epoch}__", inputs.s_cls.dtype
    method = made(z, report, inputs.s_cls.shape[1], bool(inputs.region), LocalComm())
    _start(z, method, case, kind)
    out = _step(method, inputs, epoch)
    values = {"loss": out.loss}
    if inputs.region:  # reported with their halves
        values |= {f"loss_{part}": 2 * out.metrics[f"loss/{part}"] for part in ("view", "region")}
    for name, value in values.items():
        report.close(case, f"{name}{end} ep{epoch}", value, z[f"{at}{name}{end}"], 1e-9 if end else 1e-5)
    _centres(z, report, case, f"{end} ep{epoch}", method, at, f"_after{end}", 1e-9 if end else 1e-6)
    if not end:
        out.loss.backward()
        leaves = {"s_cls": inputs.s_cls, "s_reg": inputs.s_reg} if inputs.region else {"student": inputs.s_cls}
        for name, leaf in leaves.items():
            report.close(case, f"gradient {name} ep{epoch}", leaf.grad, z[f"{at}grad_{name}"], 1e-6, True)


def _matches(z: Golden, report: Report, case: str) -> None:
    batch, _, local, tokens = _sizes(z, case)
    inputs = Inputs(z, f"{case}__", batch, torch.float32, tokens)
    ng, nl = tokens
    sizes, pick, margins = [ng] * 2 + [nl] * local, inputs.pick(), []
    # the pairs that count, in the order of the sum: those with a weight
    weights = dist.pair_weights(((2, ng), (local, nl))[: 1 + (local > 0)], 2, torch.device("cpu"))
    first = [sum(sizes[:v]) for v in range(len(sizes))]
    pairs = [(i, v) for i in (0, 1) for v in range(len(sizes)) if weights[first[v], i] > 0]
    report.same(case, "pairs", pairs, z[f"{case}__pairs"])
    teacher, student = inputs.cut(inputs.region["t_fea"])[0], dist.region_rows(inputs.cut(inputs.region["s_fea"]))
    for i, v in pairs:
        part = slice(first[v], first[v] + sizes[v])
        report.same(case, f"match {i} {v}", pick[:, part, i] - i * ng, z[f"{case}__match_t{i}_s{v}"])
        top = (unit(student[:, part]) @ unit(teacher[i]).mT).topk(2, -1).values
        margins.append(float((top[..., 0] - top[..., 1]).min()))
    report.close(case, "least margin", min(margins), z[f"{case}__match_min_margin"], 1e-6, True)


def _ranks(z: Golden, report: Report, case: str) -> None:
    batch, k, _, tokens = _sizes(z, case)
    epoch = report.assume(z, f"{case}__epoch", 5)

    def rank(comm: Comm) -> None:
        at, name = f"{case}__rank{comm.rank}__", f"{case} rank {comm.rank}"
        method = made(z, report, k, bool(tokens), comm)
        _start(z, method, case, torch.float32)
        out = _step(method, Inputs(z, at, batch, torch.float32, tokens), epoch)
        report.close(name, "loss", out.loss, z[f"{at}loss"], 1e-5)
        _centres(z, report, name, "", method, at, "_after", 1e-6)

    SimComm.run(len(z.cases(rf"{case}__rank(\d+)__")), rank)


def _mixed(z: Golden, report: Report, case: str) -> None:
    """Soft targets: a form of the view loss, from centres of 0."""
    batch, k, local, _ = _sizes(z, case)
    inputs = Inputs(z, f"{case}__", batch, torch.float32)
    report.same(case, "logits", inputs.s_cls.shape, ((2 + local) * batch, k))
    method = made(z, report, k, False, LocalComm())
    for epoch in map(int, z.cases(rf"{case}__ep(\d+)__loss$")):
        method.progress.step = epoch
        q = dist.targets(inputs.t_cls.unflatten(0, (2, batch)), method.centre, method.temperature())
        student, targets = inputs.s_cls.unflatten(0, (-1, batch)), z.tensor(f"{case}__targets")
        loss = dist.view_loss(student, q, method.params.student_temperature, targets)
        report.close(case, f"loss ep{epoch}", loss, z[f"{case}__ep{epoch}__loss"], 1e-5)


CHECKS = {
    "esvit_ddino": Check(losses, (r"__meta_B_Ng_Nl_nlocal_K_P$",)),
    "esvit_dino": Check(losses, (r"__meta_B_K_nlocal$",)),
}
