"""MoCo v3: whole steps of the published code, on one and two ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_cl.comm import LocalComm, SimComm
from moe_cl.methods import mocov3
from tests.plain import Run, batch_of
from tests.tiny import TinyNet, load, under

FILE = Path(__file__).parents[1] / "golden" / "moco_v3_forward_resnet.npz"
STUDENT = {"base_encoder.stem": "backbone.stem", "base_encoder.bn": "backbone.bn", "base_encoder.fc": "heads.projector",
           "predictor": "heads.predictor"}  # fmt: skip
TEACHER = {k.replace("base", "momentum"): v for k, v in STUDENT.items() if k != "predictor"}


def build(z, comm, sync=True):
    params = mocov3.Params(temperature=float(z["T"]), dim=int(z["dim"]), mlp_dim=int(z["mlp_dim"]), head="resnet")
    sd = under(z, "world1/sd0/")
    width, inputs = sd["base_encoder.stem.weight"].shape
    method = mocov3.MoCoV3(params, comm if sync else LocalComm())
    nets = [TinyNet(inputs, width, comm if sync else None).double() for _ in range(2)]
    student, teacher = method.build_student(nets[0]).double(), method.build_teacher(nets[1]).double()
    load(student, sd, STUDENT), load(teacher, sd, TEACHER)
    return Run(method, student, teacher, comm)


def check_state(module, arrays, names, rtol=1e-9):
    state = module.state_dict()
    for name, want in arrays.items():
        for theirs, ours in names.items():
            if name.startswith(theirs):
                got = state[ours + name.removeprefix(theirs)]
                np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-11, err_msg=name)


def ours(name):
    return next(o + name.removeprefix(t) for t, o in STUDENT.items() if name.startswith(t))


def views(z, at):
    return batch_of([torch.cat([torch.from_numpy(z[at + "x1"]), torch.from_numpy(z[at + "x2"])])])


@pytest.mark.parametrize("world, mode", [(1, ""), (2, "world2_localbn/"), (2, "world2_syncbn/")])
def test_resnet_step(world, mode):
    z = np.load(FILE)

    def rank(comm):
        run = build(z, comm, sync=mode != "world2_localbn/")
        at = f"world2_localbn/rank{comm.rank}/" if world == 2 else "world1/"
        loss = run.step(views(z, at), momentum=float(z["m"]))
        out = f"{mode}rank{comm.rank}/" if world == 2 else "world1/"
        np.testing.assert_allclose(loss, z[out + "loss"], rtol=1e-10)
        for name, want in under(z, (mode or "world1/") + "ddp_grad/").items():
            np.testing.assert_allclose(run.grads[ours(name)], want, rtol=1e-8, atol=1e-11, err_msg=name)
        after = under(z, (mode if "sync" in mode else out) + "sd1/")
        if world == 1:  # the file's step has no optimizer
            check_state(run.teacher.module, after, TEACHER)
        check_state(run.student, {k: v for k, v in after.items() if "running" in k}, STUDENT)
        check_state(run.teacher.module, {k: v for k, v in after.items() if "running" in k}, TEACHER)

    SimComm.run(world, rank) if world > 1 else rank(LocalComm())
