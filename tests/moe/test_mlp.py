"""The expert MLP by torch's products, in half precision: rows that fill a piece up are never seen in a result."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.moe import kernels, mlp
from moe_cl.moe.dispatch import sort_by_expert

EXPERTS, WIDTH, HIDDEN = 4, 16, 32


def run(ids: torch.Tensor, dtype: torch.dtype, recompute: bool) -> list[torch.Tensor]:
    """Output and all gradients of one pass in ``dtype``."""
    draw = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).requires_grad_()

    x, parameters = normal(len(ids), WIDTH), [normal(EXPERTS, HIDDEN, WIDTH), normal(EXPERTS, HIDDEN)]
    parameters += [normal(EXPERTS, WIDTH, HIDDEN), normal(EXPERTS, WIDTH)]
    weights = torch.rand(ids.shape, generator=draw).requires_grad_()
    plan = sort_by_expert(ids, EXPERTS)
    y = mlp.ExpertMLP.apply(x, weights, *parameters, ids, plan, dtype, True, recompute)
    (y * torch.randn(y.shape, generator=draw)).sum().backward()
    return [y.detach(), *(p.grad for p in (x, weights, *parameters))]


@pytest.mark.parametrize("recompute", [False, True])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 90), spread=st.integers(1, EXPERTS), chunk=st.sampled_from([16, 512]))
def test_filling_rows_change_nothing(rows: int, spread: int, chunk: int, recompute: bool) -> None:
    first = torch.arange(rows) % spread
    ids = torch.stack([first, (first + 1) % EXPERTS], dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "get", lambda *_: None)
        patch.setattr(mlp, "CHUNK", chunk)
        filled = run(ids, torch.bfloat16, recompute)
        exact = run(ids, torch.float32, recompute)
        patch.setattr(mlp, "MULTIPLE", 1)
        bare = run(ids, torch.bfloat16, recompute)
    for with_rows, without, reference in zip(filled, bare, exact, strict=True):
        scale = reference.abs().max().clamp(min=1e-6)
        assert ((with_rows - without).abs().max() / scale).item() < 2e-2
        assert ((with_rows - reference).abs().max() / scale).item() < 4e-2
    idle = torch.bincount(ids.flatten(), minlength=EXPERTS) == 0
    assert all((grad[idle] == 0).all() for grad in filled[3:])


def test_shapes_repeat_whatever_the_routing() -> None:
    sizes = {f for count in range(1, 3000) for f in mlp._filled(mlp._pieces([count])[1], True)}
    assert len(sizes) <= mlp.CHUNK // mlp.MULTIPLE
    assert mlp._filled([3, 9], False) == [3, 9]
