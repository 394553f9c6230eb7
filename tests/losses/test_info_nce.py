"""InfoNCE against the published values, over one and two ranks, in any precision."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_cl.comm import LocalComm, SimComm
from moe_cl.losses.info_nce import contrastive, first_is_positive, gather_keys, queue_logits

GOLDEN = Path(__file__).parents[1] / "golden"


def symmetric(comm, q1, q2, k1, k2, temperature):
    g1, g2 = gather_keys(k1, k2, comm=comm)
    return contrastive(q1, g2, temperature, comm.rank), contrastive(q2, g1, temperature, comm.rank)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_mocov3(world, temperature):
    z = np.load(GOLDEN / "moco_v3_loss.npz")

    def rank(comm):
        at = f"world{world}/rank{comm.rank}/"
        q1, q2, k1, k2 = (torch.from_numpy(z[at + n]) for n in ("q1", "q2", "k1", "k2"))
        q1.requires_grad_(), q2.requires_grad_()
        one, two = symmetric(comm, q1, q2, k1, k2, temperature)
        (one.loss + two.loss).backward()
        at += f"T{temperature}/"
        for name, value in (
            ("loss_q1k2", one.loss),
            ("loss_q2k1", two.loss),
            ("grad_q1", q1.grad),
            ("grad_q2", q2.grad),
        ):
            np.testing.assert_allclose(value.detach().numpy(), z[at + name], rtol=1e-9, atol=1e-12)

    SimComm.run(world, rank)


def test_autocast_changes_nothing():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 16).unbind()
    plain = contrastive(q, *gather_keys(k, comm=LocalComm()), 0.1).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive(q, *gather_keys(k, comm=LocalComm()), 0.1).loss, plain)


def test_random_value_and_similarities():
    """At random the loss is about 2T ln M for wide T; positives of equal rows have cosine 1."""
    torch.manual_seed(0)
    q = torch.randn(64, 256)
    out = contrastive(q, *gather_keys(torch.randn(64, 256), comm=LocalComm()), 1.0)
    assert out.loss == pytest.approx(2 * np.log(64), rel=0.02)
    same = contrastive(q, *gather_keys(q, comm=LocalComm()), 0.2)
    assert same.positive == pytest.approx(1, abs=1e-6) and abs(same.negative) < 0.02


@pytest.mark.parametrize("tag", ["v1", "v2"])
def test_queue(tag):
    z = np.load(GOLDEN / "moco_v12_loss.npz")
    queue = torch.from_numpy(z[f"{tag}_queue0"])
    q, k = (torch.from_numpy(z[f"{tag}_raw_{n}"][0]) for n in "qk")
    q.requires_grad_()
    logits = queue_logits(q, k, queue, float(z[f"{tag}_T"]))
    loss = first_is_positive(logits)
    loss.backward()
    np.testing.assert_allclose(logits.detach(), z[f"{tag}_logits"][0], rtol=1e-9)
    np.testing.assert_allclose(loss.item(), z[f"{tag}_loss"][0], rtol=1e-9)
    np.testing.assert_allclose(q.grad, z[f"{tag}_grad_raw_q"][0], rtol=1e-9, atol=1e-12)
