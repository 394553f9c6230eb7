"""EsViT and DINO: losses, centres, heads, schedules, clipping, kNN, Swin, and the whole training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_cl.comm import Comm, LocalComm, SimComm
from moe_cl.config import OptimConfig
from moe_cl.engine import optim, schedules
from moe_cl.engine.clip import GradientControl
from moe_cl.engine.flat import FlatView
from moe_cl.evals.knn import hits, knn, neighbours, vote
from moe_cl.interop.official import split
from moe_cl.losses import distillation as dist
from moe_cl.methods import esvit
from moe_cl.models.build import build_backbone
from moe_cl.models.heads import DINOHead
from tests.conformance.harness import Golden, Report
from tests.conformance.steps import load
from tests.plain import Run, batch_of

TAU_S, MOMENTUM = 0.1, 0.9  # common to the loss files


def tau(epoch: int) -> float:
    """The files' teacher temperature."""
    return dist.teacher_temperature(epoch, 0.04, 0.07, 30)


def dino(z: Golden, report: Report) -> None:
    """View loss in fp32 and fp64, its gradient, the centre; sequences of steps; soft targets."""
    for case in z.cases(r"(c\d+)__meta"):
        batch, k, nlocal = (int(v) for v in z[f"{case}__meta_B_K_nlocal"])
        for epoch in map(int, z.cases(rf"{case}__ep(\d+)__loss$")):
            at = f"{case}__ep{epoch}__"
            for kind, suffix, tolerance in ((torch.float32, "", 1e-5), (torch.float64, "64", 1e-7)):
                s = z.tensor(f"{case}__student", kind).requires_grad_()
                t, centre = z.tensor(f"{case}__teacher", kind), z.tensor(f"{case}__center_before", kind)
                report.same(case, "logits", s.shape, ((2 + nlocal) * batch, k))
                loss = _view(s, t, centre, batch, tau(epoch))
                report.close(case, f"loss{suffix} ep{epoch}", loss, z[f"{at}loss{suffix}"], tolerance)
                after = dist.next_centre(centre, t.mean(0), MOMENTUM)
                error = 1e-6 if kind == torch.float32 else 1e-9
                report.close(case, f"centre{suffix} ep{epoch}", after, z[f"{at}center_after{suffix}"], error, True)
                if kind == torch.float32:
                    loss.backward()
                    report.close(case, f"gradient ep{epoch}", s.grad, z[f"{at}grad_student"], 1e-6, True)
        centre = torch.zeros(1, k)
        for n in range(len(z.cases(rf"{case}__seq(\d+)__loss"))):
            at = f"{case}__seq{n}__"
            t = z.tensor(f"{at}teacher")
            loss = _view(z.tensor(f"{at}student"), t, centre, batch, tau(n))
            report.close(case, f"loss of step {n}", loss, z[f"{at}loss"], 1e-5)
            centre = dist.next_centre(centre, t.mean(0), MOMENTUM)
            report.close(case, f"centre of step {n}", centre, z[f"{at}center_after"], 1e-6, True)
    if "mix__student" in z:
        batch, k, _ = (int(v) for v in z["mix__meta_B_K_nlocal"])
        for epoch in map(int, z.cases(r"mix__ep(\d+)__loss")):
            args = z.tensor("mix__student"), z.tensor("mix__teacher"), torch.zeros(1, k), batch, tau(epoch)
            report.close(
                "mix", f"loss ep{epoch}", _view(*args, z.tensor("mix__targets")), z[f"mix__ep{epoch}__loss"], 1e-5
            )


def _view(s: Tensor, t: Tensor, centre: Tensor, batch: int, temperature: float, mix: Tensor | None = None) -> Tensor:
    q = dist.targets(t.unflatten(0, (2, batch)), centre, temperature)
    return dist.view_loss(s.unflatten(0, (-1, batch)), q, TAU_S, mix)


class Regions:
    """Inputs of one region case as the loss takes them."""

    def __init__(self, z: Golden, at: str, meta: tuple[int, ...], kind: torch.dtype = torch.float32):
        self.batch, self.ng, self.nl, self.nlocal = meta[:4]
        self.views = 2 + self.nlocal
        self.s_cls, self.t_cls = z.tensor(f"{at}s_cls", kind).requires_grad_(), z.tensor(f"{at}t_cls", kind)
        self.s_reg, self.t_reg = z.tensor(f"{at}s_reg", kind).requires_grad_(), z.tensor(f"{at}t_reg", kind)
        self.pick = dist.match_regions(self.cut(z.tensor(f"{at}t_fea"))[0], *self.cut(z.tensor(f"{at}s_fea")))

    def cut(self, rows: Tensor) -> list[Tensor]:
        """Rows as (V_r, B, T_r, D) a resolution; the teacher's have one."""
        at = 2 * self.batch * self.ng
        parts = [rows[:at].view(2, self.batch, self.ng, -1)]
        return parts + ([rows[at:].view(self.nlocal, self.batch, self.nl, -1)] if len(rows) > at else [])

    def losses(self, centre: Tensor, centre_region: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """View and region loss."""
        view = _view(self.s_cls, self.t_cls, centre, self.batch, temperature)
        s, t = self.cut(self.s_reg), self.cut(self.t_reg)
        weights = dist.pair_weights(tuple((x.shape[0], x.shape[2]) for x in s), 2, view.device)
        rows = dist.region_rows(s), dist.region_rows(t)
        return view, dist.region_loss(*rows, self.pick, weights, centre_region[0], TAU_S, temperature)


def ddino(z: Golden, report: Report) -> None:
    """View + region loss: value, gradients, both centres, the matches; sequences; two ranks."""
    for case in z.cases(r"(c\d+)__meta"):
        meta = tuple(int(v) for v in z[f"{case}__meta_B_Ng_Nl_nlocal_K_P"])
        for epoch in map(int, z.cases(rf"{case}__ep(\d+)__loss$")):
            for kind, suffix in ((torch.float32, ""), (torch.float64, "64")):
                _region_epoch(z, report, case, meta, epoch, kind, suffix)
        _matches(z, report, case, meta)
        centres = torch.zeros(2, 1, meta[4])
        for n in range(len(z.cases(rf"{case}__seq(\d+)__loss"))):
            at = f"{case}__seq{n}__"
            inputs = Regions(z, at, meta)
            loss = sum(inputs.losses(*centres, tau(n))) / 2
            report.close(case, f"loss of step {n}", loss, z[f"{at}loss"], 1e-5)
            means = [inputs.t_cls.mean(0), inputs.t_reg.mean(0)]
            centres = torch.stack([dist.next_centre(c, m, MOMENTUM) for c, m in zip(centres, means, strict=True)])
            for name, centre in zip(("center_after", "center_grid_after"), centres, strict=True):
                report.close(case, f"{name} of step {n}", centre, z[f"{at}{name}"], 1e-6, True)
    for case in z.cases(r"(ws\d+)__meta"):
        _ranks(z, report, case)


def _region_epoch(
    z: Golden, report: Report, case: str, meta: tuple[int, ...], epoch: int, kind: torch.dtype, suffix: str
) -> None:
    at, inputs = f"{case}__ep{epoch}__", Regions(z, f"{case}__", meta, kind)
    centres = [z.tensor(f"{case}__{n}", kind) for n in ("center_before", "center_grid_before")]
    view, region = inputs.losses(*centres, tau(epoch))
    values = {"loss": (view + region) / 2, "loss_view": view, "loss_region": region}
    for name, value in values.items():
        report.close(case, f"{name}{suffix} ep{epoch}", value, z[f"{at}{name}{suffix}"], 1e-5 if not suffix else 1e-7)
    means = [inputs.t_cls.mean(0), inputs.t_reg.mean(0)]
    for name, centre, mean in zip(("center_after", "center_grid_after"), centres, means, strict=True):
        got = dist.next_centre(centre, mean, MOMENTUM)
        report.close(
            case, f"{name}{suffix} ep{epoch}", got, z[f"{at}{name}{suffix}"], 1e-6 if not suffix else 1e-9, True
        )
    if not suffix:
        values["loss"].backward()
        for name, leaf in (("grad_s_cls", inputs.s_cls), ("grad_s_reg", inputs.s_reg)):
            report.close(case, f"{name} ep{epoch}", leaf.grad, z[f"{at}{name}"], 1e-6, True)


def _matches(z: Golden, report: Report, case: str, meta: tuple[int, ...]) -> None:
    inputs = Regions(z, f"{case}__", meta)
    sizes = [inputs.ng] * 2 + [inputs.nl] * inputs.nlocal
    pairs = [(i, v) for i in (0, 1) for v in range(inputs.views) if v != i]
    report.same(case, "pairs", z[f"{case}__pairs"], pairs)
    report.same(case, "no ties", bool(z[f"{case}__match_min_margin"] > 0), True)
    for i, v in pairs:
        start = sum(sizes[:v])
        ours = inputs.pick[:, start : start + sizes[v], i] - i * inputs.ng
        report.same(case, f"match {i} {v}", ours, z[f"{case}__match_t{i}_s{v}"])


def _ranks(z: Golden, report: Report, case: str) -> None:
    meta = tuple(int(v) for v in z[f"{case}__meta_B_Ng_Nl_nlocal_K_P"])
    centres = [z.tensor(f"{case}__{n}") for n in ("center_before", "center_grid_before")]

    def rank(comm: Comm) -> None:
        at, name = f"{case}__rank{comm.rank}__", f"{case} rank {comm.rank}"
        inputs = Regions(z, at, meta)
        report.close(name, "loss", sum(inputs.losses(*centres, tau(5))) / 2, z[f"{at}loss"], 1e-5)
        means = comm.all_reduce(torch.stack([inputs.t_cls.mean(0), inputs.t_reg.mean(0)]), "mean")
        for key, centre, mean in zip(("center_after", "center_grid_after"), centres, means, strict=True):
            report.close(name, key, dist.next_centre(centre, mean, MOMENTUM), z[f"{at}{key}"], 1e-6, True)

    SimComm.run(len(z.cases(rf"{case}__rank(\d+)__")), rank)


def head(z: Golden, report: Report) -> None:
    """DINO heads: train and eval output, all gradients, batch-norm state, what is trained, the start."""
    for case in z.cases(r"(h\d+)__meta"):
        dim, out, bn, norm_last, layers = (int(v) for v in z[f"{case}__meta_in_out_bn_normlast_nlayers"])
        state = {k: torch.from_numpy(np.array(v)) for k, v in z.under(f"{case}__sd__").items()}
        bottleneck = state["last_layer.weight_v"].shape[1]
        hidden = state["mlp.weight" if layers == 1 else "mlp.0.weight"].shape[0]
        net = DINOHead(dim, out, hidden, bottleneck, layers, use_bn=bool(bn), norm_last_layer=bool(norm_last))
        net.load_state_dict(state, strict=True)
        trained = [n for n, p in net.named_parameters() if p.requires_grad]
        report.same(case, "trained", sorted(trained), sorted(str(n) for n in z[f"{case}__requires_grad"]))
        x = z.tensor(f"{case}__x").requires_grad_()
        y = net(x)
        (y * z.tensor(f"{case}__r")).sum().backward()
        report.close(case, "train", y, z[f"{case}__y_train"], 1e-5)
        report.close(case, "gradient x", x.grad, z[f"{case}__grad_x"], 1e-5)
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        report.each(case, "gradients", grads, z.under(f"{case}__grad__"), 1e-5, floor=0.1)
        if after := z.under(f"{case}__sd_after__"):
            report.each(case, "statistics", net.state_dict(), after, 1e-5)
        report.close(case, "eval", net.eval()(x), z[f"{case}__y_eval"], 1e-5)
    _start(z, report)


def _start(z: Golden, report: Report) -> None:
    """Names, shapes and statistics of a fresh head of the size in the file."""
    names, shapes = [str(n) for n in z["init__names"]], [str(s) for s in z["init__shapes"]]
    sizes = {
        n: [int(v) for v in s.strip("()[]").replace("x", ",").split(",") if v.strip()]
        for n, s in zip(names, shapes, strict=True)
    }
    torch.manual_seed(0)  # the largest of many draws is compared: of this start, not of whatever ran before
    net = DINOHead(sizes["mlp.0.weight"][1], sizes["last_layer.weight_v"][0], sizes["mlp.0.weight"][0])
    state = {n: p.detach() for n, p in net.named_parameters()}
    report.same("start", "names", sorted(state), sorted(names))
    for name, std, most in zip(names, z["init__std"], z["init__absmax"], strict=True):
        report.same("start", f"{name} shape", list(state[name].shape), sizes[name])
        report.close("start", f"{name} std", state[name].std(), std, 0.02)
        report.close("start", f"{name} largest", state[name].abs().max(), most, 0.15)


def sched(z: Golden, report: Report) -> None:
    """Teacher temperature an epoch; learning rate, decay and momentum an iteration."""
    for case in z.cases(r"(ttemp\d+)$"):
        start, end, warmup, epochs = z[f"{case}__args_warmup_final_warmepochs_epochs"]
        ours = [dist.teacher_temperature(e, start, end, int(warmup)) for e in range(int(epochs))]
        report.close(case, "temperature", ours, z[case], 1e-12)
    for case in z.cases(r"(cos\d+)$"):
        base, end, epochs, n, warm, start = z[f"{case}__args_base_final_epochs_niter_warmep_startwarm"]
        ours = [schedules.dino(i, int(n), base, end, epochs, warm, start) for i in range(int(epochs * n))]
        report.close(case, "curve", ours, z[case], 1e-12)


def optimizer(z: Golden, report: Report) -> None:
    """Each tensor clipped on its own; the last layer skipped; LARS."""
    for case in z.cases(r"(clip\d+)__"):
        model = nn.Module()
        grads = z.under(f"{case}__g__")
        for name, g in grads.items():
            part, leaf = name.split(".")
            if not hasattr(model, part):
                model.add_module(part, nn.Module())
            getattr(model, part).register_parameter(leaf, nn.Parameter(torch.zeros(g.shape)))
        cfg = OptimConfig(name="sgd", momentum=0.0, weight_decay=0.0, clip_per_tensor=float(z[f"{case}__clip"]))
        opt = optim.build(optim.param_groups(model, cfg), cfg, 1.0)
        params = dict(model.named_parameters())
        for name, p in params.items():
            p.grad = torch.from_numpy(np.array(grads[name]))
        control = GradientControl(FlatView(model, opt), cfg)
        norms = dict(zip(control.slots, control._sums(*control._present(), 1.0)[:, 0].sqrt(), strict=True))
        report.close(case, "norms", [float(norms[n]) for n in grads], z[f"{case}__norms"], 1e-6)
        control()
        report.each(case, "clipped", {n: p.grad for n, p in params.items()}, z.under(f"{case}__g_after__"), 1e-6)
        method = esvit.EsViT(esvit.Params(out_dim=2, regions=False), LocalComm())
        for pattern, frozen in method.frozen().items():
            optim.freeze(opt, pattern, frozen)
        opt.step()
        still = sorted(n for n, p in params.items() if not p.detach().any())
        report.same(case, "skipped", still, sorted(map(str, z[f"{case}__none_after_cancel_ep0_freeze1"])))
    for case in z.cases(r"(lars)__lr"):
        lr, decay, momentum, eta = (float(v) for v in z[f"{case}__lr_wd_momentum_eta"])
        numbers = z.cases(rf"{case}__p(\d+)_init")
        params = [nn.Parameter(z.tensor(f"{case}__p{i}_init")) for i in numbers]
        opt = optim.LARS(params, lr, decay, momentum, eta)
        for s in range(len(z.cases(rf"{case}__p0_after(\d+)"))):
            for i, p in zip(numbers, params, strict=True):
                p.grad = z.tensor(f"{case}__g{i}_step{s}")
            opt.step()
            for i, p in zip(numbers, params, strict=True):
                report.close(case, f"p{i} after {s}", p, z[f"{case}__p{i}_after{s}"], 1e-4)


def neighbours_vote(z: Golden, report: Report) -> None:
    """kNN: accuracies at every k, and which test rows are right."""
    for case in z.cases(r"(k\d+)__train_x"):
        bank, test = z.tensor(f"{case}__train_x"), z.tensor(f"{case}__test_x")
        bank_y, test_y = z.tensor(f"{case}__train_y"), z.tensor(f"{case}__test_y")
        classes = int(z[f"{case}__num_classes"])
        for k in map(int, z.cases(rf"{case}__k(\d+)__top1_top5")):
            out = knn(bank, bank_y, test, test_y, classes, k)
            got = [100 * out["top1"], 100 * out["top5"]]
            report.close(case, f"accuracy, k {k}", got, z[f"{case}__k{k}__top1_top5"], 1e-9)
            similarity, index = neighbours(
                nn.functional.normalize(bank, dim=1), nn.functional.normalize(test, dim=1), k
            )
            scores = vote(similarity, bank_y[index], classes, 0.07)
            for top in (1, 5):
                if f"{case}__k{k}__hit{top}" in z:
                    report.same(case, f"hits {top}, k {k}", hits(scores, test_y, top), z[f"{case}__k{k}__hit{top}"])


def swin_options(student: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a Swin from its published state."""
    tables = {k: v.shape for k, v in student.items() if k.endswith("relative_position_bias_table")}
    stages = 1 + max(int(k.split(".")[2]) for k in tables)
    depths = [sum(k.startswith(f"backbone.layers.{s}.") for k in tables) for s in range(stages)]
    heads = [next(v[1] for k, v in tables.items() if k.startswith(f"backbone.layers.{s}.")) for s in range(stages)]
    window = (round(max(v[0] for v in tables.values()) ** 0.5) + 1) // 2
    return {"dim": student["backbone.patch_embed.proj.weight"].shape[0], "depths": depths, "heads": heads,
            "window": window}  # fmt: skip


def head_options(student: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of the DINO heads."""
    out, bottleneck = student["heads.view.last_layer.weight_v"].shape
    return {"out_dim": out, "bottleneck": bottleneck, "hidden": student["heads.view.mlp.0.weight"].shape[0]}


def swin(z: Golden, report: Report) -> None:
    """Multi-crop forward with both heads, features of the last blocks, attention, decay groups."""
    for case in z.cases(r"(\w+?)__sd__"):
        student = split(z.under(f"{case}__sd__")).student
        method = esvit.EsViT(esvit.Params(**head_options(student)), LocalComm())
        net = method.build_student(build_backbone("swin", **swin_options(student)))
        net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in student.items()}, strict=True)
        net.eval()
        x = [z.tensor(f"{case}__{n}", torch.float32) for n in ("x224", "x96")]
        with torch.no_grad():
            out = net("encode", x, None, [len(v) for v in x])
            regions = torch.cat([r.flatten(0, 1) for r in out.regions])
            report.same(case, "tokens", [r.shape[1] for r in out.regions], z[f"{case}__npatch"])
            report.close(case, "region features", regions, z[f"{case}__region_fea"], 1e-4, True)
            report.close(case, "view logits", net("heads", "view", out.features), z[f"{case}__cls_out"], 1e-4, True)
            report.close(case, "region logits", net("heads", "region", regions), z[f"{case}__region_out"], 1e-4, True)
            for size, view in zip((224, 96), x, strict=True):
                one = net.backbone([view[:1]])
                last = {f"last{n}": net.backbone.last_features(view[:1], n) for n in (1, 4)}
                for name, got in {"pooled": one.features, "regions": one.regions[0], **last}.items():
                    report.close(case, f"{name} {size}", got, z[f"{case}__{name}_{size}"], 1e-4, True)
            weights = net.backbone.attention(x[0][:1]).mean((0, 1))
            report.close(case, "attention", weights, z[f"{case}__last_attn_224_mean_over_windows_heads"], 1e-4, True)
        names = {id(p): n for n, p in net.named_parameters()}
        groups = optim.param_groups(net, OptimConfig(decay="matrices"))
        for key, decayed in (("group_decay", True), ("group_nodecay", False)):
            ours = sorted(names[id(p)] for g in groups for p in g["params"] if g["decayed"] == decayed)
            want = split({str(n): 0 for n in z[f"{case}__{key}"]}).student
            report.same(case, key, ours, sorted(want))


def step(z: Golden, report: Report) -> None:
    """The published training loop: clip, frozen last layer, decay and momentum schedules, AdamW, EMA after the step."""
    batch, nlocal, epochs, k = (int(v) for v in z["meta_B_nlocal_epochs_K"])
    state = split({"student": z.under("init__"), "teacher": z.under("init__")})
    params = esvit.Params(
        **head_options(state.student), warmup_teacher_epochs=2, freeze_last_layer=int(z["freeze_last_layer"])
    )
    method = esvit.EsViT(params, LocalComm())
    options = swin_options(state.student)
    nets = [build(build_backbone("swin", **options)) for build in (method.build_student, method.build_teacher)]
    load((method, *nets), state)
    run = Run(method, *nets)
    cfg = OptimConfig(weight_decay=float(z["wd"][0]), decay="matrices", clip_per_tensor=float(z["clip_grad"]))
    opt = optim.build(optim.param_groups(run.student, cfg), cfg, 0.0)
    run.optimize(opt)
    run.before_clip = GradientControl(FlatView(run.student, opt), cfg)
    method.progress.steps_per_epoch, method.progress.epochs = 1, epochs
    peak, last, warmup = float(z["lr"].max()), 1e-6, int(np.argmax(z["lr"])) + 1
    momentum = schedules.dino(0, 1, float(z["momentum"][0]), 1.0, epochs)
    report.close("schedules", "first momentum", momentum, z["momentum"][0], 1e-12)
    for e in range(epochs):
        at, method.progress.step = f"ep{e}__", e
        report.close(at, "lr", schedules.dino(e, 1, peak, last, epochs, warmup), z[f"{at}lr"], 1e-6, floor=peak)
        report.close(at, "decay", schedules.dino(e, 1, 0.04, 0.4, epochs), z[f"{at}wd"], 1e-9)
        optim.set_hyper(opt, float(z["lr"][e]), float(z["wd"][e]))
        views = [z.tensor(at + n, torch.float32).flatten(0, 1) for n in ("x224", "x96")]
        report.same(at, "views", sum(map(len, views)), (2 + nlocal) * batch)
        loss = run.step(batch_of(views, count=2 + nlocal), float(z["momentum"][e]))
        report.close(at, "loss", loss, z[f"{at}loss"], 1e-4, True)
        report.close(at, "centre", method.centre, z[f"{at}center"], 1e-5, True)
        report.close(at, "region centre", method.centre_region, z[f"{at}center_grid"], 1e-5, True)
        names = split({str(n): i for i, n in enumerate(z[f"{at}grad_norm_names"])}).student
        norms = z[f"{at}grad_norms_before_clip"]
        report.close(at, "gradient norms", [float(run.grads[n].norm()) for n in names], norms, 1e-2)
        report.close(
            at, "last layer", run.student.heads["view"].last_layer.weight_v, z[f"{at}student_last_layer_v"], 2e-3, True
        )
        report.close(
            at, "teacher norm", run.teacher.module.backbone.norm.weight, z[f"{at}teacher_norm_weight"], 5e-4, True
        )
    report.same("end", "prototypes", method.centre.shape[1], k)
    for side, module, most in (("student", run.student, 2e-3), ("teacher", run.teacher.module, 5e-4)):
        want, got = split(z.under(f"{side}_final__")).student, module.state_dict()
        errors = np.concatenate([np.abs(got[n].numpy() - v).ravel() for n, v in want.items()])
        report.close("end", f"{side}, largest", errors.max(), 0, most, True)
        report.close("end", f"{side}, share above 1e-4", np.mean(errors > 1e-4), 0, 1e-3, True)


CHECKS = {
    "esvit_dino": dino,
    "esvit_ddino": ddino,
    "esvit_head": head,
    "esvit_sched": sched,
    "esvit_optim": optimizer,
    "esvit_knn": neighbours_vote,
    "esvit_swin": swin,
    "esvit_step": step,
}
