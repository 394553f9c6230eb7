"""The exact large batch equals the one-batch step: without the engine in fp64, through the engine at every stage."""

import contextlib
import dataclasses
import threading

import pytest
import torch

from moe_cl import methods
from moe_cl.comm import LocalComm, SimComm, mean_gradients
from moe_cl.config import ConfigError, OptimConfig, build
from moe_cl.engine import large_batch, optim, setup, step
from moe_cl.engine.flat import FlatView
from moe_cl.engine.teacher import Teacher
from moe_cl.models.build import build_backbone
from tests.engine.runs import batch_of, build_run, config, micro

_SEEDED = threading.Lock()
METHODS = {
    "crmoe": {"dim": 8, "mlp_dim": 16},
    "mocov3": {"dim": 8, "mlp_dim": 16},
    "simclr": {"dim": 8},
    "esvit": {"out_dim": 12, "hidden": 16, "bottleneck": 8, "freeze_last_layer": 0},
}


class Bare:
    """The student without an engine: gradients meet over ``comm`` alone, any precision."""

    def __init__(self, student, comm):
        self.student, self.comm, self.losses = student, comm, []
        sgd = OptimConfig("sgd")
        self.optimizer = optim.build(optim.param_groups(student, sgd), sgd, 0.0)

    def __call__(self, fn):
        return fn(self.student)

    def backward(self, loss, scale_wrt_gas=True):
        self.losses.append(loss.detach())  # the first is the step's own; metrics are fp32
        loss.backward()

    def step(self):
        mean_gradients([p for p in self.student.parameters() if p.requires_grad], self.comm)

    def set_gradient_accumulation_boundary(self, last):
        pass

    def zero_optimization_stage(self):
        return 0


def bare_step(comm, out, method, parts, driver):
    cfg = config(out, noise_std=1.0) if method == "crmoe" else config(out, method="mocov3")
    cfg.method, cfg.params, cfg.model.drop_path = method, build(methods.params_of(method), METHODS[method]), 0.3
    with _SEEDED:  # ranks are threads here: one at a time between seed and weights
        method, student, teacher = setup.build_method(cfg, comm, None)
    student.double(), method.double()
    if teacher is not None:
        teacher.double()
        with torch.no_grad():  # a teacher that differs from the student
            for p in teacher.parameters():
                p.mul_(1.01)
        teacher = Teacher(teacher, student, contextlib.nullcontext)
    method.bind(student, teacher)
    batch = batch_of(comm.rank, comm.world)
    batch.views = [x.double() for x in batch.views]
    batches, bare = micro(batch, parts) if parts > 1 else [batch], Bare(student, comm)
    agreed = driver(step.Parts(bare, student, teacher, method, comm, 3), batches, 0, 0.9)
    grads = {n: p.grad for n, p in student.named_parameters() if p.requires_grad}
    return agreed, bare.losses[0], grads, dict(method.named_buffers())


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", list(METHODS))
def test_exact_in_double(tmp_path, name, world):
    def run(parts, driver):
        body = lambda comm: bare_step(comm, tmp_path / "run", name, parts, driver)  # noqa: E731
        return SimComm.run(world, body) if world > 1 else [body(LocalComm())]

    for one, four in zip(run(1, step.step), run(4, large_batch.step), strict=True):
        (want, loss, grads, state), (got, same, exact, after) = one, four
        assert got.metrics.keys() == want.metrics.keys()
        torch.testing.assert_close(same, loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(got.metrics["loss"], want.metrics["loss"], rtol=1e-6, atol=0)
        assert torch.equal(got.digest, want.digest)
        for key, grad in grads.items():
            assert (exact[key] - grad).abs().max() <= 1e-10 * grad.abs().max().clamp(min=1e-3), key
        for key, value in state.items():
            torch.testing.assert_close(after[key], value, rtol=1e-10, atol=1e-12)


def engine_steps(comm, out, name, parts, stage, ep):
    """Losses of three steps, this rank's reduced gradients of the first one, and where the student is after all."""
    cfg = config(out, stage=stage, ep=ep, accumulation=parts, **({"noise_std": 1.0} if name == "crmoe" else {}),
                 method="crmoe" if name == "crmoe" else "mocov3")  # fmt: skip
    cfg.method, cfg.params = name, build(methods.params_of(name), METHODS[name])
    built, losses, grads = build_run(comm, cfg), [], {}
    view, clip = FlatView(built.parts.student, built.parts.engine.optimizer, comm), built.parts.before_step

    def before_step():
        if not losses:
            grads.update({(f.name, f.start): view.gradient(f).clone().flatten().numpy() for f in view.fragments})
        return clip()

    built.parts.before_step = before_step
    for number in range(3):
        batch = batch_of(comm.rank, comm.world, seed=number)
        if parts > 1:
            agreed = large_batch.step(built.parts, micro(batch, parts), number, 0.9)
        else:
            agreed = step.step(built.parts, [batch], number, 0.9)
        losses.append(float(agreed.metrics["loss"]))
    return losses, grads, {n: p.detach().numpy() for n, p in built.parts.student.named_parameters()}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "world", "stage", "ep"),
    [("crmoe", 1, 1, 1), ("crmoe", 2, 0, 2), ("crmoe", 2, 1, 2), ("crmoe", 2, 2, 2), ("crmoe", 2, 2, 1),
     ("mocov3", 2, 1, 1), ("simclr", 2, 0, 1), ("esvit", 2, 2, 1)],
)  # fmt: skip
def test_exact_through_the_engine(pool, tmp_path, name, world, stage, ep):
    plain = pool.run(world, engine_steps, str(tmp_path / "a"), name, 1, stage, ep)
    exact = pool.run(world, engine_steps, str(tmp_path / "b"), name, 2, stage, ep)
    largest = {}  # of each whole tensor, whose pieces may lie on several ranks
    for _, grads, _ in plain:
        for (tensor, _), grad in grads.items():
            largest[tensor] = max(largest.get(tensor, 0.0), abs(grad).max())
    if largest["backbone.norm.bias"] < 1e-6:  # 0 but for rounding: the head's batch norm takes any shift away
        assert name in ("crmoe", "mocov3")
        largest["backbone.norm.bias"] = 1e-2
    for (losses, grads, params), (got, mine, after) in zip(plain, exact, strict=True):
        assert got[0] == pytest.approx(losses[0], rel=1e-6)
        assert got == pytest.approx(losses, rel=2e-6)  # two optimizer steps between
        assert mine.keys() == grads.keys() and grads
        for (tensor, start), grad in grads.items():
            assert abs(mine[tensor, start] - grad).max() <= 2e-5 * largest[tensor], tensor
        for tensor, value in params.items():
            torch.testing.assert_close(torch.from_numpy(after[tensor]), torch.from_numpy(value), rtol=0, atol=2e-6)


def test_batch_norm_in_the_backbone_is_refused():
    large_batch.check_backbone(build_backbone("vit", dim=16, depth=1, heads=2, img_size=16, patch_size=8))
    with pytest.raises(ConfigError, match="batch norm"):
        large_batch.check_backbone(build_backbone("resnet18"))


def test_micro_batches_join_and_part_view_major():
    batches = micro(batch_of(0, 1), 2)
    whole = large_batch._whole(batches)
    joined = large_batch._join([b.views[0] for b in batches], batches)
    assert torch.equal(joined, batch_of(0, 1).views[0])
    assert whole.views[0].shape == joined.shape and torch.equal(whole.boxes, batch_of(0, 1).boxes)
    for i, batch in enumerate(batches):
        assert torch.equal(large_batch._part(joined, batches, i, [2]), batch.views[0])
    assert {f.name for f in dataclasses.fields(whole)} == {f.name for f in dataclasses.fields(batches[0])}
