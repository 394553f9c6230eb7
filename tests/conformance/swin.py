"""EsViT's Swin: multi-crop forward with both heads, and the published training loop over several epochs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moe_cl.comm import LocalComm
from moe_cl.config import OptimConfig
from moe_cl.engine import optim, schedules
from moe_cl.engine.clip import GradientControl
from moe_cl.engine.flat import FlatView
from moe_cl.interop.official import split
from moe_cl.methods import esvit
from moe_cl.models.build import build_backbone
from tests.conformance.esvit import head_sizes
from tests.conformance.harness import Check, Golden, Report
from tests.conformance.steps import compared, load
from tests.plain import Run, batch_of

FEATURES = 1e-4  # as the specification has it, of all outputs


def swin_options(student: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Sizes of a Swin from its published state; ``size`` of the global crops decides its windows."""
    tables = {k: v.shape for k, v in student.items() if k.endswith("relative_position_bias_table")}
    stages = 1 + max(int(k.split(".")[2]) for k in tables)
    depths = [sum(k.startswith(f"backbone.layers.{s}.") for k in tables) for s in range(stages)]
    heads = [next(v[1] for k, v in tables.items() if k.startswith(f"backbone.layers.{s}.")) for s in range(stages)]
    window = (round(max(v[0] for v in tables.values()) ** 0.5) + 1) // 2
    dim, channels, patch, _ = student["backbone.patch_embed.proj.weight"].shape
    hidden = next(v.shape[0] for k, v in student.items() if k.endswith("layers.0.blocks.0.mlp.fc1.weight"))
    return {
        "dim": dim, "depths": depths, "heads": heads, "window": window, "img_size": size, "patch_size": patch,
        "in_chans": channels, "mlp_ratio": hidden / dim,
    }  # fmt: skip


def head_options(student: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the DINO heads."""
    at = "heads.view."
    sizes = head_sizes({k.removeprefix(at): v.shape for k, v in student.items() if k.startswith(at)})
    names = {"out": "out_dim", "hidden": "hidden", "bottleneck": "bottleneck", "layers": "head_layers",
             "use_bn": "head_bn"}  # fmt: skip
    return {ours: sizes[name] for name, ours in names.items()} | {"regions": any("heads.region." in k for k in student)}


def _crops(z: Golden, at: str) -> list[int]:
    """Sizes of the crops of a case, the global ones first."""
    return sorted(map(int, z.cases(rf"{re.escape(at)}x(\d+)$")), reverse=True)


def swin(z: Golden, report: Report) -> None:
    """Multi-crop forward with both heads, features of the last blocks, attention, decay groups."""
    for case in z.cases(r"(.+?)__sd__"):
        student, sizes = split(z.under(f"{case}__sd__")).student, _crops(z, f"{case}__")
        decayed = {str(n) for key in ("group_decay", "group_nodecay") for n in z[f"{case}__{key}"]}
        frozen = not any("last_layer.weight_g" in n for n in decayed)
        method = esvit.EsViT(esvit.Params(**head_options(student), norm_last_layer=frozen), LocalComm())
        net = method.build_student(build_backbone("swin", **swin_options(student, sizes[0])))
        net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in student.items()}, strict=True)
        net.eval()
        x = [z.tensor(f"{case}__x{size}", torch.float32) for size in sizes]
        with torch.no_grad():
            out = net("encode", x, None, [len(v) for v in x])
            regions = torch.cat([r.flatten(0, 1) for r in out.regions])
            values = {"npatch": [r.shape[1] for r in out.regions], "region_fea": regions}
            values["cls_out"] = net("heads", "view", out.features)
            if "region" in net.heads:
                values["region_out"] = net("heads", "region", regions)
            for size, view in zip(sizes, x, strict=True):
                one = net.backbone([view[:1]])
                values |= {f"pooled_{size}": one.features, f"regions_{size}": one.regions[0]}
                for n in map(int, z.cases(rf"{case}__last(\d+)_{size}$")):
                    values[f"last{n}_{size}"] = net.backbone.last_features(view[:1], n)
                if f"{case}__last_attn_{size}_mean_over_windows_heads" in z:
                    weights = net.backbone.attention(view[:1]).mean((0, 1))
                    values[f"last_attn_{size}_mean_over_windows_heads"] = weights
        for name, got in values.items():
            report.close(case, name, got, z[f"{case}__{name}"], FEATURES, True)
        names = {id(p): n for n, p in net.named_parameters()}
        groups = optim.param_groups(net, OptimConfig(decay="matrices"))
        for key, decays in (("group_decay", True), ("group_nodecay", False)):
            ours = sorted(names[id(p)] for g in groups for p in g["params"] if g["decayed"] == decays)
            want = split({str(n): 0 for n in z[f"{case}__{key}"]}).student
            report.same(case, key, ours, sorted(want))


def curve_end(report: Report, name: str, values: Sequence[float], end: float, epochs: int, warmup: int = 0) -> float:
    """What a cosine over ``epochs`` goes to: the specification's ``end`` where the last value is on that curve, else
    what the last value says. It stays short of its end, so no array holds it."""
    peak = max(values) if warmup else values[0]
    got = schedules.dino(epochs - 1, 1, peak, end, epochs, warmup)
    share = schedules.dino(epochs - 1, 1, 0.0, 1.0, epochs, warmup)
    if abs(got - values[-1]) > 1e-6 * abs(peak) and share > 0:
        end = float((values[-1] - (1 - share) * peak) / share)
    report.suppose(f"{name} goes to {end:g}")
    return end


def step(z: Golden, report: Report) -> None:
    """The published training loop: clip, frozen last layer, decay and momentum schedules, AdamW, EMA after the step."""
    batch, nlocal, epochs, k = (int(v) for v in z["meta_B_nlocal_epochs_K"])
    state = split({"student": z.under("init__"), "teacher": z.under("init__")})
    params = esvit.Params(
        **head_options(state.student),
        student_temperature=report.assume(z, "student_temp", 0.1),
        teacher_temperature=report.assume(z, "teacher_temp", 0.07),
        warmup_teacher_temperature=report.assume(z, "warmup_teacher_temp", 0.04),
        warmup_teacher_epochs=report.assume(z, "warmup_teacher_temp_epochs", 2),
        centre_momentum=report.assume(z, "center_momentum", 0.9),
        freeze_last_layer=int(z["freeze_last_layer"]),
    )
    method = esvit.EsViT(params, LocalComm())
    options = swin_options(state.student, _crops(z, "ep0__")[0])
    nets = [build(build_backbone("swin", **options)) for build in (method.build_student, method.build_teacher)]
    load((method, *nets), state)
    run = Run(method, *nets)
    lr, decay, momentum = _schedules(z, report, epochs)
    cfg = OptimConfig(weight_decay=decay[0], decay="matrices", clip_per_tensor=float(z["clip_grad"]))
    opt = optim.build(optim.param_groups(run.student, cfg), cfg, 0.0)
    run.optimize(opt)
    run.before_clip = GradientControl(FlatView(run.student, opt), cfg)
    method.progress.steps_per_epoch, method.progress.epochs = 1, epochs
    report.same("start", "prototypes", method.centre.shape[1], k)
    for e in range(epochs):
        at, method.progress.step = f"ep{e}__", e
        report.close(at, "lr", lr[e], z[f"{at}lr"], 1e-6, floor=max(lr))
        report.close(at, "decay", decay[e], z[f"{at}wd"], 1e-9)
        optim.set_hyper(opt, lr[e], decay[e])
        views = [z.tensor(f"{at}x{size}", torch.float32).flatten(0, 1) for size in _crops(z, at)]
        report.same(at, "views", sum(map(len, views)), (2 + nlocal) * batch)
        loss = run.step(batch_of(views, count=2 + nlocal), momentum[e])
        report.close(at, "loss", loss, z[f"{at}loss"], 1e-4, True)
        report.close(at, "centre", method.centre, z[f"{at}center"], 1e-6, True)
        report.close(at, "region centre", method.centre_region, z[f"{at}center_grid"], 1e-6, True)
        norms = dict(zip(map(str, z[f"{at}grad_norm_names"]), z[f"{at}grad_norms_before_clip"], strict=True))
        floor = 1e-2 * max(norms.values())
        report.each(
            at, "gradient norms", {n: g.norm() for n, g in run.grads.items()}, compared(norms), 1e-4, floor=floor
        )
        ours = run.student.heads["view"].last_layer.weight_v
        report.close(at, "last layer", ours, z[f"{at}student_last_layer_v"], 2e-3, True)
        ours = run.teacher.module.backbone.norm.weight
        report.close(at, "teacher norm", ours, z[f"{at}teacher_norm_weight"], 5e-4, True)
    for side, module, most in (("student", run.student, 2e-3), ("teacher", run.teacher.module, 5e-4)):
        want, got = split(z.under(f"{side}_final__")).student, module.state_dict()
        errors = {n: np.abs(got[n].numpy() - v) for n, v in want.items()}
        report.same("end", f"{side}, names", sorted(want), sorted(n for n, _ in module.named_parameters()))
        report.each(
            "end", f"{side}, largest", errors, {n: np.zeros_like(v) for n, v in errors.items()}, most, absolute=True
        )
        off = np.concatenate([v.ravel() for v in errors.values()])
        report.close("end", f"{side}, share above 1e-4", np.mean(off > 1e-4), 0, 1e-3, True)


def _schedules(z: Golden, report: Report, epochs: int) -> tuple[list[float], list[float], list[float]]:
    """Learning rate, decay and momentum an epoch (one iteration each): ours, on the curves that the file's are on."""
    rates, decays, momenta = (z[n].tolist() for n in ("lr", "wd", "momentum"))
    warmup = 1 + int(np.argmax(rates)) if rates[0] < max(rates) else 0
    end = curve_end(report, "lr", rates, 1e-6, epochs, warmup)
    lr = [schedules.dino(e, 1, max(rates), end, epochs, warmup) for e in range(epochs)]
    end = curve_end(report, "decay", decays, 0.4, epochs)
    decay = [schedules.dino(e, 1, decays[0], end, epochs) for e in range(epochs)]
    end = curve_end(report, "momentum", momenta, 1.0, epochs)
    momentum = [schedules.dino(e, 1, momenta[0], end, epochs) for e in range(epochs)]
    for name, ours, theirs in (("lr", lr, rates), ("decay", decay, decays), ("momentum", momentum, momenta)):
        report.close("schedules", name, ours, theirs, 1e-6 if name == "lr" else 1e-9, floor=math.ulp(1.0))
    return lr, decay, momentum


CHECKS = {
    "esvit_swin": Check(swin, (r"__sd__", r"__npatch$")),
    "esvit_step": Check(step, (r"^meta_B_nlocal_epochs_K$", r"^ep0__loss$")),
}
