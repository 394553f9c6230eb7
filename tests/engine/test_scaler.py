"""fp16 with its loss scale: overflows on one rank are overflows on all, nothing moves, and the step is tried again."""

import copy

import pytest
import torch

from moe_cl.engine.health import NonFiniteLoss
from moe_cl.engine.scaler import SMALLEST, Overflow, StepScaler, loss_scale, scaler_of
from moe_cl.engine.step import step
from tests.engine.runs import batch_of, build_run, config

START, LOW = 2.0**16, 2.0**8  # torch's, the runs' here


def scaled(scaler, p, grad):
    """A gradient as the backward would leave it."""
    scaler.scale(torch.zeros(()))
    p.grad = torch.full_like(p, grad) * scaler.get_scale()


def test_the_scale_falls_after_an_overflow_and_grows_after_good_steps():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [torch.optim.SGD([x], lr=1.0) for x in (p, q)]
    scaler = StepScaler("cpu")
    for x in (p, q):
        scaled(scaler, x, 0.25)
    scaler.finite = False
    for optimizer in groups:  # as ZeRO does: each group steps and updates
        scaler.step(optimizer)
        scaler.update()
    assert not scaler.finish() and scaler.get_scale() == START / 2 and torch.equal(p, torch.ones(2))
    for good in range(scaler.get_growth_interval()):
        for x in (p, q):
            scaled(scaler, x, 0.25 if not good else 0.0)
        for optimizer in groups:
            scaler.step(optimizer)
            scaler.update()
        assert scaler.finish()
        if good == 0:
            assert scaler.get_scale() == START / 2 and torch.equal(p, torch.full((2,), 0.75)) and torch.equal(p, q)
    assert scaler.get_scale() == START
    other = StepScaler("cpu")
    other.load_state_dict(copy.deepcopy(scaler.state_dict()))
    scaled(other, p, 0.0)
    assert other.get_scale() == START


def fp16(comm, out, **options):
    """A run in fp16 whose loss scale starts low enough that nothing overflows by itself."""
    parts = build_run(comm, config(out, precision="fp16", **options)).parts
    scaler = scaler_of(parts.engine)
    scaler.load_state_dict({**scaler.state_dict(), "scale": LOW})
    return parts


class Heated:
    """Makes the gradients of one rank overflow while the loss scale is above ``limit``."""

    def __init__(self, parts, rank, limit):
        self.parts, self.loss, self.calls = parts, parts.method.loss, 0
        self.hot = parts.comm.rank == rank
        self.limit = limit
        parts.method.loss = self

    def __call__(self, *args):
        out, self.calls = self.loss(*args), self.calls + 1
        if self.hot and loss_scale(self.parts.engine) > self.limit:
            out.loss.register_hook(lambda grad: grad * float("inf"))
        return out


def state(parts):
    inner = parts.engine.optimizer
    inner = getattr(inner, "optimizer", inner)
    moments = [v.clone() for s in inner.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [p.detach().clone() for p in (*parts.student.parameters(), *parts.teacher.module.parameters())] + moments


def statistics(parts):
    """Of every batch norm, counts included."""
    return [b.clone() for net in (parts.student, parts.teacher.module) for b in net.buffers()]


def overflowing(comm, out, stage, ep):
    """Three steps, the second of which overflows on rank 1 until the scale is an eighth; the same without overflow."""
    runs = []
    for hot in (False, True):
        parts = fp16(comm, f"{out}-{hot}", stage=stage, ep=ep)
        with torch.no_grad():  # far from the student: one EMA too many moves it by ten times the tolerance
            for p in parts.teacher.module.parameters():
                p.add_(0.5)
        losses = []
        for number in range(3):
            heated = Heated(parts, comm.world - 1, LOW / 8) if hot and number == 1 else None
            before = state(parts)
            agreed = step(parts, [batch_of(comm.rank, comm.world, seed=number)], number, 0.9)
            losses.append(agreed.metrics["loss"].item())
            if heated is not None:
                parts.method.loss, calls = heated.loss, heated.calls
            assert any(not torch.equal(a, b) for a, b in zip(before, state(parts), strict=False))
        values = [x.numpy() for x in state(parts) + statistics(parts)]
        runs.append((losses, values, loss_scale(parts.engine), parts.engine.global_steps))
        skipped = parts.engine.skipped_steps
    return runs, calls, skipped


@pytest.mark.processes
@pytest.mark.parametrize(("stage", "ep"), [(0, 1), (1, 2), (2, 1)])
def test_a_step_that_overflows_is_one_step(pool, tmp_path, stage, ep):
    """Teacher, optimizer and counters are those of a run that never overflowed (but for rounding at another scale)."""
    for (plain, hot), calls, skipped in pool.run(2, overflowing, str(tmp_path / "run"), stage, ep):
        assert calls == 4 and skipped == 3
        assert (plain[2], hot[2]) == (LOW, LOW / 8) and plain[3] == hot[3] == 3
        assert hot[0] == pytest.approx(plain[0], rel=2e-3)
        for a, b in zip(plain[1], hot[1], strict=True):
            torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=0, atol=3e-3)


def skipping(comm, out):
    """One attempt that overflows, the driver's own repetition left out."""
    parts = fp16(comm, out, ep=2, optim="adamw")
    step(parts, [batch_of(comm.rank, comm.world)], 0, 0.9)
    Heated(parts, 0, 0.0)
    parts.again = True  # the teacher's step belongs to the first attempt
    before, queue = state(parts), [b.clone() for b in parts.method.buffers()]
    with pytest.raises(Overflow):
        step.__wrapped__(parts, [batch_of(comm.rank, comm.world, seed=1)], 1, 0.9)
    still = all(torch.equal(a, b) for a, b in zip(before, state(parts), strict=True))
    still &= all(torch.equal(a, b) for a, b in zip(queue, parts.method.buffers(), strict=True))
    with pytest.raises(NonFiniteLoss, match="set engine.precision=bf16"):
        step(parts, [batch_of(comm.rank, comm.world, seed=1)], 1, 0.9)
    return still, loss_scale(parts.engine) < SMALLEST, scaler_of(parts.engine).finite


@pytest.mark.processes
def test_nothing_moves_in_a_skipped_step_and_hopeless_ones_end_the_run(pool, tmp_path):
    assert pool.run(2, skipping, str(tmp_path / "run")) == [(True, True, True)] * 2
