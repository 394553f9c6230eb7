"""The routers' figures against their definitions."""

import math

import pytest
import torch

from moe_cl.comm import SimComm
from moe_cl.config import MoEConfig
from moe_cl.engine.health import agree
from moe_cl.models.build import Encoded
from moe_cl.moe.experts import SparseMLP
from moe_cl.moe.router import Routing
from moe_cl.moe.telemetry import joined, summarize, whole_step


def routing(indices, probabilities):
    indices = torch.tensor(indices)
    return Routing(indices, probabilities.gather(-1, indices), probabilities.shape[-1], probabilities)


def test_by_hand():
    """Two views of one image, three tokens, four experts, top-2."""
    p = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(2, 3, 4)
    layer = routing([[[0, 1], [0, 1], [0, 2]], [[1, 0], [2, 0], [1, 2]]], p)
    layer.sent = 5
    match = (torch.tensor([[1, 0]]), torch.tensor([[True, False]]))
    out = summarize(Encoded(torch.zeros(2, 8), [], [[layer]]), 2, 1, match)
    assert set(out) == {
        f"moe/L0/{n}" for n in ("load", "importance", "sent", "entropy", "margin", "agreement_cls", "agreement_patch")
    }
    torch.testing.assert_close(out["moe/L0/load"], torch.tensor([5, 4, 3, 0]) / 12)
    total = 5 * 0.5 + 4 * 0.3 + 3 * 0.2
    torch.testing.assert_close(out["moe/L0/importance"], torch.tensor([2.5, 1.2, 0.6, 0.0]) / total)
    assert out["moe/L0/sent"] == 5 and whole_step(out, 3) == {"moe/L0/dead": 1, "moe/L0/sent": 15}
    assert float(out["moe/L0/entropy"]) == pytest.approx(-sum(v * math.log(v) for v in (0.5, 0.3, 0.2)))
    assert float(out["moe/L0/margin"]) == pytest.approx(0.2)
    assert out["moe/L0/agreement_cls"] == 1.0  # {0, 1} and {1, 0}
    assert out["moe/L0/agreement_patch"] == 0.5  # {0, 1} and the partner's {1, 2}; the other is not valid


def test_no_match_and_no_moe():
    p = torch.full((2, 3, 4), 0.25)
    layer = routing([[[0, 1]] * 3, [[2, 3]] * 3], p)
    match = (torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.bool))
    out = summarize(Encoded(torch.zeros(2, 8), [], [[layer]]), 2, 1, match)
    assert out["moe/L0/agreement_cls"] == 0 and out["moe/L0/agreement_patch"] == 0
    assert summarize(Encoded(torch.zeros(2, 8), [], [[]]), 2, 1) == {}
    assert "moe/L0/agreement_cls" not in summarize(Encoded(torch.zeros(2, 8), [], [[layer]]), 1, 2)


def test_layers_resolutions_and_graph():
    """Every layer by number, all resolutions of it together, nothing that holds the graph."""
    layers = [SparseMLP(8, MoEConfig(experts=4), layer=i) for i in range(2)]
    big, small = torch.randn(4, 5, 8), torch.randn(6, 2, 8)
    encoded = Encoded(torch.zeros(10, 8), [], [[m(x)[1] for m in layers] for x in (big, small)])
    out = summarize(encoded, 2, 2)
    for layer in range(2):
        ids = torch.cat([encoded.routing[r][layer].indices.flatten() for r in range(2)])
        torch.testing.assert_close(out[f"moe/L{layer}/load"], ids.bincount(minlength=4) / len(ids))
        assert 0 <= out[f"moe/L{layer}/entropy"] <= math.log(4)
    assert not any(v.requires_grad for v in out.values())


def test_sent_rows_of_several_ranks():
    def one(comm):
        layer = SparseMLP(8, MoEConfig(experts=4), comm=comm)
        _, route = layer(torch.randn(2, 5, 8))
        away = (route.indices // 2 != comm.rank).any(-1).sum()
        return summarize(Encoded(torch.zeros(2, 8), [], [[route]]), 2, 1)["moe/L0/sent"] == away

    assert all(SimComm.run(2, one))


def step_of(comm, experts_of_batch):
    """The figures of a step of one micro-batch for each list of experts, as the drivers make them."""
    found = []
    for experts in experts_of_batch:
        ids = torch.tensor(experts).expand(2, 3, 2)
        layer = routing(ids.tolist(), torch.full((2, 3, 6), 1 / 6))
        layer.sent = len(experts) + comm.rank
        found.append(summarize(Encoded(torch.zeros(2, 8), [], [[layer]]), 2, 1))
    mine = {n: joined(n, torch.stack([f[n].float() for f in found])) for n in found[0]}
    agreed = agree(comm, torch.zeros(()), mine, torch.zeros(1), 0).metrics
    return {**agreed, **whole_step(agreed, comm.world)}


def test_dead_experts_and_rows_sent_are_those_of_the_whole_step():
    """Two ranks and two micro-batches, each of them with two experts of its own: 5 is the only idle one."""
    parts = [[[0, 1], [2, 0]], [[3, 1], [4, 3]]]
    for out in SimComm.run(2, lambda comm: step_of(comm, parts[comm.rank])):
        assert out["moe/L0/dead"] == 1 and out["moe/L0/load"][5] == 0
        assert out["moe/L0/sent"] == 2 * 2 + 2 * 3
    (out,) = SimComm.run(1, lambda comm: step_of(comm, parts[0] + parts[1]))
    assert out["moe/L0/dead"] == 1 and out["moe/L0/sent"] == 4 * 2
