"""Global norm, clipping and LARS with experts: every world, ep and ZeRO stage gives one process's values."""

import pytest
import torch

from moe_cl.config import OptimConfig
from tests.engine import tiny

pytestmark = pytest.mark.processes

CONFIGS = {
    "global": OptimConfig(name="sgd", base_lr=0.5, weight_decay=0.01, clip_norm=0.05),
    "tensor": OptimConfig(name="sgd", base_lr=0.5, weight_decay=0.01, clip_per_tensor=0.02),
    "lars": OptimConfig(
        name="lars", base_lr=0.5, weight_decay=0.05, trust_coefficient=0.02, decay="matrices", clip_norm=0.5
    ),
}


def three_steps(comm, stage, ep):
    out = {}
    for name, cfg in CONFIGS.items():
        run = tiny.build(comm, stage, ep, cfg)
        history = [run.step(s) for s in range(3)]
        out[name] = history, {k: v.numpy() for k, v in tiny.full_state(run).items()}
    return out


@pytest.fixture(scope="module")
def alone(pool):
    return pool.run(1, three_steps, 0, 1)[0]


@pytest.mark.parametrize(("world", "stage", "ep"), [(2, 0, 2), (2, 1, 2), (2, 2, 1), (4, 1, 2), (4, 2, 4)])
def test_as_one_process(pool, alone, world, stage, ep):
    for got in pool.run(world, three_steps, stage, ep):
        for name, (history, state) in alone.items():
            for (loss, norm), (want_loss, want_norm) in zip(got[name][0], history, strict=True):
                assert loss == pytest.approx(want_loss, rel=1e-5)
                assert norm == pytest.approx(want_norm, rel=2e-5)
            for key, value in got[name][1].items():
                torch.testing.assert_close(torch.from_numpy(value), torch.from_numpy(state[key]), rtol=0, atol=2e-6)


def frozen_then_thawed(comm, stage):
    from moe_cl.engine import optim

    run = tiny.build(comm, stage, 1)
    before = run.net.head["last_layer"].weight.detach().clone()
    optim.freeze(run.view.inner, "last_layer", True)
    run.step(0)
    still = torch.equal(run.net.head["last_layer"].weight, before)
    optim.freeze(run.view.inner, "last_layer", False)
    run.step(1)
    steps = {f.name: float(run.view.state(f)["step"]) for f in run.view.fragments}
    return still, torch.equal(run.net.head["last_layer"].weight, before), steps


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_frozen_last_layer_neither_decays_nor_counts(pool, stage):
    for still, unmoved, steps in pool.run(2, frozen_then_thawed, stage):
        assert still and not unmoved
        assert all(count == (1 if "last_layer" in name else 2) for name, count in steps.items())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_stage_three_as_one_process(pool, world):
    """ZeRO 3 (dense networks): the same norms, clips and LARS factors from its shards."""
    want = pool.run(1, three_steps, 0, 0)[0]
    for got in pool.run(world, three_steps, 3, 0):
        for name, (history, state) in want.items():
            for (loss, norm), (want_loss, want_norm) in zip(got[name][0], history, strict=True):
                assert loss == pytest.approx(want_loss, rel=1e-5)
                assert norm == pytest.approx(want_norm, rel=2e-5)
            for key, value in got[name][1].items():
                torch.testing.assert_close(torch.from_numpy(value), torch.from_numpy(state[key]), rtol=0, atol=2e-6)
