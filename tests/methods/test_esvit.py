"""EsViT: four steps of the published training loop, any crops, MoE backbones, two ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_cl.comm import LocalComm, SimComm
from moe_cl.config import MoEConfig, OptimConfig
from moe_cl.engine import optim
from moe_cl.engine.clip import GradientControl
from moe_cl.engine.flat import FlatView
from moe_cl.methods import esvit
from moe_cl.models.build import build_backbone
from tests.plain import Run, batch_of
from tests.tiny import load, under

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = {"head.": "heads.view.", "head_dense.": "heads.region.", "": "backbone."}
SMALL = dict(dim=8, depths=[2, 2, 2, 2], heads=[2, 2, 4, 4])


def ours(name):
    theirs = next(k for k in NAMES if name.startswith(k))
    return NAMES[theirs] + name.removeprefix(theirs)


def test_published_loop():
    z = np.load(GOLDEN / "esvit_step.npz")
    batch, nlocal, epochs, k = (int(v) for v in z["meta_B_nlocal_epochs_K"])
    method = esvit.EsViT(
        esvit.Params(out_dim=k, hidden=32, bottleneck=12, warmup_teacher_epochs=2, freeze_last_layer=1), LocalComm()
    )
    student = method.build_student(build_backbone("swin", **SMALL, window=7))
    teacher = method.build_teacher(build_backbone("swin", **SMALL, window=7))
    start = {ours(n): v for n, v in under(z, "init__").items()}
    load(student, start, {"": ""}), load(teacher, start, {"": ""})
    run = Run(method, student, teacher)
    cfg = OptimConfig(weight_decay=0.04, decay="matrices", clip_per_tensor=float(z["clip_grad"]))
    optimizer = optim.build(optim.param_groups(student, cfg), cfg, 0.0)
    run.optimize(optimizer)
    run.before_clip = GradientControl(FlatView(student, optimizer), cfg)
    method.progress.steps_per_epoch, method.progress.epochs = 1, epochs
    for e in range(epochs):
        method.progress.step = e
        optim.set_hyper(optimizer, float(z["lr"][e]), float(z["wd"][e]))
        views = [torch.from_numpy(z[f"ep{e}__{n}"].astype(np.float32)).flatten(0, 1) for n in ("x224", "x96")]
        loss = run.step(batch_of(views, count=2 + nlocal), float(z["momentum"][e]))
        np.testing.assert_allclose(loss, z[f"ep{e}__loss"], atol=1e-4)
        np.testing.assert_allclose(method.centre, z[f"ep{e}__center"], atol=1e-5)
        np.testing.assert_allclose(method.centre_region, z[f"ep{e}__center_grid"], atol=1e-5)
        norms = dict(zip(z[f"ep{e}__grad_norm_names"], z[f"ep{e}__grad_norms_before_clip"], strict=True))
        for name, want in norms.items():
            np.testing.assert_allclose(run.grads[ours(str(name))].norm(), want, rtol=2e-2, atol=2e-4, err_msg=name)
    for side, module, most in (("student", run.student, 2e-3), ("teacher", run.teacher.module, 5e-4)):
        state = module.state_dict()
        errors = np.concatenate(
            [np.abs(state[ours(n)].numpy() - v).ravel() for n, v in under(z, f"{side}_final__").items()]
        )
        assert errors.max() < most and np.mean(errors < 1e-4) > 0.999


def small(regions=True, moe=None, **more):
    torch.manual_seed(0)
    params = esvit.Params(out_dim=16, hidden=24, bottleneck=8, regions=regions, **more)
    method = esvit.EsViT(params, LocalComm()).double()
    sizes = dict(dim=16, depth=2, heads=2, patch_size=8, img_size=32, moe=moe)
    student, teacher = (b(build_backbone("vit", **sizes)) for b in (method.build_student, method.build_teacher))
    teacher.load_state_dict(student.state_dict())
    return Run(method, student.double(), teacher.double())


def crops(counts=((2, 32), (3, 16)), samples=4):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(v, samples, 3, s, s, generator=g, dtype=torch.float64) for v, s in counts]


def stepped(run, views, rows=slice(None)):
    return run.step(batch_of([v[:, rows].flatten(0, 1) for v in views], count=sum(map(len, views))))


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("moe", [None, MoEConfig(blocks=[1], experts=4)])
@pytest.mark.parametrize("counts", [((2, 32),), ((2, 32), (3, 16)), ((2, 32), (2, 24), (2, 16)), ((4, 32),)])
def test_any_crops_on_any_number_of_ranks(counts, moe, regions):
    views = crops(counts)
    whole = small(regions, moe)
    want = stepped(whole, views)

    runs = [small(regions, moe) for _ in range(2)]  # built here: the seed is one for all threads

    def rank(comm):
        run = runs[comm.rank]
        run.comm = run.method.comm = run.engine.comm = run.parts.comm = comm
        return stepped(run, views, slice(comm.rank, None, 2)).item()

    losses = SimComm.run(2, rank)
    assert np.mean(losses) == pytest.approx(want.item(), rel=1e-9)
    for name, grad in whole.grads.items():
        torch.testing.assert_close(runs[1].grads[name], grad, rtol=1e-6, atol=1e-10, msg=name)
    torch.testing.assert_close(runs[0].method.centre, whole.method.centre)
    assert ("loss/balance" in whole.metrics) == (moe is not None)


def test_first_epoch_leaves_the_last_layer():
    run = small()
    before = {n: p.detach().clone() for n, p in run.student.named_parameters()}
    cfg = OptimConfig(decay="matrices")
    run.optimize(optim.build(optim.param_groups(run.student, cfg), cfg, 0.1))
    moved = []
    for step in range(2):
        run.method.progress.step = step
        stepped(run, crops())
        moved.append({n for n, p in run.student.named_parameters() if not torch.equal(p, before[n])})
    assert not any("last_layer" in n for n in moved[0]) and any("last_layer" in n for n in moved[1])


def test_teacher_routes_without_noise():
    run = small(moe=MoEConfig(blocks=[1], experts=4, noise_std=1.0))
    stds = [
        [m.noise_std for m in net.modules() if hasattr(m, "noise_std")] for net in (run.student, run.teacher.module)
    ]
    assert stds == [[1.0], [0.0]]
    stepped(run, crops())
