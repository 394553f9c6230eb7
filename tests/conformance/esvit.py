"""Parts of EsViT and DINO: heads, schedules, clipping, kNN."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_cl.comm import LocalComm
from moe_cl.config import OptimConfig
from moe_cl.engine import optim, schedules
from moe_cl.engine.clip import GradientControl
from moe_cl.engine.flat import FlatView
from moe_cl.evals.knn import hits, knn, neighbours, vote
from moe_cl.losses import distillation as dist
from moe_cl.methods import esvit
from moe_cl.models.heads import DINOHead
from tests.conformance.given import module_of
from tests.conformance.harness import Check, Golden, Report, whole


def head_sizes(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a DINO head (``mlp.*``, ``last_layer.*``) from the shapes of its tensors, as ``DINOHead`` names them."""
    linears = [
        shape for name, shape in shapes.items() if re.fullmatch(r"mlp(\.\d+)?\.weight", name) and len(shape) == 2
    ]
    normed = [n for n, s in shapes.items() if re.fullmatch(r"mlp\.\d+\.weight", n) and len(s) == 1]
    out, bottleneck = shapes["last_layer.weight_v"]
    return {"dim": linears[0][1], "out": out, "hidden": linears[0][0], "bottleneck": bottleneck,
            "layers": len(linears), "use_bn": bool(normed)}  # fmt: skip


def head(z: Golden, report: Report) -> None:
    """DINO heads: train and eval output, all gradients, batch-norm state, what is trained, the start."""
    for case in z.cases(r"(.+?)__meta"):
        dim, out, bn, norm_last, layers = (int(v) for v in z[f"{case}__meta_in_out_bn_normlast_nlayers"])
        state = {k: torch.from_numpy(np.array(v)) for k, v in z.under(f"{case}__sd__").items()}
        sizes = head_sizes({k: v.shape for k, v in state.items()})
        found = [sizes[n] for n in ("dim", "out", "use_bn", "layers")]
        report.same(case, "sizes", found, (dim, out, bn if layers > 1 else False, layers))
        net = DINOHead(
            dim, out, sizes["hidden"], sizes["bottleneck"], layers, use_bn=bool(bn), norm_last_layer=bool(norm_last)
        )
        net.load_state_dict(state, strict=True)
        trained = [n for n, p in net.named_parameters() if p.requires_grad]
        report.same(case, "trained", sorted(trained), sorted(str(n) for n in z[f"{case}__requires_grad"]))
        x = z.tensor(f"{case}__x").requires_grad_()
        y = net(x)
        (y * z.tensor(f"{case}__r")).sum().backward()
        report.close(case, "train", y, z[f"{case}__y_train"], 1e-5)
        report.close(case, "gradient x", x.grad, z[f"{case}__grad_x"], 1e-5)
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        want = z.under(f"{case}__grad__")
        # a bias before a batch norm has a gradient of 0 by maths, float noise in the file
        floor = 1e-2 * max(float(np.abs(v).max()) for v in want.values())
        report.each(case, "gradients", grads, want, 1e-5, floor=floor)
        if after := z.under(f"{case}__sd_after__"):
            report.each(case, "statistics", net.state_dict(), after, 1e-5)
        report.close(case, "eval", net.eval()(x), z[f"{case}__y_eval"], 1e-5)
    if "init__names" in z:
        _start(z, report)


def _start(z: Golden, report: Report) -> None:
    """Names, shapes and statistics of a fresh head of the size in the file.

    Both sides are draws, so the tolerances are the spread of a statistic over draws: of the standard deviation of n
    values 1/sqrt(2n), of the largest |value| of n normals 1.28 / (2 ln 2n); constants and uniform bounds are exact.
    """
    names = [str(n) for n in z["init__names"]]
    sizes = {
        name: tuple(int(v) for v in re.findall(r"\d+", str(shape)))
        for name, shape in zip(names, z["init__shapes"], strict=True)
    }
    torch.manual_seed(0)
    net = DINOHead(**head_sizes(sizes))
    state = {n: p.detach() for n, p in net.named_parameters()}
    report.same("start", "names", sorted(state), sorted(names))
    for name, std, most in zip(names, z["init__std"], z["init__absmax"], strict=True):
        ours, n = state[name], math.prod(sizes[name])
        normal = name.startswith("mlp.") and len(sizes[name]) == 2
        report.same("start", f"{name} shape", tuple(ours.shape), sizes[name])
        report.close("start", f"{name} std", ours.std(), std, 6 / n**0.5 if std else 0.0)
        spread = 4.5 / math.log(2 * n) if normal else (10 / n if std else 0.0)
        report.close("start", f"{name} largest", ours.abs().max(), most, spread)


def sched(z: Golden, report: Report) -> None:
    """Teacher temperature an epoch; learning rate, decay and momentum an iteration."""
    for case in z.cases(r"(.+)__args_warmup_final_warmepochs_epochs$"):
        start, end, warmup, epochs = z[f"{case}__args_warmup_final_warmepochs_epochs"]
        ours = [dist.teacher_temperature(e, start, end, whole(warmup)) for e in range(whole(epochs))]
        report.close(case, "temperature", ours, z[case], 1e-12)
    for case in z.cases(r"(.+)__args_base_final_epochs_niter_warmep_startwarm$"):
        base, end, epochs, n, warm, start = z[f"{case}__args_base_final_epochs_niter_warmep_startwarm"]
        epochs, n = whole(epochs), whole(n)
        ours = [schedules.dino(i, n, base, end, epochs, warm, start) for i in range(epochs * n)]
        report.close(case, "curve", ours, z[case], 1e-12, floor=abs(base))


def optimizer(z: Golden, report: Report) -> None:
    """Each tensor clipped on its own; the last layer skipped; LARS."""
    for case in z.cases(r"(.+?)__clip$"):
        grads = z.under(f"{case}__g__")
        model = module_of({name: np.zeros_like(g) for name, g in grads.items()})
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
        for end in z.cases(rf"{case}__none_after_cancel_(ep\d+_freeze\d+)$"):
            epoch, freeze = (int(n) for n in re.findall(r"\d+", end))
            method = esvit.EsViT(esvit.Params(out_dim=2, regions=False, freeze_last_layer=freeze), LocalComm())
            method.progress.step = epoch
            for pattern, frozen in method.frozen().items():
                optim.freeze(opt, pattern, frozen)
            before = {n: p.detach().clone() for n, p in params.items()}
            opt.step()
            still = sorted(n for n, p in params.items() if torch.equal(p.detach(), before[n]))
            report.same(case, f"skipped {end}", still, sorted(map(str, z[f"{case}__none_after_cancel_{end}"])))
    for case in z.cases(r"(.+)__lr_wd_momentum_eta$"):
        lr, decay, momentum, eta = (float(v) for v in z[f"{case}__lr_wd_momentum_eta"])
        numbers = z.cases(rf"{case}__p(\d+)_init")
        params = [nn.Parameter(z.tensor(f"{case}__p{i}_init")) for i in numbers]
        opt = optim.LARS(params, lr, decay, momentum, eta)
        for s in range(len(z.cases(rf"{case}__p{numbers[0]}_after(\d+)"))):
            for i, p in zip(numbers, params, strict=True):
                p.grad = z.tensor(f"{case}__g{i}_step{s}")
            opt.step()
            for i, p in zip(numbers, params, strict=True):
                # float32's last bits: a step is some 1e-3 of the weights, so a rougher look would miss a wrong one
                report.close(case, f"p{i} after {s}", p, z[f"{case}__p{i}_after{s}"], 5e-7)


def neighbours_vote(z: Golden, report: Report) -> None:
    """kNN: accuracies at every k, and which test rows are right."""
    t = report.assume(z, "T", 0.07)
    for case in z.cases(r"(.+?)__train_x$"):
        bank, test = z.tensor(f"{case}__train_x"), z.tensor(f"{case}__test_x")
        bank_y, test_y = z.tensor(f"{case}__train_y"), z.tensor(f"{case}__test_y")
        classes = int(z[f"{case}__num_classes"])
        unit = [nn.functional.normalize(x, dim=1) for x in (bank, test)]
        for name, ours, theirs in zip(("train", "test"), unit, (bank, test), strict=True):
            report.close(case, f"{name} rows at unit length", ours, theirs, 1e-6, True)
        for k in map(int, z.cases(rf"{case}__k(\d+)__top1_top5$")):
            out = knn(bank, bank_y, test, test_y, classes, k, t)
            got = [100 * out["top1"], 100 * out["top5"]]
            report.close(case, f"accuracy, k {k}", got, z[f"{case}__k{k}__top1_top5"], 1e-9)
            similarity, index = neighbours(*unit, k)
            scores = vote(similarity, bank_y[index], classes, t)
            for top in map(int, z.cases(rf"{case}__k{k}__hit(\d+)$")):
                report.same(case, f"hits {top}, k {k}", hits(scores, test_y, top), z[f"{case}__k{k}__hit{top}"])


CHECKS = {
    "esvit_head": Check(head, (r"__meta_in_out_bn_normlast_nlayers$",)),
    "esvit_sched": Check(sched, (r"__args_(warmup_final|base_final)_",)),
    "esvit_optim": Check(optimizer, (r"__g_after__|__lr_wd_momentum_eta$",)),
    "esvit_knn": Check(neighbours_vote, (r"__train_x$", r"__num_classes$")),
}
