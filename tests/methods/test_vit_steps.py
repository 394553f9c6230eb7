"""Whole steps on ViTs: MoCo v3 (one rank, two ranks with synchronised BN) and CR-MoE, as published."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_cl.comm import LocalComm, SimComm
from moe_cl.config import MoEConfig
from moe_cl.losses.balance import balance
from moe_cl.methods import crmoe, mocov3, routing
from moe_cl.models.build import build_backbone
from tests.plain import Run, batch_of
from tests.tiny import load, under

GOLDEN = Path(__file__).parents[1] / "golden"
STUDENT = {"base_encoder.head.": "heads.projector.", "predictor.": "heads.predictor.", "base_encoder.": "backbone."}
TEACHER = {"momentum_encoder.head.": "heads.projector.", "momentum_encoder.": "backbone."}
EXPERTS = {"gate.w_gate": "router.weight", "experts.htoh4.weight": "experts.w1", "experts.htoh4.bias": "experts.b1",
           "experts.h4toh.weight": "experts.w2", "experts.h4toh.bias": "experts.b2"}  # fmt: skip
ZERO_BY_MATHS = ("base_encoder.norm.bias",)  # cancelled by the head's batch norm: float noise


def ours(name):
    for theirs, mine in {**STUDENT, **TEACHER}.items():
        if name.startswith(theirs):
            name = mine + name.removeprefix(theirs)
            break
    for theirs, mine in EXPERTS.items():
        name = name.replace(theirs, mine)
    return name


def load_ours(module, arrays, names):
    kept = {ours(k): v for k, v in arrays.items() if any(k.startswith(t) for t in names)}
    load(module, kept, {"": ""})


@pytest.mark.parametrize("world", [1, 2])
def test_mocov3(world):
    z = np.load(GOLDEN / "moco_v3_forward_vit.npz")
    sd = under(z, "world1/sd0/")

    def rank(comm):
        options = dict(dim=16, depth=2, heads=4, patch_size=8, img_size=16)
        params = mocov3.Params(temperature=float(z["T"]), dim=int(z["dim"]), mlp_dim=int(z["mlp_dim"]))
        method = mocov3.MoCoV3(params, comm)
        nets = [build_backbone("vit", comm=comm, **options).double() for _ in range(2)]
        student, teacher = method.build_student(nets[0]).double(), method.build_teacher(nets[1]).double()
        load_ours(student, sd, STUDENT), load_ours(teacher, sd, TEACHER)
        run = Run(method, student, teacher, comm)
        x = f"world2_localbn/rank{comm.rank}/" if world == 2 else "world1/"
        at = "world2_syncbn/" if world == 2 else "world1/"
        loss = run.step(batch_of([torch.cat([torch.from_numpy(z[x + n]) for n in ("x1", "x2")])]), float(z["m"]))
        np.testing.assert_allclose(loss, z[(f"{at}rank{comm.rank}/" if world == 2 else at) + "loss"], rtol=1e-9)
        grads = under(z, at + "ddp_grad/")
        assert {ours(k) for k in grads} == set(run.grads)
        for name, want in grads.items():
            np.testing.assert_allclose(run.grads[ours(name)], want, rtol=1e-7, atol=1e-10, err_msg=name)

    SimComm.run(world, rank) if world > 1 else rank(LocalComm())


@pytest.mark.parametrize("world", [1, 2])
def test_crmoe(world):
    """One rank: the published step. Two ranks: their mean is the same step (statistics over all ranks)."""
    z = np.load(GOLDEN / "crmoe_e2e.npz")
    sd, batch = under(z, "sd/"), len(z["x1"])

    def rank(comm):
        moe = MoEConfig(blocks=[1, 3], experts=4, top_k=2)
        params = crmoe.Params(temperature=float(z["T"]), dim=16, mlp_dim=64)
        method = crmoe.CRMoE(params, comm)
        options = dict(dim=32, depth=4, heads=4, patch_size=16, img_size=64, freeze_patch=False)
        student = method.build_student(build_backbone("vit", moe=moe, **options))
        teacher = method.build_teacher(build_backbone("vit", moe=moe, **options))
        load_ours(student, sd, STUDENT), load_ours(teacher, sd, TEACHER)
        run = Run(method, student, teacher, comm)
        rows = slice(comm.rank, None, comm.world)
        x = torch.cat([torch.from_numpy(z[n][rows]) for n in ("x1", "x2")])
        boxes = torch.stack([torch.from_numpy(z[n][rows]) for n in ("bbox1", "bbox2")])
        loss = run.step(batch_of([x], boxes), float(z["m"]))
        return run, loss.item(), x

    out = SimComm.run(world, rank) if world > 1 else [rank(LocalComm())]
    terms = {n: np.mean([float(run.metrics[n]) for run, *_ in out]) for n in ("loss/contrastive", "loss/consistency")}
    np.testing.assert_allclose(terms["loss/contrastive"], z["loss_cl"], rtol=5e-6)
    np.testing.assert_allclose(terms["loss/consistency"], z["loss_gate_weighted"], rtol=5e-6)
    mine = z["loss_cl"] + z["loss_gate_weighted"] + z["w_lb"] * z["lb_base_unweighted"]
    np.testing.assert_allclose(np.mean([loss for _, loss, _ in out]), mine, rtol=5e-6)
    run = out[0][0]
    for name, want in under(z, "grad/").items():
        if name in ZERO_BY_MATHS:
            continue
        got = run.grads[ours(name)].numpy()
        if name.endswith("qkv.bias"):  # the keys' third is zero by maths
            got, want = (np.delete(g, slice(len(g) // 3, 2 * len(g) // 3)) for g in (got, want))
        np.testing.assert_allclose(got, want, atol=6e-5 * np.abs(want).max(), err_msg=name)
    if world == 1:
        state = run.teacher.module.state_dict()
        for name, want in under(z, "after/").items():
            if name.startswith("momentum_encoder"):
                np.testing.assert_allclose(state[ours(name)], want, rtol=1e-5, atol=1e-6, err_msg=name)
        encoded = run.teacher("encode", [out[0][2]], None, [2])
        lb = balance(routing.balance_sums(encoded, batch), run.comm)[0]
        np.testing.assert_allclose(lb, z["lb_momentum_unweighted"], rtol=1e-5)
