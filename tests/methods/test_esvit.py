"""EsViT: any crops, MoE backbones, two ranks, the frozen last layer (published values: tests/conformance)."""

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from moe_cl.comm import LocalComm, SimComm
from moe_cl.config import MoEConfig, OptimConfig
from moe_cl.engine import optim
from moe_cl.methods import esvit
from moe_cl.models.build import build_backbone
from tests.plain import Run, batch_of


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
        run.comm = run.method.comm = run.engine.comm = run.engine.copies = run.parts.comm = comm
        return stepped(run, views, slice(comm.rank, None, 2)).item()

    losses = SimComm.run(2, rank)
    assert np.mean(losses) == pytest.approx(want.item(), rel=1e-9)
    for name, grad in whole.grads.items():
        torch.testing.assert_close(runs[1].grads[name], grad, rtol=1e-6, atol=1e-10, msg=name)
    torch.testing.assert_close(runs[0].method.centre, whole.method.centre)
    assert ("loss/balance" in whole.metrics) == (moe is not None)


@pytest.mark.parametrize("regions", [True, False])
def test_batch_norm_sees_all_crops_of_a_resolution_at_once(regions):
    """As torchvision's network does that gets the crops of a size in one batch (esvit.md 1.1), student and teacher."""
    torch.manual_seed(0)
    method = esvit.EsViT(esvit.Params(out_dim=16, hidden=24, bottleneck=8, regions=regions), LocalComm())
    networks = [build(build_backbone("resnet18")) for build in (method.build_student, method.build_teacher)]
    views = [torch.randn(2 * 3, 3, 64, 64), torch.randn(2 * 3, 3, 32, 32)]
    batch = batch_of(views, count=4)
    for network, encode, seen in zip(
        networks, (method.encode_student, method.encode_teacher), (views, views[:1]), strict=True
    ):
        plain = resnet18()
        plain.fc = torch.nn.Identity()
        plain.load_state_dict(network.backbone.state_dict())
        want = torch.cat([plain(x) for x in seen])
        torch.testing.assert_close(encode(network, batch).features, want, rtol=1e-4, atol=1e-4)
        for name, value in plain.named_buffers():
            torch.testing.assert_close(dict(network.backbone.named_buffers())[name], value, rtol=1e-4, atol=1e-5)


def test_accumulation_moves_the_centres_as_one_batch_does():
    views = crops(samples=8)
    plain, parts = small(), small()
    for number in range(2):
        stepped(plain, views)
        cut = [batch_of([v[:, at : at + 2].flatten(0, 1) for v in views], count=5) for at in (0, 2, 4, 6)]
        parts.step(cut, number=number)
    for name in ("centre", "centre_region"):
        torch.testing.assert_close(getattr(parts.method, name), getattr(plain.method, name), rtol=1e-9, atol=1e-12)


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
