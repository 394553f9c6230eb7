"""A step with everything on an accelerator: nothing is read as an array, nothing is mixed with the CPU's tensors."""

import pytest
import torch

from moe_cl.comm import LocalComm
from moe_cl.config import OptimConfig, ViewsConfig
from moe_cl.engine import large_batch, optim, schedules
from moe_cl.engine.clip import GradientControl
from moe_cl.engine.flat import FlatView
from moe_cl.engine.setup import build_method
from moe_cl.views.device import to_device
from moe_cl.views.spec import Batch, build_spec
from tests.away import AWAY, accelerator
from tests.engine.test_large_batch import Bare
from tests.methods.test_ranks import SIZES, batch, prepared
from tests.plain import Run
from tests.recipes.test_recipes import cut
from tests.views.test_device import UNITS, finished


def train(run, batches, device, optimizer=None):
    """Loss and gradient norm of two clipped steps."""
    teacher = run.teacher and run.teacher.module
    if device is not None:
        for module in (run.method, run.student, *([teacher] if teacher else [])):
            module.to(device)
    run = Run(run.method, run.student, teacher)  # anew: parameters are other objects now
    if optimizer is not None:
        run.optimize(optimizer(run.student))
    run.before_clip = GradientControl(FlatView(run.student, run.engine.optimizer), OptimConfig(clip_norm=1.0))
    found = []
    for number in range(2):
        here = batches()
        if device is not None:
            here = [to_device(b, device, build_spec(ViewsConfig()), 0, 0) for b in here]
        found += [float(run.step(here, number=number)), float(run.metrics["grad_norm"])]
    return found


def agree(make):
    """The same on the accelerator as on the CPU."""
    want = make(None)
    with accelerator():
        assert make(AWAY) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", SIZES)
def test_every_method(name, parts):
    agree(
        lambda device: train(
            prepared(name, LocalComm(), name in ("crmoe", "esvit", "moco"), torch.float32),
            lambda: [batch(name, slice(i, None, parts), torch.float32) for i in range(parts)],
            device,
        )
    )


@pytest.mark.parametrize(
    "name", ["crmoe_vmoe_small_300ep", "esvit_swin_tiny_w7", "mocov2_r18_cifar10", "mocov3_r50_100ep"]
)
def test_recipes(name):
    """The papers' backbones, batch norms and views at toy size; LARS (torch's own optimizers need no imitation)."""
    cfg = cut(name)
    cfg.optim.name = "lars" if cfg.optim.name == "lars" else "sgd"
    spec, samples = build_spec(cfg.views), cfg.batch.global_batch

    def make(device):
        torch.manual_seed(0)
        views = [torch.randn(count * samples, 3, size, size) for size, count in spec.resolutions]
        ids, boxes = torch.arange(samples), torch.tensor([0.1, 0.2, 0.6, 0.5, 0.0]).expand(spec.views, samples, 5)
        peak = schedules.scaled_lr(cfg.optim, samples)
        return train(
            Run(*build_method(cfg, LocalComm(), None)),
            lambda: [Batch(list(views), boxes.clone(), ids, ids, ids)],
            device,
            lambda student: optim.build(optim.param_groups(student, cfg.optim), cfg.optim, peak),
        )

    agree(make)


@pytest.mark.parametrize("name", ["crmoe", "esvit"])
def test_the_exact_large_batch(name, monkeypatch):
    monkeypatch.setattr("tests.plain.PlainEngine", Bare)
    monkeypatch.setattr("tests.plain.step", large_batch.step)
    monkeypatch.setattr(Bare, "losses", [torch.zeros(())], raising=False)
    agree(
        lambda device: train(
            prepared(name, LocalComm(), True, torch.float32),
            lambda: [batch(name, slice(i, None, 2), torch.float32) for i in range(2)],
            device,
        )
    )


def test_views_are_finished_there():
    spec = build_spec(ViewsConfig(spec="mocov3"))
    want, _ = finished(spec, "cpu")
    with accelerator():
        got, _ = finished(spec, AWAY)
    for a, b in zip(got, want, strict=True):
        assert ((a - b).abs().mean(dim=(1, 2, 3)) * UNITS).max() < 0.1


def test_the_imitation_is_strict():
    with accelerator():
        x = torch.ones(3, device=AWAY)
        assert x.device == AWAY and (x + 1).tolist() == [2.0] * 3
        with pytest.raises(TypeError, match="no array"):
            x.numpy()
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
