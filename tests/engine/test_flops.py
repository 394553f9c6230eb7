"""FLOPs of a run's step: by hand for a small ViT, and of experts only the chosen ones."""

from __future__ import annotations

import pytest
import torch

from moe_cl import config, methods
from moe_cl.engine.flops import Flops, count

DIM, HIDDEN, OUT, DEPTH, PATCH = 64, 16, 8, 2, 8 * 8 * 3
SMALL = [
    f"model.options={{img_size: 16, patch_size: 8, dim: {DIM}, depth: {DEPTH}, heads: 2}}", "views.size=16",
    f"params.dim={OUT}", f"params.mlp_dim={HIDDEN}", "moe.ep_size=1", "moe.experts=4",
]  # fmt: skip


def small(*more):
    return config.load("crmoe_vit_micro_fmnist", [*SMALL, *more], methods.params_of)


def by_hand(mlp: float, side: int = 16) -> float:
    """MoCo v3, two views: a block's MLP costs ``mlp`` FLOPs a token; the patch projection is frozen."""
    tokens = 1 + (side // 8) ** 2
    block = tokens * (2 * DIM * 4 * DIM + mlp) + 2 * 2 * tokens**2 * DIM
    backbone, patch = DEPTH * block, (tokens - 1) * 2 * PATCH * DIM
    projector = 2 * (DIM * HIDDEN + HIDDEN * HIDDEN + HIDDEN * OUT)
    predictor = 2 * (OUT * HIDDEN + HIDDEN * OUT)
    forward = 2 * (backbone + patch + projector)
    return 2 * (3 * (backbone + projector + predictor) + patch) + forward


@pytest.mark.parametrize("side", [16, 96])  # 5 and 145 tokens: other kernels of attention
def test_a_dense_vit_is_as_by_hand(side):
    dense = small("method=mocov3", f"params={{dim: {OUT}, mlp_dim: {HIDDEN}}}", "moe.blocks=none", f"views.size={side}")
    assert count(dense, 1).image == pytest.approx(by_hand(2 * 2 * DIM * 4 * DIM, side), rel=0.02)


def test_only_the_experts_that_are_chosen_count():
    """Two of four experts of half the width cost the dense MLP's work; the router adds a little."""
    expert = 2 * 2 * DIM * 2 * DIM  # hidden_ratio 2
    halves = by_hand(0.5 * 2 * expert + 0.5 * 2 * 2 * DIM * 4 * DIM)  # block 1 of 2 is sparse
    assert count(small(), 1).image == pytest.approx(halves, rel=0.04)
    few, many, every = (
        count(small(*more), 1).image for more in ([], ["moe.experts=16"], ["moe.experts=16", "moe.top_k=16"])
    )
    assert few == pytest.approx(many, rel=0.05) and every > 1.5 * many


@pytest.mark.parametrize(
    "settings", [["model.activation_checkpointing=true"], ["moe.recompute=true"], ["batch.exact_large_batch=true"],
                 ["moe.ep_size=2"], ["engine.statistics='group: 64'"]],
)  # fmt: skip
def test_what_is_computed_again_or_elsewhere_changes_nothing(settings):
    assert count(small(*settings), 2) == count(small(), 2)


@pytest.mark.parametrize(
    "method", ["esvit_vit_fmnist", "esvit_vmoe_fmnist", "mocov2_vit_fmnist", "simclr_vit_fmnist", "mocov2_r18_cifar10",
               "jcl_paper_r50_200ep"],
)  # fmt: skip
def test_every_method_is_counted(method):
    more = ["views.size=64", "params.queue=64"] if "jcl" in method else []
    assert 1e6 < count(config.load(method, more, methods.params_of), 1).image < 1e11


def test_rates():
    assert Flops(2e9).rates(500.0) == {"tflops": 1.0}
    assert Flops(2e9, 4e12).rates(500.0) == {"tflops": 1.0, "mfu": 0.25}
    state = torch.get_rng_state()
    assert count(small("engine.peak_tflops=2"), 4).peak == 8e12 and torch.equal(torch.get_rng_state(), state)
