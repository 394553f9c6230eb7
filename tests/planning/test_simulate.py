"""Single ranks of a large layout through the run's own code, with torch's fake process group."""

import copy

import pytest

from moe_cl import cli, config, methods
from moe_cl.config import ConfigError
from moe_cl.planning import plan, simulate

CRMOE = ["batch.global_batch=3072", "engine.ds_config=multinode_zero2_moe", "moe.ep_size=8", "engine.precision=auto"]


def load(recipe, *settings):
    return config.load(recipe, settings, methods.params_of)


@pytest.fixture(scope="module")
def large():
    """VMoE-S/16 as 2 of 1,024 ranks."""
    return simulate.layout(load("crmoe_vmoe_small_300ep", *CRMOE), 128, 8, most=2)


@pytest.mark.processes
def test_1024_ranks(large):
    assert large["errors"] == [] and large["world"] == 1024 and large["ranks"] == [0, 1023]
    said = "\n".join(large["checks"])
    assert "rank 1023: its expert group 1016..1023 (8) on node 127 is that of the layout" in said
    assert "rank 1023: holds experts 14 to 15, as 128 ranks do" in said
    assert "rank 0: the engine's batch is micro x accumulation x 1024 ranks" in said
    assert "collectives in the same order" in said and "ZeRO stage 2" in said


@pytest.mark.processes
@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("esvit_swin_base_w7", ["engine.ds_config=gpu8_zero1_moe"]),
        ("mocov2_r50_200ep", ["engine.ds_config=gpu1_bf16", "batch.global_batch=256"]),
        ("mocov3_vit_small_300ep", ["batch.exact_large_batch=true", "engine.ds_config=gpu8_zero1_moe"]),
    ],
)
def test_other_methods(recipe, settings):
    found = simulate.layout(load(recipe, *settings), 2, 8, most=2)
    assert found["errors"] == [] and found["checks"]


def test_an_expert_group_on_two_nodes():
    """ep does not divide the ranks of a node: 4..7 of 12 stand on both, and one of them is simulated."""
    tiny = ["model.options={dim: 16, depth: 2, heads: 2}", "batch.global_batch=24", "moe.experts=4", "moe.ep_size=4"]
    found = simulate.layout(load("crmoe_vit_micro_fmnist", *tiny), 2, 6, most=3)
    assert found["errors"] == [] and 7 in found["ranks"], found["errors"]
    said = "\n".join(found["checks"])
    assert "rank 7: its expert group 4..7 (4) on nodes 0 to 1 is that of the layout" in said


def facts(rank, **more):
    base = {
        "world": 16, "strided": False, "asked": 32, "batch": {"global": 32, "micro": 2, "accumulation": 1},
        "stage": 1, "collectives": ["all_reduce"], "shapes": [[2, 2]], "loss": 1.0, "finite": True, "moved": True,
        "owned": 100, "planned": 99.0, "padding": 8, "expert_group": list(range(rank // 4 * 4, rank // 4 * 4 + 4)),
        "copies": list(range(rank % 4, 16, 4)), "first_experts": [rank % 4 * 4], "local_experts": 4,
    }  # fmt: skip
    return {**base, **more}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"collectives": ["all_reduce", "all_gather"]}, "same 1 collectives in the same order: not so"),
        ({"expert_group": [4, 5, 6, 9]}, "its expert group 4..9 (4) on nodes 0 to 1 is that of the layout: not so"),
        ({"expert_group": [5, 9, 13, 1]}, "its expert group 5..1 (4) on nodes 0 to 1 is that of the layout: not so"),
        ({"copies": [0, 4, 8, 12]}, "holds experts 4 to 7, as 4 ranks do: not so"),
        ({"first_experts": [0]}, "holds experts 4 to 7, as 4 ranks do: not so"),
        ({"finite": False}, "losses and gradients are finite, weights moved: not so"),
        ({"owned": 200}, "its optimizer holds 200 numbers, as planned (99): not so"),
        ({"batch": {"global": 16, "micro": 1, "accumulation": 1}}, "the engine's batch is micro x accumulation"),
        ({"error": "rank 5: boom"}, "rank 5: boom"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(more, says):
    cfg = load("crmoe_vmoe_small_300ep", "moe.ep_size=4", "batch.global_batch=32")
    good = {rank: facts(rank) for rank in (0, 5)}
    assert simulate.compare(cfg, 2, 8, copy.deepcopy(good))[1] == []
    good[5] = more if "error" in more else facts(5, **more)
    errors = simulate.compare(cfg, 2, 8, good)[1]
    assert len(errors) >= 1 and says in "\n".join(errors)


def test_a_queue_too_small_for_the_cluster():
    cfg = load("mocov2_r50_200ep", "params.queue=128", "batch.global_batch=256")
    assert "the queue of 128 holds the 256 keys of a step: not so" in simulate.compare(cfg, 2, 8, {})[1][0]


def test_too_many_ranks():
    with pytest.raises(ConfigError, match="2048 ranks are more than 1024"):
        simulate.layout(load("crmoe_vmoe_small_300ep"), 256, 8)


def test_too_many_ranks_are_refused_before_the_plan(monkeypatch, capsys):
    monkeypatch.setattr(plan, "make", None)
    words = ["plan", "--recipe", "crmoe_vmoe_small_300ep", "--nodes", "256", "--gpus-per-node", "8", "--simulate"]
    assert cli.main(words) == 2 and "2048 ranks are more than 1024" in capsys.readouterr().err
