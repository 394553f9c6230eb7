"""CR-MoE without an engine, in fp64: every gradient on 2 and 4 ranks, experts laid out in any way, is that of one."""

import pytest
import torch
import torch.distributed as dist

from moe_cl import methods
from moe_cl.comm import DistComm, LocalComm
from moe_cl.config import MoEConfig
from moe_cl.models.build import build_backbone
from moe_cl.moe.experts import SparseMLP
from tests.methods.test_ranks import SIZES, ZERO, batch, equal
from tests.plain import Run

EXPERTS, IDLE = (
    8,
    {0: [0, 1], 1: [2, 7]},
)  # IDLE: experts without a token, by layer; 0 and 1 are all of a rank's at ep 4


def joined(members, rank):
    """This rank's one of the groups ``members`` (groups, ranks), all of which every rank helps to make."""
    made = {tuple(group): dist.new_group(group) for group in members.tolist()}
    return next(DistComm(group) for ranks, group in made.items() if rank in ranks)


def laid_out(comm, ep, strided):
    """(expert group, ranks with the same experts): groups of consecutive ranks, or ``strided`` over all of them."""
    if comm.world == 1:
        return LocalComm(), LocalComm()
    ranks = torch.arange(comm.world)
    groups = ranks.view(ep, -1).t() if strided else ranks.view(-1, ep)
    return joined(groups, comm.rank), joined(groups.t(), comm.rank)


def prepared(comm, group):
    """Student and teacher of two MoE layers, noisy routers, xavier experts; some experts get no token."""
    moe = MoEConfig(blocks=[0, 1], experts=EXPERTS, hidden_ratio=1.0, init="xavier", noise_std=1.0)
    method = methods.get("crmoe")(methods.params_of("crmoe")(**SIZES["crmoe"]), comm)
    nets = []
    for build in (method.build_student, method.build_teacher):
        torch.manual_seed(1)
        sizes = dict(dim=16, depth=2, heads=2, patch_size=8, img_size=32, drop_path=0.2)
        net = build(build_backbone("vit", moe=moe, moe_factory=lambda **k: SparseMLP(**k, comm=group), **sizes))
        for layer, block in enumerate(net.backbone.blocks):
            with torch.no_grad():  # the first channel is positive in every token
                block.norm2.bias[0] = 5
                block.mlp.router.weight[0] = 0
                block.mlp.router.weight[0, IDLE[layer]] = -10
        nets.append(net.double())
    return Run(method.double(), *nets, comm)


def on_rank(comm, ep, strided):
    """Loss, gradients by name, figures of the routing, and which part of the experts is here."""
    group, copies = laid_out(comm, ep, strided)
    run = prepared(comm, group)
    run.engine.copies = copies
    loss = run.step(batch("crmoe", slice(comm.rank, None, comm.world)))
    return loss.item(), run.grads, run.metrics, group.rank


@pytest.fixture(scope="module")
def alone():
    return on_rank(LocalComm(), 1, False)


def test_some_experts_have_no_token(alone):
    _, grads, metrics, _ = alone
    for layer, idle in IDLE.items():
        assert (metrics[f"moe/L{layer}/load"] == 0).nonzero().flatten().tolist() == idle
        for name in ("w1", "b1", "w2", "b2"):
            size = grads[f"backbone.blocks.{layer}.mlp.experts.{name}"].flatten(1).abs().amax(1)
            assert (size == 0).nonzero().flatten().tolist() == idle
    assert [name for name, grad in grads.items() if grad.abs().max() < ZERO] == ["backbone.norm.bias"]  # before a BN


@pytest.mark.processes
@pytest.mark.parametrize(
    ("world", "ep", "strided"),
    [(2, 1, False), (2, 2, False), (4, 1, False), (4, 2, False), (4, 2, True), (4, 4, False)],
)
def test_gradients_are_those_of_one_rank(pool, alone, world, ep, strided):
    """Loss with balance and consistency over all ranks; dense gradients meet over the world, an expert's over its
    copies, both through Comm."""
    want_loss, want, want_metrics, _ = alone
    out = pool.run(world, on_rank, ep, strided)
    assert sum(loss for loss, *_ in out) / world == pytest.approx(want_loss, rel=1e-12)
    local = EXPERTS // ep
    for _, grads, metrics, first in out:
        assert grads.keys() == want.keys()
        for name, grad in grads.items():
            if ".experts." not in name:
                equal(grad, want[name], name)
                continue
            assert len(grad) == local
            for e, mine in enumerate(grad, first * local):
                equal(mine, want[name][e], f"{name}[{e}]")
        for layer in IDLE:
            load = f"moe/L{layer}/load"
            torch.testing.assert_close(metrics[load], want_metrics[load], rtol=1e-6, atol=0)  # shares, in fp32
