"""MoCo v1/v2: queue and whole steps against the published code, shuffle-BN on two ranks and split on one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.comm import LocalComm, SimComm
from moe_cl.config import ConfigError
from moe_cl.methods import moco
from moe_cl.models.build import Encoded
from tests.plain import Run, batch_of
from tests.tiny import TinyNet, load, under

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = {"stem.": "backbone.stem.", "bn.": "backbone.bn.", "fc.": "heads.fc."}


def sides(sd, side):
    """Golden state of one encoder, with the linear head's names as ours."""
    state = under(sd, f"{side}.")
    return {(k.replace("fc.", "fc.0.") if k in ("fc.weight", "fc.bias") else k): v for k, v in state.items()}


def build(sd, comm, params):
    width, inputs = sd["encoder_q.stem.weight"].shape
    method = moco.MoCo(params, comm).double()
    student = method.build_student(TinyNet(inputs, width)).double()
    teacher = method.build_teacher(TinyNet(inputs, width)).double()
    load(student, sides(sd, "encoder_q"), NAMES), load(teacher, sides(sd, "encoder_k"), NAMES)
    method.queue.copy_(torch.from_numpy(sd["queue"])), method.queue_ptr.copy_(torch.from_numpy(sd["queue_ptr"]))
    return Run(method, student, teacher, comm)


def check(module, state, atol=1e-10):
    mine = module.state_dict()
    for name, want in state.items():
        theirs = next(k for k in NAMES if name.startswith(k))
        got = mine[NAMES[theirs] + name.removeprefix(theirs)]
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=atol, err_msg=name)


@pytest.mark.parametrize("tag", ["v1", "v2"])
def test_two_steps(tag):
    z = np.load(GOLDEN / "moco_v12_e2e.npz")
    params = moco.Params(float(z[f"{tag}/T"]), int(z["C"]), int(z["K"]), "linear" if tag == "v1" else "mlp")
    run = build(under(z, f"{tag}/sd0/"), LocalComm(), params)
    options = dict(lr=float(z["lr"]), momentum=float(z["sgd_momentum"]), weight_decay=float(z["weight_decay"]))
    run.optimize(torch.optim.SGD(run.student.parameters(), **options))
    for s in range(2):
        x = torch.cat([torch.from_numpy(z[f"{tag}/im_{n}{s}"]) for n in "qk"])
        loss = run.step(batch_of([x]), float(z["m"]))
        np.testing.assert_allclose(loss, z[f"{tag}/loss{s}"], rtol=1e-10)
        grads = {k.replace("heads.", "").replace("backbone.", ""): v for k, v in run.grads.items()}
        for name, want in sides(under(z, f"{tag}/grad{s}/"), "encoder_q").items():
            np.testing.assert_allclose(grads[name], want, rtol=1e-8, atol=1e-10, err_msg=name)
        after = under(z, f"{tag}/sd{s + 1}/")
        check(run.student, sides(after, "encoder_q")), check(run.teacher.module, sides(after, "encoder_k"))
        np.testing.assert_allclose(run.method.queue, after["queue"], rtol=1e-10)
        assert run.method.queue_ptr == after["queue_ptr"]


@pytest.mark.parametrize("world", [1, 2])
def test_shuffled_batch_norm(world):
    """Two ranks as published; one rank with two parts of the batch gives the same keys, queue and mean gradient."""
    z = np.load(GOLDEN / "moco_v12_shufflebn_2proc.npz")

    def rank(comm):
        params = moco.Params(float(z["T"]), int(z["C"]), int(z["K"]), bn_groups=2 // world)
        run = build(under(z, "sd0/"), comm, params)
        run.method.order = lambda batch, rows: torch.from_numpy(z["fwd_idx_shuffle"])
        ranks = [comm.rank] if world == 2 else [0, 1]
        x = torch.cat([torch.from_numpy(z[f"rank{r}/im_{n}"]) for n in "qk" for r in ranks])
        loss = run.step(batch_of([x]), float(z["m"]))
        np.testing.assert_allclose(loss, np.mean([z[f"rank{r}/loss"] for r in ranks]), rtol=1e-10)
        grads = {k.replace("heads.", "").replace("backbone.", ""): v for k, v in run.grads.items()}
        for name, want in sides(under(z, "ddp_grad/"), "encoder_q").items():
            np.testing.assert_allclose(grads[name], want, rtol=1e-8, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(run.method.queue, z["sd1/queue"], rtol=1e-10)
        for side, module in (("encoder_q", run.student), ("encoder_k", run.teacher.module)):
            states = [sides(under(z, f"rank{r}/sd1/"), side) for r in ranks]
            check(module, {k: np.mean([s[k] for s in states], 0) for k in states[0]})

    SimComm.run(2, rank) if world == 2 else rank(LocalComm())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.integers(7, 20))
def test_queue_holds_the_last_keys(sizes, length):
    """Whatever the batches, the queue holds the newest ``length`` keys, the pointer where the next one goes."""
    method = moco.MoCo(moco.Params(dim=1, queue=length), LocalComm())
    written = [float("nan")] * length
    method.queue.fill_(float("nan"))
    for n in sizes:
        new = torch.arange(len(written), len(written) + n, dtype=torch.float32)
        written += new.tolist()
        method.commit({"keys": new[:, None]})
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


def test_queue_shorter_than_a_step():
    method = moco.MoCo(moco.Params(dim=4, queue=4), LocalComm())
    student, teacher = method.build_student(TinyNet(6, 12)), method.build_teacher(TinyNet(6, 12))
    with pytest.raises(ConfigError, match="params.queue"):
        Run(method, student, teacher).step(batch_of([torch.randn(12, 6)]))
