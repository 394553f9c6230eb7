"""MoCo v1/v2: queue, order of shuffled keys, the symmetric form (published values: tests/conformance)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.comm import LocalComm, SimComm
from moe_cl.config import ConfigError
from moe_cl.methods import moco
from moe_cl.models.build import Encoded, build_backbone
from tests.plain import Run, batch_of
from tests.tiny import TinyNet


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=8), st.integers(7, 20))
def test_queue_holds_the_last_keys(steps, length):
    """Whatever the micro-batches, the queue holds the newest ``length`` keys, the pointer where the next one goes."""
    method = moco.MoCo(moco.Params(dim=1, queue=length), LocalComm())
    written = [float("nan")] * length
    method.queue.fill_(float("nan"))
    for sizes in steps:
        new = torch.arange(len(written), len(written) + sum(sizes), dtype=torch.float32)
        written += new.tolist()
        method.commit(method.together([{"keys": keys[:, None]} for keys in new.split(sizes)]))
    newest = written[-length:]
    got = method.queue[0].roll(-int(method.queue_ptr)).tolist()
    np.testing.assert_array_equal(got, newest)


def test_order_is_one_permutation_for_all_ranks_and_undone():
    def rank(comm):
        method = moco.MoCo(moco.Params(dim=4, queue=64), comm)
        batch = batch_of([torch.randn(8, 6)])
        batch.keys = torch.arange(8) * 7919 + comm.rank
        method.build_student(TinyNet(6, 12))
        net = lambda what, x, keys, counts: Encoded(x[0])  # noqa: E731
        out = method.encode_teacher(net, batch).features
        torch.testing.assert_close(out, batch.views[0][4:])
        return method.order(batch, slice(4, 8)).tolist()

    one, two = SimComm.run(2, rank)
    assert one == two and sorted(one) == list(range(8)) and one != sorted(one)


def test_symmetric_is_the_mean_of_both_directions():
    torch.manual_seed(0)
    x = torch.randn(12, 6, dtype=torch.float64)
    losses = []
    for views in ([x], [torch.cat(x.chunk(2)[::-1])]):
        losses.append(run_once(views, False))
    assert run_once([x], True).item() == pytest.approx(sum(losses).item() / 2)


def run_once(views, symmetric):
    torch.manual_seed(1)
    method = moco.MoCo(moco.Params(dim=4, queue=24, symmetric=symmetric), LocalComm()).double()
    nets = [TinyNet(6, 12).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    student, teacher = (b(n).double() for b, n in zip((method.build_student, method.build_teacher), nets, strict=True))
    teacher.load_state_dict(student.state_dict())
    return Run(method, student, teacher).step(batch_of(views))


def small(backbone="resnet18_cifar", **params):
    method = moco.MoCo(moco.Params(dim=4, **params), LocalComm())
    return method, method.build_student(build_backbone(backbone))


def test_what_does_not_fit_a_batch_is_refused():
    method, student = small(queue=32, bn_groups=4)
    method.check(student, 8, 4)
    for change, images, ranks, says in (
        ({}, 8, 5, "params.queue=32 is smaller than the 40 keys of a step"),
        ({"symmetric": True}, 8, 4, "the 64 keys"),
        ({}, 6, 4, "params.bn_groups=4 does not divide the 6 images of a rank's micro-batch"),
    ):
        method, student = small(**{"queue": 32, "bn_groups": 4, **change})
        with pytest.raises(ConfigError, match=says):
            method.check(student, images, ranks)


def test_what_does_nothing_is_said():
    for change, ranks, samples, says in (
        ({"bn_groups": 4}, 1, 100, []),
        ({}, 2, 100, []),
        ({"shuffle": False}, 1, 100, []),
        ({}, 1, 100, ["params.shuffle does nothing on one rank"]),
        ({"backbone": "vit_tiny"}, 1, 100, []),
        ({"backbone": "vit_tiny", "bn_groups": 4}, 1, 100, ["params.bn_groups=4 does nothing: the backbone has no"]),
        ({"bn_groups": 4}, 1, 32, ["params.queue=32 is not less than the 32 images of the data set"]),
    ):
        method, student = small(**{"queue": 32, **change})
        notes = method.notes(student, 8, ranks, samples)
        assert len(notes) == len(says) and all(map(str.startswith, notes, says)), (change, notes)
