"""The plain and the accumulated driver through a real engine: layouts agree, teacher in time, non-finite stops all."""

import pytest
import torch

from moe_cl.engine.health import NonFiniteLoss
from moe_cl.engine.step import step
from tests.engine.runs import batch_of, build_run, config, micro

pytestmark = pytest.mark.processes


def train(comm, out, steps, parts=1, **options):
    """Losses, the final student (experts by global id, gathered over the expert group) and teacher of a small run."""
    built = build_run(comm, config(out, accumulation=parts, **options))
    losses, momenta = [], []
    for number in range(steps):
        batches = micro(batch_of(comm.rank, comm.world, seed=number), parts)
        agreed = step(built.parts, batches, number, 0.9)
        losses.append(agreed.metrics["loss"].item())
        momenta.append(agreed.digest.tolist())
    student, teacher = built.parts.student, built.parts.teacher.module
    whole = lambda module: {name: full(module, name, p) for name, p in module.named_parameters()}  # noqa: E731
    return losses, momenta, whole(student), whole(teacher)


def full(module, name, p):
    """All experts of a stack, in order of their global ids."""
    owner = next(
        (m for n, m in module.named_modules() if n and name.startswith(n + ".") and hasattr(m, "ep_size")), None
    )
    if owner is None or owner.ep_size == 1 or ".experts." not in name:
        return p.detach().clone()
    return owner.comm.all_gather(p.detach())


def close(one, other, atol):
    for name in one:
        assert torch.allclose(one[name], other[name], atol=atol), name


@pytest.fixture(scope="module")
def alone(pool, tmp_path_factory):
    return pool.run(1, train, str(tmp_path_factory.mktemp("one") / "run"), 3)[0]


@pytest.mark.parametrize(("world", "ep", "stage"), [(2, 1, 0), (2, 2, 0), (2, 2, 1), (2, 2, 2), (4, 2, 1), (4, 4, 2)])
def test_every_layout_trains_the_same_model(pool, tmp_path, alone, world, ep, stage):
    runs = [(out[0], out[2], out[3]) for out in pool.run(world, _train_ep, str(tmp_path / "run"), ep, stage)]
    for losses, student, teacher in runs:
        assert losses == pytest.approx(alone[0], rel=1e-5)
        close(alone[2], student, 1e-5)
        close(alone[3], teacher, 1e-5)


def _train_ep(comm, out, ep, stage):
    return train(comm, out, 3, ep=ep, stage=stage)


def test_everything_trainable_moves_and_only_that(pool, tmp_path):
    moved = pool.run(2, _moved, str(tmp_path / "run"))[0]
    still = {name for name, distance in moved.items() if distance == 0}
    assert still == {"backbone.pos_embed", "backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"} & set(
        moved
    )
    assert any(".experts." in name for name in moved)


def _moved(comm, out):
    built = build_run(comm, config(out, ep=2))
    before = {n: full(built.parts.student, n, p) for n, p in built.parts.student.named_parameters()}
    for number in range(4):
        step(built.parts, [batch_of(comm.rank, comm.world, seed=number)], number, 0.9)
    distance = {}
    for name, p in built.parts.student.named_parameters():
        change = (full(built.parts.student, name, p) - before[name]).abs()
        if ".experts." in name:  # each expert by its own name
            distance.update({f"{name}[{e}]": c.max().item() for e, c in enumerate(change)})
        else:
            distance[name] = change.max().item()
    return distance


def test_accumulation_updates_the_teacher_once_a_step(pool, tmp_path):
    out = pool.run(1, _teacher_after_one_step, str(tmp_path / "run"))[0]
    assert out < 1e-7


def _teacher_after_one_step(comm, out):
    built = build_run(comm, config(out, accumulation=4))
    p = dict(built.parts.student.named_parameters())["backbone.blocks.0.mlp.fc1.weight"]
    k = dict(built.parts.teacher.module.named_parameters())["backbone.blocks.0.mlp.fc1.weight"]
    with torch.no_grad():
        p.add_(1)
    expected = 0.9 * k + 0.1 * p  # with this step's weights, before the optimizer
    step(built.parts, micro(batch_of(0, 1), 4), 0, 0.9)
    return (k - expected).abs().max().item()


def test_non_finite_on_one_rank_stops_all_before_anything_moves(pool, tmp_path):
    outcomes = pool.run(2, _poisoned, str(tmp_path / "run"))
    for message, unchanged in outcomes:
        assert "step 0: the loss is not finite on 1 of 2 ranks" in message and unchanged
    assert "own: " in outcomes[1][0] and "all finite on this rank" in outcomes[0][0]


def _poisoned(comm, out):
    built = build_run(comm, config(out, ep=2))
    before = [p.detach().clone() for p in built.parts.student.parameters()]
    batch = batch_of(comm.rank, comm.world)
    if comm.rank == 1:
        # After the experts' exchange and the batch norms, which would carry it to every rank: in the loss itself.
        original = built.parts.method.loss

        def poisoned(*args):
            result = original(*args)
            result.loss = result.loss * float("nan")
            return result

        built.parts.method.loss = poisoned
    try:
        step(built.parts, [batch], 0, 0.9)
    except NonFiniteLoss as error:
        after = built.parts.student.parameters()
        return str(error), all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return "no error", False


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_linear_layers_of_student_and_teacher_compute_in_the_precision(pool, tmp_path, precision, dtype):
    for seen in pool.run(2, _dtypes, str(tmp_path / "run"), precision):
        assert set(seen["student"]) == set(seen["teacher"]) == {str(dtype)}
        assert seen["parameters"] == ["torch.float32"]


def _dtypes(comm, out, precision):
    built = build_run(comm, config(out, ep=2, precision=precision))
    seen = {"student": [], "teacher": []}
    for side, module in (("student", built.parts.student), ("teacher", built.parts.teacher.module)):
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda m, i, o, side=side: seen[side].append(str(o.dtype)))
    step(built.parts, [batch_of(comm.rank, comm.world)], 0, 0.9)
    both = [*built.parts.student.parameters(), *built.parts.teacher.module.parameters()]
    return {**seen, "parameters": sorted({str(p.dtype) for p in both})}
