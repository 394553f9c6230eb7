"""The traced step is the real one: same FLOPs, same live memory, same messages."""

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from moe_cl import config, methods
from moe_cl.comm import LocalComm, SimComm
from moe_cl.config import MoEConfig
from moe_cl.engine import setup
from moe_cl.moe import kernels
from moe_cl.moe.experts import SparseMLP
from moe_cl.planning import compiled
from moe_cl.planning.balanced import PlannedMoE, ranks_a_token, shared_a_token, shares
from moe_cl.planning.ledger import Ledger
from moe_cl.planning.trace import _Step, trace
from moe_cl.views.spec import Batch, build_spec

SMALL = [
    "model.options={img_size: 32, patch_size: 8, dim: 32, depth: 4, heads: 2}", "views.size=32", "moe.experts=4",
    "moe.ep_size=1", "params.dim=16", "params.mlp_dim=32",
]  # fmt: skip
RECIPES = {
    "crmoe": ("crmoe_vit_micro_fmnist", SMALL),
    "mocov3": ("mocov3_vit_micro_fmnist", [x for x in SMALL if not x.startswith("moe")]),
    "mocov2": ("mocov2_r18_cifar10", ["params.queue=1024"]),
    "simclr": ("simclr_vit_fmnist", []),
    "esvit": ("esvit_vit_fmnist", []),
}


def load(recipe, *settings):
    name, more = RECIPES[recipe]
    return config.load(name, [*more, *settings], methods.params_of)


def real_batch(cfg, samples):
    spec = build_spec(cfg.views)
    torch.manual_seed(0)
    views = [torch.randn(n * samples, 3, side, side) for side, n in spec.resolutions]
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]).expand(spec.views, samples, 5).contiguous()
    ids = torch.arange(samples)
    return Batch(views, boxes, ids, ids, ids, torch.arange(spec.views * samples))


@pytest.fixture
def in_torch():
    """The experts through torch's operations, which a ledger sees, in place of their compiled kernels."""
    before = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(before)


def real(cfg, samples, low=False):
    """One step on real tensors under the same ledger, and torch's own count of its FLOPs."""
    ledger = Ledger()
    method, student, teacher = setup.build_method(cfg, LocalComm(), None)
    if teacher is not None:
        teacher.requires_grad_(False)
    batch = real_batch(cfg, samples)
    for module in filter(None, (student, teacher, method)):
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            ledger.known(tensor)
    for tensor in (*batch.views, batch.boxes, batch.keys, batch.sample_ids):
        ledger.known(tensor)
    for p in filter(lambda p: p.requires_grad, student.parameters()):
        p.register_post_accumulate_grad_hook(lambda q: ledger.gradient(q.grad))
    step = _Step(method, student, teacher, batch, LocalComm(), ledger, low)
    counter = FlopCounterMode(display=False)
    with counter, ledger:
        step.plain(1)
    return ledger, counter.get_total_flops()


@pytest.mark.parametrize("recipe", RECIPES)
def test_as_the_real_step(recipe, in_torch):
    cfg = load(recipe)
    traced = trace(cfg, 1, 8, 1, "fp32", gpu=False)
    ledger, flops = real(cfg, 8)
    # torch's own counter knows neither the CPU's fused attention nor the steps outside of its table
    counted = sum(op.flops * n for ops in ledger.ops.values() for op, n in ops.items())
    assert counted >= flops * 0.999
    assert traced.flops == pytest.approx(counted, rel=0.01)
    assert sum(traced.peak.values()) == pytest.approx(ledger.held.most, rel=0.03)


@pytest.mark.skipif(kernels.load() is None, reason="the kernels need a compiler and oneDNN's small-matrix products")
@pytest.mark.parametrize(("low", "recompute"), [(False, False), (False, True), (True, False)])
def test_compiled_experts_as_the_real_ones(low, recompute):
    """What a real call keeps for its backward, tensor by tensor, and what is alive at the worst moment."""
    rows, k, width, moe = 1000, 2, 64, MoEConfig(experts=4, recompute=recompute)

    def call(make, ledger):
        """``make(ledger)`` -> the layer as a function of rows, ids and weights."""
        x, weights = torch.randn(rows, width, requires_grad=True), torch.rand(rows, k, requires_grad=True)
        ids = torch.stack([torch.arange(rows) % 4, (torch.arange(rows) + 1) % 4], 1)  # 500 rows an expert
        layer = make(ledger)
        for tensor in (x, weights, ids):
            ledger.known(tensor)
        with ledger, torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = layer(x, ids, weights)
            kept = [(tuple(t.shape), t.dtype) for t in out.grad_fn.saved_tensors if t is not None]
            held = ledger.held.now
            torch.autograd.grad(out.sum(), (x, weights), retain_graph=True)
        return kept, held

    def real(ledger):
        layer = SparseMLP(width, moe).experts
        for p in layer.parameters():
            ledger.known(p)
        return layer

    def planned(ledger):
        layer = PlannedMoE(width, moe, 0, ledger, 1, False)
        for p in layer.parameters():
            ledger.known(p)
        dtype = torch.bfloat16 if low else torch.float32
        return lambda x, ids, weights: layer._run(x, ids, weights, rows * k, dtype)

    ledger, traced = Ledger(), Ledger()
    kept, held = call(real, ledger)
    with compiled.planned(traced), FakeTensorMode():
        theirs, planned_held = call(planned, traced)
    assert theirs == kept and any(shape == (4 * 504, 2 * width) for shape, _ in kept) != recompute
    assert planned_held == pytest.approx(held, rel=0.01)
    # the library's own memory is not torch's: packed weights, and in the backward 2 (D + H) F numbers
    own = (2 if low else 4) * 2 * (4 * width * 2 * width + 4 * 504 * 3 * width)
    assert ledger.held.most + 0.8 * own < traced.held.most <= ledger.held.most + own


def test_compiled_experts_have_the_flops_of_those_in_torch(in_torch):
    cfg = load("crmoe")
    here = trace(cfg, 1, 8, 1, "fp32", gpu=False)
    torch._C._set_mkldnn_enabled(True)
    there = trace(cfg, 1, 8, 1, "fp32", gpu=False)
    experts = sum(op.flops * n for ops in there.ops.values() for op, n in ops.items() if op.kind == "experts")
    assert (experts > 0) == (kernels.load() is not None)
    assert there.flops == pytest.approx(here.flops, rel=0.02)  # rows filled up


def test_large_maps_are_new_memory_on_a_cpu():
    """A new block's bytes at its first writing; a convolution also copies maps into a layout of oneDNN's own."""
    ledger = Ledger(large=2**20)
    x, weight = torch.randn(1, 8, 64, 256), torch.randn(16, 8, 1, 1)  # 0.5 and, the result, 1 MiB
    with ledger:
        y = torch.conv2d(x, weight)
        kept = y.relu()
        kept.mul_(2.0)
    (ops,) = ledger.ops.values()
    assert sorted((op.kind, op.fresh) for op in ops) == [("conv", 2 * 2**20), ("rest", 0), ("rest", 2**20)]
    assert not any(op.fresh for op in Counter(trace(load("mocov2"), 1, 8, 1, "fp32", gpu=True).ops["student"]))


def test_sixteen_bits_halve_what_linear_layers_keep():
    cfg = load("mocov3", "model.options.dim=128")
    full, low = (sum(trace(cfg, 1, 32, 1, p, gpu=True).peak.values()) for p in ("fp32", "bf16"))
    assert 0.5 * full < low < 0.9 * full


def test_exact_large_batch_trades_a_forward_for_memory():
    plain, exact = load("mocov3"), load("mocov3", "batch.exact_large_batch=true")
    whole, parts = trace(plain, 1, 64, 1, "fp32", False), trace(exact, 1, 16, 4, "fp32", False)
    assert parts.peak["activations"] < 0.4 * whole.peak["activations"]
    assert parts.images == whole.images
    student = sum(op.flops * n for op, n in whole.ops["student"].items())
    assert parts.flops == pytest.approx(whole.flops + student, rel=0.02)


def test_accumulation_meets_the_gradients_of_the_first():
    one, two = (trace(load("mocov3"), 1, 16, n, "fp32", False) for n in (1, 2))
    assert two.flops == pytest.approx(2 * one.flops, rel=1e-6)
    assert two.peak["gradients"] == 4 * two.trained > one.peak.get("gradients", 0)
    assert sum(two.peak.values()) > sum(one.peak.values())


def test_activation_checkpointing():
    plain, checked = (trace(load("mocov3", f"model.activation_checkpointing={v}"), 1, 64, 1, "fp32", False)
                      for v in ("false", "true"))  # fmt: skip
    assert sum(checked.peak.values()) < 0.7 * sum(plain.peak.values())
    assert 1.1 * plain.flops < checked.flops < 1.4 * plain.flops


class Counting(SimComm):
    """Counts the bytes that a rank gives to all-to-alls."""

    def _exchange(self, x, send, recv):
        self.sent = getattr(self, "sent", 0) + x.numel() * x.element_size()
        return super()._exchange(x, send, recv)


@pytest.mark.parametrize("ep", [2, 4])
def test_messages_of_experts(ep):
    """Against the real layers: forward and backward, tokens routed at random."""
    cfg = load("crmoe", f"moe.ep_size={ep}")
    traced = trace(cfg, ep, 8, 1, "fp32", gpu=False)
    assert all(m.kind == "all_to_all" for m in traced.messages if m.group == "expert")
    planned = sum(m.size * n for m, n in traced.messages.items() if m.group == "expert")
    width, rows, layers = 32, 2 * 8 * 17, 2

    def one(comm):
        comm = Counting(comm.rank, comm.world, comm._shared)
        layer = SparseMLP(width, dataclasses.replace(cfg.moe, noise_std=0.0), 0, comm)
        torch.nn.init.normal_(layer.router.weight)
        with torch.no_grad():  # the teacher
            layer(torch.randn(1, rows, width))
        layer(torch.randn(1, rows, width, requires_grad=True))[0].sum().backward()
        return comm.sent

    torch.manual_seed(0)
    sent = SimComm.run(ep, one)
    assert planned == pytest.approx(layers * sum(sent) / ep, rel=0.1)
    assert traced.experts * ep == trace(load("crmoe"), 1, 8, 1, "fp32", False).experts


@pytest.mark.parametrize(("experts", "ep", "k"), [(4, 2, 2), (8, 4, 2), (8, 8, 3), (6, 3, 1), (4, 1, 2)])
def test_ranks_a_token(experts, ep, k):
    local = experts // ep
    every = [len({e // local for e in chosen}) for chosen in itertools.combinations(range(experts), k)]
    assert ranks_a_token(experts, ep, k) == pytest.approx(sum(every) / len(every))
    twice = [sum(n > 1 for n in Counter(e // local for e in chosen).values())
             for chosen in itertools.combinations(range(experts), k)]  # fmt: skip
    assert shared_a_token(experts, ep, k) == pytest.approx(sum(twice) / len(twice))


def test_shares():
    for total, parts in ((10, 3), (2, 4), (0, 2)):
        assert sum(shares(total, parts)) == total and max(shares(total, parts)) - min(shares(total, parts)) <= 1


def test_nothing_fake_stays_behind():
    cfg = load("esvit")
    trace(cfg, 8, 2, 1, "bf16", gpu=True)
    ledger, _ = real(cfg, 2)
    assert ledger.held.most > 0
