"""torch.compile of the blocks: the same losses and gradients, dense and sparse, names of parameters unchanged."""

from __future__ import annotations

import pytest
import torch

from moe_cl import config, methods
from moe_cl.comm import LocalComm
from moe_cl.config import ConfigError, MoEConfig
from moe_cl.engine import optim
from moe_cl.engine.setup import build_method
from moe_cl.models.build import build_backbone
from tests.plain import Run, batch_of

VIT = {"dim": 16, "depth": 1, "heads": 2, "patch_size": 8, "img_size": 16}
VMOE = VIT | {"depth": 2, "moe": MoEConfig(blocks="odd", init="xavier")}
SWIN = {"dim": 8, "depths": [1, 1], "heads": [1, 1], "img_size": 28}


# inductor once (its C++ takes seconds a block), the tracing alone for the others
@pytest.mark.parametrize(
    ("name", "options", "backend"),
    [("vit", VIT, "inductor"), ("vit", VMOE, "aot_eager"), ("swin", SWIN, "aot_eager")],
)
def test_compiled_blocks_change_no_value(name, options, backend):
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = build_backbone(name, **options)
        if compiled:
            net.compile_blocks(backend=backend)
        size = options["img_size"]
        features = net([torch.randn(2, 3, size, size)]).features
        loss = (features * torch.randn_like(features)).sum()
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    assert results[0][1].keys() == results[1][1].keys()
    for key, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], grad, rtol=0, atol=2e-5 * float(grad.abs().max()) + 1e-8)


def test_a_whole_step_has_the_same_losses():
    """MoCo v3 with ``model.compile`` of student and teacher, three steps."""
    losses = []
    for compiled in ("false", "true"):
        sizes = ["params.dim=8", "params.mlp_dim=16", "batch.global_batch=4", "views.size=16"]
        vit = [f"model.options.{k}={v}" for k, v in VIT.items()]
        cfg = config.load("mocov3_vit_small_300ep", [*sizes, *vit, f"model.compile={compiled}"], methods.params_of)
        torch.manual_seed(0)
        method, student, teacher = build_method(cfg, LocalComm(), None)
        run = Run(method, student, teacher)
        run.optimize(optim.build(optim.param_groups(student, cfg.optim), cfg.optim, 1e-3))
        views = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        losses.append(torch.stack([run.step(batch_of([views]), 0.9, number) for number in range(3)]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert losses[0][2] < losses[0][0]


def test_a_resnet_has_no_blocks_to_compile():
    with pytest.raises(ConfigError, match="model.compile"):
        build_backbone("resnet18", compile=True)
