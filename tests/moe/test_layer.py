"""DeepSpeed's own MOELayer as the oracle, and the layer through DeepSpeed's engine on four ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from moe_cl.config import ConfigError, MoEConfig
from moe_cl.engine.flat import FlatView
from moe_cl.moe.experts import SparseMLP

WORLD, STEPS, EXPERTS, DIM = 4, 3, 8, 12


class SevenTuple(nn.Module):
    """Our router behind the interface of DeepSpeed's gate: capacity = the largest count, so nothing is dropped."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x, used_token, sparse_routes, use_tutel):
        routing = self.router(x[None])
        ids, gates = routing.indices[0].t(), routing.weights[0].t()
        onehot = F.one_hot(ids.reshape(-1), routing.experts)
        place = ((onehot.cumsum(0) - 1) * onehot).sum(1).view_as(ids)
        counts = onehot.sum(0)
        return x.new_zeros(()), counts.max(), routing.experts, ids.int(), place.int(), gates, counts


@pytest.mark.parametrize("k", [1, 2, 3])
def test_deepspeeds_own_layer_is_the_oracle(k):
    from deepspeed.moe.experts import Experts as NativeExperts
    from deepspeed.moe.sharded_moe import MOELayer

    torch.manual_seed(k)
    layer = SparseMLP(DIM, MoEConfig(experts=EXPERTS, top_k=k, init="xavier"), seed=1).double()
    nn.init.normal_(layer.experts.b1), nn.init.normal_(layer.experts.b2)
    one = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)).double()
    native = MOELayer(
        SevenTuple(copy.deepcopy(layer.router)), NativeExperts(one, EXPERTS, "ep_size_1"), "ep_size_1", 1, EXPERTS
    )
    experts = native.experts.deepspeed_experts
    for e, expert in enumerate(experts):
        for ours, theirs in zip(("w1", "b1", "w2", "b2"), expert.parameters(), strict=True):
            theirs.data.copy_(getattr(layer.experts, ours)[e])
    x = torch.randn(3, 17, DIM, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = layer(x1)[0], native(x2, None)
    # DeepSpeed combines in fp32 only from fp32 gates; here everything is fp64.
    torch.testing.assert_close(y1, y2, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(y1)
    (y1 * cotangent).sum().backward()
    (y2 * cotangent).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.router.weight.grad, native.gate.router.weight.grad, rtol=0, atol=1e-12)
    for e, expert in enumerate(experts):
        for ours, theirs in zip(("w1", "b1", "w2", "b2"), expert.parameters(), strict=True):
            want = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(getattr(layer.experts, ours).grad[e], want, rtol=0, atol=1e-12)


def test_a_layer_of_several_ranks_needs_them():
    from moe_cl.moe.layer import factory

    with pytest.raises(ConfigError, match="moe.ep_size=2"):
        factory(MoEConfig(experts=4, ep_size=2))(dim=8, layer=0)


class Net(nn.Module):
    """Two MoE layers with dense ones around them; their inputs leave some experts idle."""

    def __init__(self, make, moe):
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.moe = nn.ModuleList(make(dim=DIM, layer=i, moe=moe) for i in range(2))
        with torch.no_grad():  # inputs are positive: expert 0 of the first layer is never chosen
            self.moe[0].router.weight[:, 0] = -9.0

    def forward(self, x):
        x = torch.tanh(self.inp(x)) + 1.5
        for layer in self.moe:
            x = x + layer(x)[0]
        return 3.0 * self.out(x).square().mean()


def moe_config(ep):
    return MoEConfig(experts=EXPERTS, init="xavier", ep_size=ep)


def samples():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(STEPS, 8, 5, DIM, generator=generator)


def whole(net, comm):
    """Parameters by name with all experts, the same on every layout."""
    out = {}
    for name, p in net.named_parameters():
        value = p.detach().clone()
        expert_comm = net.get_submodule(name.rsplit(".", 2)[0]).comm if ".experts." in name else None
        out[name] = torch.cat(expert_comm._gather(value)) if expert_comm and expert_comm.world > 1 else value
    return out


def through_the_engine(comm, stage, ep, strided):
    """Parameters before and after each of three SGD steps, and this rank's pieces of the first reduced gradient: name,
    place in the whole tensor, values."""
    import deepspeed
    from deepspeed.utils import groups

    from moe_cl.moe import layer

    groups._EXPERT_PARALLEL_GROUP.pop(f"ep_size_{ep}", None)  # the other layout's, from another test
    groups._EXPERT_DATA_PARALLEL_GROUP.pop(f"ep_size_{ep}", None)
    moe = moe_config(ep)
    net = Net(layer.factory(moe, 3, strided), moe)
    optimized = layer.param_groups([{"params": list(net.parameters()), "name": "all"}])
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8 // comm.world,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "use_data_before_expert_parallelism": strided,
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(optimized, lr=0.1), config=config)
    states, pieces, view = [whole(net, comm)], [], FlatView(net, engine.optimizer, comm)
    for batch in samples():
        loss = engine(batch[comm.rank * 8 // comm.world : (comm.rank + 1) * 8 // comm.world])
        engine.backward(loss)
        for f in view.fragments if len(states) == 1 else ():
            pieces.append((f.name, f.place.start + f.start, view.gradient(f).detach().clone().flatten()))
        engine.step()
        states.append(whole(net, comm))
    return states, pieces


def alone():
    """The same three steps in one process, without an engine; and the first gradient by name."""
    net = Net(lambda dim, layer, moe: SparseMLP(dim, moe, layer, seed=3), moe_config(1))
    states = [whole(net, None)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    gradients = {}
    for batch in samples():
        optimizer.zero_grad()
        net(batch).backward()
        gradients = gradients or {name: p.grad.clone() for name, p in net.named_parameters()}
        optimizer.step()
        states.append(whole(net, None))
    return states, gradients


@pytest.mark.processes
@pytest.mark.parametrize(("ep", "strided"), [(1, False), (2, False), (2, True), (4, False)])
def test_every_zero_stage_gives_the_gradients_of_one_process(pool, ep, strided):
    """Each expert's gradient and movement by name; idle experts stay where they are."""
    want, gradients = alone()
    assert torch.equal(want[0]["moe.0.experts.w1"][0], want[-1]["moe.0.experts.w1"][0])  # the idle expert
    by_stage = [pool.run(WORLD, through_the_engine, stage, ep, strided) for stage in (0, 1, 2)]
    for ranks in by_stage:
        held = {name: torch.zeros(g.numel()) for name, g in gradients.items()}
        for name, start, got in (piece for _, pieces in ranks for piece in pieces):
            gradient, part = gradients[name].flatten(), slice(start, start + len(got))
            scale = 2e-5 * float(gradient.abs().max())
            torch.testing.assert_close(got, gradient[part], rtol=0, atol=scale, msg=f"gradient of {name}")
            held[name][part] += 1
        assert all(bool(count.all()) for count in held.values()), "a part of a gradient is nowhere"
        for states, _ in ranks:
            for name, start in want[0].items():
                torch.testing.assert_close(states[0][name], start, rtol=0, atol=0, msg=f"initial {name}")
                torch.testing.assert_close(states[-1][name], want[-1][name], rtol=0, atol=1e-6, msg=name)
                if ".experts." in name:
                    still = want[-1][name].sub(start).flatten(1).abs().amax(1) == 0
                    moved = states[-1][name].sub(states[0][name]).flatten(1).abs().amax(1) > 0
                    assert torch.equal(moved, ~still), f"{name}: experts {moved} moved, but {~still} should"
    for states in by_stage[1:]:
        for rank in range(WORLD):
            for name, value in states[rank][0][-1].items():
                torch.testing.assert_close(value, by_stage[0][rank][0][-1][name], rtol=0, atol=1e-7, msg=name)


def teacher_groups(comm):
    """A second network outside the engine has its expert group, and evaluates with uneven token counts."""
    from deepspeed.utils import groups

    from moe_cl.moe import layer

    moe = moe_config(2)
    groups._EXPERT_PARALLEL_GROUP.pop("ep_size_2", None)
    groups._EXPERT_DATA_PARALLEL_GROUP.pop("ep_size_2", None)
    net = layer.place(Net(layer.factory(moe, 3), moe)).eval()
    with torch.no_grad():
        x = samples()[0][: [3, 0, 1, 2][comm.rank]]
        y, whole = net.moe[0](x)[0], SparseMLP(DIM, moe_config(1), 0, seed=3)
        whole.router.weight.copy_(net.moe[0].router.weight)
        difference = float((y - whole(x)[0]).abs().sum())
    marks = {(p.allreduce, p.group_name) for p in net.moe[0].experts.parameters()}
    return dist.get_process_group_ranks(net.moe[0].comm.group), len(y), difference, marks


@pytest.mark.processes
def test_a_teacher_outside_the_engine_has_its_group(pool):
    for rank, (ranks, rows, difference, marks) in enumerate(pool.run(WORLD, teacher_groups)):
        assert ranks == ([0, 1] if rank < 2 else [2, 3])
        assert rows == [3, 0, 1, 2][rank] and difference < 1e-4
        assert marks == {(False, "ep_size_2")}
