"""An accumulated step, plain and exact, is the same step in every layout: norm, clipping, experts, teacher."""

import pytest
import torch

from moe_cl.engine import large_batch
from moe_cl.engine import step as plain
from tests.engine.runs import batch_of, build_run, config, micro
from tests.engine.test_step import full

pytestmark = pytest.mark.processes
PARTS, CLIP = 4, 0.5
DRIVERS = {"plain": plain.step, "exact": large_batch.step}


def three_steps(comm, out, driver, ep, stage):
    """(loss, norm) of three clipped steps, the student at the end; and how far the teacher is after each step from the
    one EMA of a step, by name, with what a second EMA would have moved it."""
    cfg = config(out, ep=ep, stage=stage, batch=16, accumulation=PARTS)
    cfg.optim.clip_norm = CLIP
    parts = build_run(comm, cfg).parts
    student = dict(parts.student.named_parameters())
    teacher = {n: k for n, k in parts.teacher.module.named_parameters() if student[n].requires_grad}
    with torch.no_grad():
        for p in teacher.values():  # apart from the student, so that each EMA is seen
            p.add_(0.1)
    history, wrong = [], {}
    for number in range(3):
        want = {n: 0.9 * k.detach() + 0.1 * student[n].detach() for n, k in teacher.items()}
        agreed = DRIVERS[driver](parts, micro(batch_of(comm.rank, comm.world, 16, seed=number), PARTS), number, 0.9)
        history.append((agreed.metrics["loss"].item(), agreed.metrics["grad_norm"].item()))
        for name, k in teacher.items():
            wrong[name] = max(wrong.get(name, 0.0), (k - want[name]).abs().max().item())
    whole = [{n: full(module, n, p).numpy() for n, p in module.named_parameters()}
             for module in (parts.student, parts.teacher.module)]  # fmt: skip
    return history, whole, wrong


@pytest.fixture(scope="module")
def alone(pool, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("one") / "run")
    return {driver: pool.run(1, three_steps, out, driver, 1, 0)[0] for driver in DRIVERS}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("ep", "stage"), [(2, 0), (2, 1), (2, 2), (1, 1)])
def test_an_accumulated_step_is_that_of_one_process(pool, tmp_path, alone, driver, ep, stage):
    history, nets, _ = alone[driver]
    assert all(norm > CLIP for _, norm in history), "nothing is clipped"
    for got, mine, wrong in pool.run(2, three_steps, str(tmp_path / "run"), driver, ep, stage):
        for (loss, norm), (want_loss, want_norm) in zip(got, history, strict=True):
            assert loss == pytest.approx(want_loss, rel=1e-5) and norm == pytest.approx(want_norm, rel=2e-5)
        for net, want in zip(mine, nets, strict=True):
            assert net.keys() == want.keys() and any(".experts." in name for name in net)
            for name, value in net.items():
                assert abs(value - want[name]).max() <= 2e-6, name
        assert max(wrong.values()) < 3e-7, wrong  # once a step, with the weights before it, experts included


def test_the_two_ways_are_two_objectives(alone):
    """Plain accumulation has a micro-batch's negatives, the exact one those of the whole batch."""
    assert alone["plain"][0][0][0] != pytest.approx(alone["exact"][0][0][0], rel=1e-3)
