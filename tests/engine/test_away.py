"""A step of every method with everything on an accelerator: nothing is read as an array or mixed with the CPU's."""

import pytest
import torch

from moe_cl.comm import LocalComm
from moe_cl.config import OptimConfig, ViewsConfig
from moe_cl.engine.clip import GradientControl
from moe_cl.engine.flat import FlatView
from moe_cl.views.device import to_device
from moe_cl.views.spec import build_spec
from tests.away import AWAY, accelerator
from tests.methods.test_ranks import SIZES, batch, prepared


def train(name, device=None, parts=1):
    """Losses and sample digests of two clipped steps."""
    run = prepared(name, LocalComm(), name in ("crmoe", "esvit", "moco"), torch.float32)
    if device is not None:
        for module in (run.method, run.student, *([run.teacher.module] if run.teacher else [])):
            module.to(device)
    run = type(run)(run.method, run.student, run.teacher and run.teacher.module)
    run.before_clip = GradientControl(FlatView(run.student, run.engine.optimizer), OptimConfig(clip_norm=1.0))
    spec, losses = build_spec(ViewsConfig()), []
    for number in range(2):
        batches = [batch(name, slice(i, None, parts), torch.float32) for i in range(parts)]
        if device is not None:
            batches = [to_device(b, device, spec, 0, 0) for b in batches]
        losses.append(float(run.step(batches, number=number)))
        losses.append(float(run.metrics["grad_norm"]))
    return losses


@pytest.mark.parametrize("name", SIZES)
def test_step_on_an_accelerator(name):
    want = train(name)
    with accelerator():
        assert train(name, AWAY) == pytest.approx(want, rel=1e-5)


def test_the_imitation_is_strict():
    with accelerator():
        x = torch.ones(3, device=AWAY)
        assert x.device == AWAY and (x + 1).tolist() == [2.0] * 3
        with pytest.raises(TypeError, match="no array"):
            x.numpy()
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
