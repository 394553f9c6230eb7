"""JCL's bound and SimCLR's loss against the published values."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_cl.comm import LocalComm, SimComm
from moe_cl.losses.info_nce import contrastive, first_is_positive, gather_keys, queue_logits
from moe_cl.losses.jcl import joint, ramp
from moe_cl.losses.ntxent import ntxent

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["paper_M5_l4", "script_M4_l2", "ramp_M4_l0p01", "M1_equals_moco", "M3_T007"]


@pytest.mark.parametrize("case", CASES)
def test_published(case):
    z = {k.split("/")[1]: v for k, v in np.load(GOLDEN / "jcl_loss.npz").items() if k.startswith(case + "/")}
    for s in range(2):
        q = torch.from_numpy(z[f"raw_q{s}"]).requires_grad_()
        keys = torch.from_numpy(z[f"raw_k{s}"]).view(int(z["M"]), *q.shape)
        queue = torch.from_numpy(z["queue0"] if s == 0 else z["queue_after0"])
        out = joint(q, keys, queue, float(z["T"]), float(z["lambda_eff"]))
        out.loss.backward()
        for name, got in {
            "total": out.loss, "ce": out.cross_entropy, "jcl_term": out.covariance, "logits": out.logits,
            "mu": out.mean, "quad_form": out.quadratic, "grad_raw_q": q.grad,
        }.items():  # fmt: skip
            np.testing.assert_allclose(got.detach(), z[f"{name}{s}"], rtol=1e-9, atol=1e-12, err_msg=name)


def test_reduces_to_moco():
    torch.manual_seed(0)
    q, keys, queue = torch.randn(6, 8), torch.randn(3, 6, 8), torch.nn.functional.normalize(torch.randn(8, 20), dim=0)
    moco = first_is_positive(queue_logits(q, keys[0], queue, 0.2))
    torch.testing.assert_close(joint(q, keys[:1], queue, 0.2, 4.0).loss, moco)
    no_covariance = joint(q, keys, queue, 0.2, 0.0)
    assert no_covariance.covariance == 0 and no_covariance.loss == no_covariance.cross_entropy


def test_ramp():
    z = np.load(GOLDEN / "moco_schedules.npz")
    weight, epochs = float(z["jcl_lambda"]), len(z["jcl_ratio_per_epoch"])
    ours = np.array([ramp(weight, e, epochs) for e in range(epochs)])
    ratio = z["jcl_ratio_per_epoch"]
    scale = weight if np.allclose(ratio[-1], weight) else 1.0
    np.testing.assert_allclose(ours / weight * scale, ratio, rtol=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ntxent(temperature, world):
    """Published value on one rank; the same loss and gradients on any number."""
    z = np.load(GOLDEN / "moco_simclr_ntxent.npz")

    def rank(comm):
        z0, z1 = (torch.from_numpy(z[n][comm.rank :: comm.world]).requires_grad_() for n in ("z0", "z1"))
        loss = ntxent(z0, z1, temperature, comm).loss
        loss.backward()
        return loss.item(), z0.grad / world, z1.grad / world

    out = SimComm.run(world, rank)
    at = f"T{temperature}/"
    assert np.mean([o[0] for o in out]) == pytest.approx(float(z[at + "loss"]), rel=1e-9)
    for r, (_, g0, g1) in enumerate(out):
        np.testing.assert_allclose(g0, z[at + "grad_z0"][r::world], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(g1, z[at + "grad_z1"][r::world], rtol=1e-8, atol=1e-12)


def test_end_to_end_gradient_reaches_keys_through_the_gather():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 4, dtype=torch.float64).unbind()

    def one(comm):
        mine = [t[comm.rank :: comm.world].clone().requires_grad_() for t in (q, k)]
        (keys,) = gather_keys(mine[1], comm=comm, gradient=True)
        contrastive(mine[0], keys, 0.2, comm.rank, scale=1.0).loss.backward()
        return [t.grad / comm.world for t in mine]

    whole = one(LocalComm())
    for r, grads in enumerate(SimComm.run(2, one)):
        for got, want in zip(grads, whole, strict=True):
            torch.testing.assert_close(got, want[r::2], rtol=1e-9, atol=1e-12)
