"""Every collective, with and without gradient, the same on threads (SimComm) and on processes (DistComm)."""

import pytest
import torch

from moe_cl.comm import LocalComm, SimComm, mean_gradients


def exercise(comm):
    """Values and gradients of a rank-dependent loss through each collective."""
    torch.manual_seed(comm.rank)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.arange(3 * comm.world, dtype=torch.float64)[:, None] + comm.rank
    gathered = comm.all_gather_grad(x)
    (gathered * weight).sum().backward()
    grads = [x.grad.clone()]
    x.grad = None
    (comm.all_reduce_grad(x) * (comm.rank + 1)).sum().backward()
    grads.append(x.grad.clone())
    x.grad = None
    # Rank r sends r rows to rank 0, the others to the last rank: zeros included.
    send = [0] * comm.world
    send[0] += comm.rank % 4 if comm.world > 1 else 3
    send[-1] += 3 - send[0] if comm.world > 1 else 0
    counts = comm.all_gather(torch.tensor([send]))
    recv = counts[:, comm.rank].tolist()
    out = comm.all_to_all_grad(x, send, recv)
    (out * (comm.rank + 2)).sum().backward()
    grads.append(x.grad.clone())
    shared = comm.broadcast(torch.full((2,), float(comm.rank)), src=comm.world - 1)
    reduced = [comm.all_reduce(torch.tensor([comm.rank + 1.0]), op).item() for op in ("sum", "max", "min", "mean")]
    comm.barrier()
    return [t.detach() for t in (x, gathered, out, *grads, shared)], reduced, comm.gather_objects(comm.rank)


def check(results):
    world = len(results)
    xs = [r[0][0] for r in results]
    total = sum(torch.arange(3 * world, dtype=torch.float64)[:, None] + r for r in range(world))
    for rank, (tensors, reduced, objects) in enumerate(results):
        _, gathered, _, g_gather, g_sum, g_swap, shared = tensors
        assert torch.equal(gathered, torch.cat(xs))
        assert torch.allclose(g_gather, total[rank * 3 : rank * 3 + 3].expand(3, 2))
        assert torch.allclose(g_sum, torch.full((3, 2), world * (world + 1) / 2, dtype=torch.float64))
        first = 3 if world == 1 else rank % 4  # rows that went to rank 0, weighted there with 2
        expected = [2.0] * first + [world + 1.0] * (3 - first)
        assert g_swap[:, 0].tolist() == expected
        assert shared.tolist() == [world - 1.0] * 2
        assert reduced == [world * (world + 1) / 2, world, 1, (world + 1) / 2]
        assert objects == list(range(world))


def test_local():
    check([exercise(LocalComm())])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_threads(world):
    check(SimComm.run(world, exercise))


@pytest.mark.processes
@pytest.mark.parametrize("world", [2, 4])
def test_processes(pool, world):
    check(pool.run(world, exercise))


def fail_on_one(comm):
    if comm.rank == 1:
        raise ValueError("rank 1 has a reason")
    comm.barrier()


def test_a_failing_thread_is_named_and_the_others_do_not_hang():
    with pytest.raises(ValueError, match="rank 1 has a reason"):
        SimComm.run(3, fail_on_one)


def test_mean_gradients():
    def one(comm):
        p = torch.nn.Parameter(torch.zeros(2))
        untouched = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.full((2,), float(comm.rank))
        mean_gradients([p, untouched], comm)
        return p.grad.tolist(), untouched.grad.tolist()

    assert SimComm.run(2, one) == [([0.5, 0.5], [0.0] * 3)] * 2
