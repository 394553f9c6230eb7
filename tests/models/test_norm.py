"""Batch norm over views, groups and ranks against torch's own, and shuffle-BN against the published two-rank values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_cl.comm import LocalComm, SimComm, mean_gradients
from moe_cl.models.norm import BatchNorm, replay, share_statistics, shuffle, unshuffle, view_count

GOLDEN = Path(__file__).parents[1] / "golden" / "moco_v12_shufflebn_2proc.npz"


def twin(dim=5, affine=True, **kw):
    """Ours and torch's with the same values, fp64."""
    generator = torch.Generator().manual_seed(0)  # of its own: ranks may be threads
    ours, theirs = BatchNorm(dim, affine=affine, **kw).double(), nn.BatchNorm1d(dim, affine=affine).double()
    if affine:
        nn.init.normal_(theirs.weight, generator=generator)
        nn.init.normal_(theirs.bias, generator=generator)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_views_are_forwards_one_after_another(views, affine):
    ours, theirs = twin(affine=affine)
    x = torch.randn(views * 6, 5, dtype=torch.float64, requires_grad=True)
    r = torch.randn_like(x)
    want = torch.cat([theirs(v) for v in x.chunk(views)])
    (grad,) = torch.autograd.grad((want * r).sum(), x)
    got = ours(x, views)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((got * r).sum(), x)[0], grad, rtol=0, atol=1e-12)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-12)


def joint_case(comm, x_all, r_all, views, affine):
    """Forward and backward of this rank's columns of (views, rows, ...) in ``joint`` batch norm."""
    ours, _ = twin(affine=affine, comm=comm)
    rows = x_all.shape[1] // comm.world
    part = slice(comm.rank * rows, (comm.rank + 1) * rows)
    x = x_all[:, part].flatten(0, 1).clone().requires_grad_()
    y = ours(x, views)
    (y * r_all[:, part].flatten(0, 1)).sum().backward()
    mean_gradients(list(ours.parameters()), comm)
    grads = [p.grad * comm.world for p in ours.parameters()]
    return y.detach(), x.grad, grads, ours.state_dict()


def check_joint(results, x_all, r_all, views, affine):
    """Ranks' results against torch on the joint batch (BatchNorm1d takes maps as (B, C, P))."""
    flat = (lambda t: t.flatten(2)) if x_all.ndim > 3 else (lambda t: t)
    _, theirs = twin(affine=affine)
    x = flat(x_all.flatten(0, 1)).clone().requires_grad_()
    y = torch.cat([theirs(v) for v in x.chunk(views)])
    (y * flat(r_all.flatten(0, 1))).sum().backward()
    for position, want in ((0, y.detach()), (1, x.grad)):
        got = torch.cat([flat(r[position]).unflatten(0, (views, -1)) for r in results], 1).flatten(0, 1)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    for _, _, grads, state in results:
        for got, want in zip(grads, theirs.parameters(), strict=True):
            torch.testing.assert_close(got, want.grad, rtol=1e-10, atol=1e-10)
        for name, want in theirs.state_dict().items():
            torch.testing.assert_close(state[name], want, rtol=1e-10, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([2, 3, 4]), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 99)
)
def test_joint_statistics_equal_one_batch(world, views, rows, affine, maps, seed):
    torch.manual_seed(seed)
    shape = (views, world * rows, 5, *((3, 2) if maps else ()))
    x, r = (torch.randn(shape, dtype=torch.float64) + 7 for _ in range(2))
    results = SimComm.run(world, lambda comm: joint_case(comm, x, r, views, affine))
    check_joint(results, x, r, views, affine)


@pytest.mark.processes
def test_joint_statistics_over_processes(pool):
    torch.manual_seed(3)
    x, r = (torch.randn(2, 8, 5, dtype=torch.float64) for _ in range(2))
    check_joint(pool.run(2, joint_case, x, r, 2, True), x, r, 2, True)


def test_groups_are_ranks():
    """Split batch norm of one rank = plain batch norm of as many ranks, running statistics their mean."""
    ours, theirs = twin(groups=4)
    x = torch.randn(12, 5, dtype=torch.float64)
    parts, states = [], []
    for part in x.chunk(4):
        rank = nn.BatchNorm1d(5).double()
        rank.load_state_dict(theirs.state_dict())
        parts.append(rank(part))
        states.append(rank.state_dict())
    torch.testing.assert_close(ours(x), torch.cat(parts), rtol=0, atol=1e-12)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), torch.stack([s[name] for s in states]).mean(0))
    assert ours.num_batches_tracked == 1


def test_autocast_keeps_fp32_statistics():
    x = torch.randn(4096, 5) + 300  # bf16 sums of this would be off by far more than the bound
    for cast in (lambda n: n, lambda n: n.bfloat16()):
        norm = cast(BatchNorm(5))
        with torch.autocast("cpu", torch.bfloat16):
            norm(x.bfloat16())
        torch.testing.assert_close(norm.running_mean.float(), 0.1 * x.bfloat16().float().mean(0), rtol=5e-3, atol=0)
        y = SimComm.run(2, lambda comm, norm=norm: _half(norm, x, comm))[0]
        assert y.dtype == torch.bfloat16 and y.float().std() < 1.1


def _half(norm, x, comm):
    rank = BatchNorm(5, comm=comm).to(norm.running_mean.dtype)
    return rank(x.bfloat16())


def test_context_gives_views_and_replay_leaves_buffers():
    ours, _ = twin()
    x = torch.randn(8, 5, dtype=torch.float64)
    with view_count(2):
        a = ours(x)
    assert ours.num_batches_tracked == 2
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with replay(2):
        b = ours(x)
    assert torch.equal(a, b)
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


def test_errors_name_the_cause():
    ours, _ = twin(groups=2)
    with pytest.raises(ValueError, match="cannot be cut"):
        ours(torch.zeros(3, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="more than one value"):
        ours(torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="5 channels"):
        ours(torch.zeros(4, 6, dtype=torch.float64))
    share_statistics(ours, LocalComm(), 1)
    assert ours.groups == 1


class Tiny(nn.Module):
    """The golden encoder: fc(relu(bn(stem x)))."""

    def __init__(self, state):
        super().__init__()
        self.stem, self.bn = nn.Linear(6, 12, bias=False), BatchNorm(12)
        self.fc = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 8))
        self.double().load_state_dict(state, strict=True)

    def forward(self, x):
        return nn.functional.normalize(self.fc(torch.relu(self.bn(self.stem(x)))))


def encoder(golden, name):
    head = f"sd0/encoder_{name}."
    state = {k.removeprefix(head): torch.from_numpy(golden[k].copy()) for k in golden.files if k.startswith(head)}
    return Tiny(state)


def contrast(golden, q, k):
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ torch.from_numpy(golden["sd0/queue"])], 1) / float(
        golden["T"]
    )
    return nn.functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def moved(golden):
    """Key encoder after its EMA."""
    query, key, m = encoder(golden, "q"), encoder(golden, "k"), float(golden["m"])
    with torch.no_grad():
        for p, o in zip(key.parameters(), query.parameters(), strict=True):
            p.mul_(m).add_(o, alpha=1 - m)
    return query, key


def two_ranks(comm):
    g = np.load(GOLDEN)
    query, key = moved(g)
    of = lambda name: torch.from_numpy(g[f"rank{comm.rank}/{name}"])  # noqa: E731
    stand_alone = shuffle(of("im_k"), torch.from_numpy(g["idx_shuffle"]), comm)
    back = unshuffle(stand_alone, torch.from_numpy(g["idx_shuffle"]), comm)
    order = torch.from_numpy(g["fwd_idx_shuffle"])
    with torch.no_grad():
        keys = unshuffle(key(shuffle(of("im_k"), order, comm)), order, comm)
    loss = contrast(g, query(of("im_q")), keys)
    loss.backward()
    mean_gradients(list(query.parameters()), comm)
    grads = {k: p.grad for k, p in query.named_parameters()}
    return stand_alone, back, loss.item(), grads, query.bn.running_var, key.bn.running_var, keys


@pytest.mark.processes
def test_shuffle_bn_of_two_ranks(pool):
    g = np.load(GOLDEN)
    for rank, (shuffled, back, loss, grads, var_q, var_k, keys) in enumerate(pool.run(2, two_ranks)):
        assert np.array_equal(shuffled, g[f"rank{rank}/shuf_x"]) and np.array_equal(back, g[f"rank{rank}/back"])
        np.testing.assert_allclose(loss, g[f"rank{rank}/loss"], rtol=1e-9)
        for name, grad in grads.items():
            np.testing.assert_allclose(grad, g[f"ddp_grad/encoder_q.{name}"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(var_q, g[f"rank{rank}/sd1/encoder_q.bn.running_var"], rtol=1e-9)
        np.testing.assert_allclose(var_k, g[f"rank{rank}/sd1/encoder_k.bn.running_var"], rtol=1e-9)
        np.testing.assert_allclose(keys.T, g["sd1/queue"][:, rank * 8 : rank * 8 + 8], rtol=1e-9)


def test_split_bn_of_one_rank_is_shuffle_bn_of_two():
    g = np.load(GOLDEN)
    query, key = moved(g)
    share_statistics(query, groups=2), share_statistics(key, groups=2)
    im_q, im_k = (torch.from_numpy(np.concatenate([g[f"rank{r}/{n}"] for r in (0, 1)])) for n in ("im_q", "im_k"))
    order, comm = torch.from_numpy(g["fwd_idx_shuffle"]), LocalComm()
    with torch.no_grad():
        keys = unshuffle(key(shuffle(im_k, order, comm)), order, comm)
    loss = contrast(g, query(im_q), keys)
    loss.backward()
    np.testing.assert_allclose(loss.item(), (g["rank0/loss"] + g["rank1/loss"]) / 2, rtol=1e-9)
    np.testing.assert_allclose(keys.T, g["sd1/queue"][:, :16], rtol=1e-9)
    for name, p in query.named_parameters():
        np.testing.assert_allclose(p.grad, g[f"ddp_grad/encoder_q.{name}"], rtol=1e-9, atol=1e-12)
    mean = (g["rank0/sd1/encoder_k.bn.running_var"] + g["rank1/sd1/encoder_k.bn.running_var"]) / 2
    np.testing.assert_allclose(key.bn.running_var, mean, rtol=1e-9)


def _then_relu_in_place(comm):
    norm, x = BatchNorm(3, comm=comm), torch.randn(4, 3, 2, 2, requires_grad=True)
    y = torch.relu_(norm(x))
    y.sum().backward()
    return y.detach(), x.detach()


def test_output_of_joint_statistics_may_be_changed_in_place():
    """As a ResNet does."""
    (y0, x0), (y1, x1) = SimComm.run(2, _then_relu_in_place)
    together = torch.cat([x0, x1])
    expected = torch.relu(BatchNorm(3)(together))
    torch.testing.assert_close(torch.cat([y0, y1]), expected, rtol=1e-4, atol=1e-5)
