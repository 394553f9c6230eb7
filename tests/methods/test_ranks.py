"""Every method on two gloo ranks: the same mean loss and gradients as on one; and in bf16 the losses stay close."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from moe_cl import methods
from moe_cl.comm import LocalComm, SimComm
from moe_cl.config import MoEConfig
from moe_cl.models.build import build_backbone
from tests.plain import Run, batch_of

SIZES = {
    "mocov3": {"dim": 8, "mlp_dim": 16},
    "crmoe": {"dim": 8, "mlp_dim": 16},
    "simclr": {"dim": 8},
    "moco": {"dim": 8, "queue": 64},
    "jcl": {"dim": 8, "queue": 64},
    "esvit": {"out_dim": 16, "hidden": 24, "bottleneck": 8},
}
VIEWS = 3
ZERO = 1e-14
SEEDED = threading.Lock()


def prepared(name, comm, moe, dtype=torch.float64):
    torch.manual_seed(0)
    method = methods.get(name)(methods.params_of(name)(**SIZES[name]), comm).to(dtype)
    sizes = dict(
        dim=16, depth=2, heads=2, patch_size=8, img_size=32, moe=MoEConfig(blocks=[1], experts=4) if moe else None
    )
    nets = []
    for build in (method.build_student, method.build_teacher):
        torch.manual_seed(1)
        net = build(build_backbone("vit", **sizes))
        nets.append(None if net is None else net.to(dtype))
    return Run(method, *nets, comm)


def batch(name, rows=slice(None), dtype=torch.float64):
    g = torch.Generator().manual_seed(2)
    views = VIEWS if name in ("jcl", "esvit") else 2
    x = torch.randn(views, 8, 3, 32, 32, generator=g, dtype=dtype)[:, rows]
    boxes = torch.rand(views, 8, 5, generator=g)[:, rows] * 0.3 + torch.tensor([0, 0, 0.6, 0.6, 0.0])
    found = batch_of([x.flatten(0, 1)], boxes, views)
    found.sample_ids = found.positions = torch.arange(8)[rows]
    return found


def equal(got, want, name):
    """To 1e-10 of the tensor's largest value (fp64). A gradient that is 0 but for rounding (of a shift that a batch
    norm takes out again) has no such scale."""
    largest = float(want.abs().max())
    atol = 1e-10 * largest if largest > ZERO else ZERO * (largest > 0)
    torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


def on_rank(comm, name, moe):
    torch.set_num_threads(1)
    run = prepared(name, comm, moe)
    loss = run.step(batch(name, slice(comm.rank, None, comm.world)))
    state = {k: v for k, v in run.method.state_dict().items() if k.startswith(("centre", "queue_ptr"))}
    return loss.item(), run.grads, state


@pytest.mark.processes
@pytest.mark.parametrize("name", SIZES)
def test_two_ranks_are_one(pool, name):
    moe = name in ("crmoe", "esvit", "moco")
    want, grads, state = on_rank(LocalComm(), name, moe)
    out = pool.run(2, on_rank, name, moe)
    assert np.mean([loss for loss, *_ in out]) == pytest.approx(want, rel=1e-9)
    for _, got, after in out:
        assert got.keys() == grads.keys()
        for key, grad in grads.items():
            equal(got[key], grad, key)
        for key, value in state.items():
            equal(after[key], value, key)


@pytest.mark.parametrize(("statistics", "messages"), [("global", 1), ("group: 8", 1), ("group: 4", 0)])
def test_statistics_of_the_routing_take_one_message(statistics, messages):
    """Balance of all layers and views, and the matched patches of both directions; none where a rank has its groups."""

    def count(comm):
        with SEEDED:  # ranks are threads here
            run = prepared("crmoe", comm, True)
        run.method.statistics, calls, reduce = statistics, [], comm.all_reduce
        mine = batch("crmoe", slice(comm.rank, None, 2))
        sides = [net("encode", mine.views, None, [2]) for net in (run.student, run.teacher.module)]
        comm.all_reduce = lambda x, op="sum": calls.append(x.shape) or reduce(x, op)
        terms, metrics = run.method.routed(*sides, mine, comm)
        assert {"loss/balance", "loss/consistency"} <= set(terms) and metrics["health/match_rate"] > 0
        return len(calls)

    assert SimComm.run(2, count) == [messages] * 2


@pytest.mark.parametrize("name", SIZES)
def test_autocast(name):
    """bf16 products, losses in fp32: finite, near the fp32 loss, fp32 gradients."""
    plain = prepared(name, LocalComm(), True, torch.float32)
    want = plain.step(batch(name, dtype=torch.float32))
    run = prepared(name, LocalComm(), True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run.step(batch(name, dtype=torch.float32))
    assert loss.dtype == torch.float32 and loss == pytest.approx(want.item(), rel=0.1)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in run.grads.values())


def test_names():
    with pytest.raises(methods.ConfigError, match="did you mean crmoe"):
        methods.get("crmo")
    assert all(methods.params_of(n).__name__ == "Params" for n in methods.NAMES)


def test_crmoe_tells_how_matched_patches_are_routed():
    run = prepared("crmoe", LocalComm(), True)
    run.step(batch("crmoe"))
    assert 0 <= run.metrics["moe/L0/agreement_patch"] <= 1 and 0 < run.metrics["health/match_rate"] <= 1
