"""Memory by part, and who sends how much to whom."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_cl.planning import hardware
from moe_cl.planning.layout import Layout, carried
from moe_cl.planning.ledger import Message, Op
from moe_cl.planning.model import PARTS, Traffic, Zero, between_ranks, fresh_bytes, image_seconds, memory, messages
from moe_cl.planning.model import seconds as op_seconds
from moe_cl.planning.trace import Trace

GPU = hardware.GPUS["A100-80G"]


def settings(name="adamw"):
    return SimpleNamespace(optim=SimpleNamespace(name=name))


def traced(dense=1000, experts=0, peak=None):
    return Trace(peak=peak or {"activations": 50_000}, dense=dense, experts=experts, teacher=dense, largest=100)


@pytest.mark.parametrize(
    ("layout", "group", "spread"),
    [
        (Layout(4, 8, 8), "world", (32, 4, 8)),
        (Layout(4, 8, 8), "expert", (8, 1, 8)),
        (Layout(4, 8, 8), "copies", (4, 4, 1)),
        (Layout(4, 8, 4), "expert", (4, 1, 4)),
        (Layout(4, 8, 4), "copies", (8, 4, 2)),
        (Layout(4, 8, 16), "expert", (16, 2, 8)),
        (Layout(4, 8, 16), "copies", (2, 2, 1)),
        (Layout(4, 8, 8, strided=True), "expert", (8, 4, 2)),
        (Layout(4, 8, 8, strided=True), "copies", (4, 1, 4)),
        (Layout(1, 8, 2), "copies", (4, 1, 4)),
        (Layout(1, 1), "world", (1, 1, 1)),
        (Layout(2, 6, 4), "expert", (4, 2, 4)),  # 0..3 and 8..11 inside, 4..7 on both nodes
        (Layout(2, 6, 4), "copies", (3, 2, 2)),
    ],
)
def test_groups(layout, group, spread):
    found = layout.spread(group)
    assert (found.ranks, found.nodes, found.together) == spread


@given(st.integers(1, 7), st.integers(1, 9), st.data(), st.booleans())
def test_every_rank_is_in_one_group_and_sends_what_leaves_its_node(nodes, per_node, data, strided):
    """Against bytes counted rank by rank, for any number of ranks a node."""
    world = nodes * per_node
    ep = data.draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    layout = Layout(nodes, per_node, ep, strided)
    for kind in ("world", "expert", "copies"):
        groups = layout.groups(kind)
        assert sorted(rank for group in groups for rank in group) == list(range(world))
        out, came = Counter(), Counter()
        for group in groups:
            for a in group:
                for b in group:
                    if a // per_node != b // per_node:
                        out[a // per_node] += 1 / len(group)  # all-to-all: a's part for b
                came.update(
                    {node: 1 for node in range(nodes) if node != a // per_node and node in layout.nodes_of(group)}
                )
        spread = layout.spread(kind)
        assert carried("all_to_all", 1.0, spread)[1] == pytest.approx(max(out.values(), default=0))
        assert carried("all_gather", 1.0, spread)[1] == pytest.approx(max(came.values(), default=0))
    members = [set(layout.groups("expert")[0]) & set(group) for group in layout.groups("copies")]
    assert all(len(both) == 1 for both in members)  # each set of copies has one rank in each expert group


def test_bytes_of_collectives():
    inside, two = Layout(1, 8).spread("world"), Layout(2, 8).spread("world")
    assert carried("all_reduce", 100.0, inside) == (175.0, 0.0)
    assert carried("all_reduce", 100.0, Layout(4, 8, 8).spread("copies")) == (150.0, 8 * 150.0)  # a node's 8 groups
    assert carried("all_gather", 10.0, Layout(2, 4).spread("world")) == (70.0, 40.0)
    assert carried("all_to_all", 80.0, inside) == (70.0, 0.0)
    assert carried("all_to_all", 80.0, two) == (75.0, 8 * 80 / 2)
    assert carried("all_to_all", 80.0, Layout(2, 6, 4).spread("expert")) == (60.0, 80.0)  # 2 ranks, half of it each


def test_alone_nothing_is_sent():
    one = traced(experts=400)
    one.messages = Counter({Message("all_reduce", "world", 64): 3, Message("all_to_all", "expert", 64): 2})
    for group in ("world", "expert"):
        assert messages(one, group, Layout(1, 1), GPU) == Traffic()
    assert between_ranks(one, Layout(1, 1), GPU, Zero(2)) == Traffic()


def test_experts_inside_a_node_leave_the_network_alone():
    one = traced()
    one.messages = Counter({Message("all_to_all", "expert", 10**6): 5})
    inside, across = (messages(one, "expert", Layout(4, 8, 8, strided), GPU) for strided in (False, True))
    assert inside.outside == 0.0 < across.outside and inside.seconds < across.seconds


@pytest.mark.parametrize("gpu", [False, True])
def test_memory_by_stage(gpu):
    one, layout = traced(10**8, 10**7), Layout(2, 8, 8)
    plans = [memory(settings(), one, layout, Zero(stage), gpu) for stage in (0, 1, 2)]
    for plan in plans:
        assert tuple(plan) == PARTS and plan["weights"] == 4 * one.trained and plan["teacher"] == 4 * one.dense
    assert plans[0]["optimizer"] == 8 * one.trained and plans[0]["master weights"] == 0
    cut = one.dense / 16 + one.experts / 2
    assert plans[1]["optimizer"] == plans[2]["optimizer"] == round(8 * cut)
    if gpu:
        small = sum(memory(settings(), one, layout, Zero(2, bucket=10**7), True).values())
        assert small < min(sum(plan.values()) for plan in plans)


def test_worst_moment_wins():
    big = traced(1000, peak={"activations": 10**9, "gradients": 10})
    assert memory(settings(), big, Layout(1, 1), Zero(0), True)["activations"] == 10**9
    little = traced(10**6, peak={"activations": 10})
    found = memory(settings(), little, Layout(1, 1), Zero(0), True)
    assert found["activations"] == 0 and found["gradients"] == found["reduction buffers"] == 4 * 10**6


def test_a_cpus_allocator_keeps_small_blocks():
    """Worst moments add up: weights' first blocks, activations, gradients, and what the reduction takes."""
    one = traced(10**6, peak={"activations": 10**8, "gradients": 10})
    one.small = 6 * 10**5
    one.large = {"activations": 10**5}
    found = memory(settings(), one, Layout(1, 1), Zero(1), False)
    assert found["weights"] == 6.4e6 and found["gradients"] == 2.4e6 and found["activations"] == 10**8
    assert found["reduction buffers"] == 8 * 10**6
    one.large = {"activations": 10**9}
    found = memory(settings(), one, Layout(1, 1), Zero(1), False)
    assert found["activations"] == 10**8 + 10**9 and found["reduction buffers"] == 0


def test_stage_3_cuts_weights_unless_they_may_stay_gathered():
    one, layout = traced(10**6), Layout(1, 8)
    kept = memory(settings(), one, layout, Zero(3), True)["weights"]
    cut = memory(settings(), one, layout, Zero(3, live=1000), True)["weights"]
    assert kept == 4 * 10**6 and cut == 4 * (10**6 / 8 + 1000)


def test_roofline():
    rates = GPU.low["matmul"], GPU.stream, GPU.launch
    ops = Counter({Op("matmul", 10**12, 10**6, True): 2, Op("rest", 0, 10**9, False): 1, Op("rest", 0, 8, False): 3})
    assert op_seconds(ops, GPU) == pytest.approx(2 * 10**12 / rates[0] + 10**9 / rates[1] + 3 * rates[2])


def test_large_blocks_cost_their_first_writing():
    ops = Counter({Op("rest", 0, 10**9, False, 10**8): 2})
    slow = dataclasses.replace(GPU, fresh=1e-9)
    assert op_seconds(ops, slow) == pytest.approx(op_seconds(ops, GPU) + 2 * 0.1)
    one, small, alone = traced(10**7), traced(10**6), Layout(1, 1)
    assert fresh_bytes(settings(), one, alone, Zero(1)) == 4 * 2 * 10**7  # the bucket, and gradients together
    assert fresh_bytes(settings("sgd"), one, alone, Zero(1)) == 4 * 3 * 10**7  # and with decay
    assert fresh_bytes(settings(), small, alone, Zero(1)) == 4 * 10**6
    assert fresh_bytes(settings(), small, alone, Zero(0)) == 0


def test_images():
    mocov3, esvit = [(224, 2)], [(224, 2), (96, 8)]
    assert image_seconds(mocov3, GPU) == pytest.approx(2.00e-3, rel=0.02)
    assert image_seconds(esvit, GPU) == pytest.approx(3.98e-3, rel=0.08)
    assert image_seconds([(28, 2)], GPU, 28 * 28) == pytest.approx(0.13e-3, rel=0.05)
