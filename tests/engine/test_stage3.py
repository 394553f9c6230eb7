"""ZeRO 3 for dense networks: the same run as at stage 0, the teacher's average on its shards."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_cl import methods
from moe_cl.config import ModelConfig, build
from moe_cl.engine.flat import local
from moe_cl.engine.step import step
from tests.engine.runs import batch_of, build_run, config
from tests.engine.tiny import same_ids

pytestmark = pytest.mark.processes
PARAMS = {
    "mocov3": {"dim": 8, "mlp_dim": 16},
    "esvit": {"out_dim": 12, "hidden": 16, "bottleneck": 8, "freeze_last_layer": 1},
}
SWIN = ModelConfig("swin", {"dim": 8, "depths": [2, 2], "heads": [1, 2], "window": 4, "img_size": 16, "patch_size": 2})


def gathered(comm, module):
    out = {}
    for name, p in module.named_parameters():
        if hasattr(p, "ds_tensor"):
            start, shard = local(p)
            flat = torch.zeros(p.ds_numel)
            flat[start : start + shard.numel()] = shard
            out[name] = comm.all_reduce(flat).view(p.ds_shape).numpy()
        else:
            out[name] = p.detach().numpy()
    return out


def settings(out, method, stage, swin=False):
    cfg = config(out, method="mocov3", stage=stage)
    cfg.method, cfg.params = method, build(methods.params_of(method), PARAMS[method])
    if swin:
        cfg.model = SWIN
    return cfg


def train(comm, out, method, stage, swin):
    same_ids()
    parts = build_run(comm, settings(out, method, stage, swin)).parts
    losses = []
    for number in range(3):
        parts.method.progress.step = number
        losses.append(float(step(parts, [batch_of(comm.rank, comm.world, seed=number)], number, 0.9).metrics["loss"]))
    return losses, gathered(comm, parts.student), gathered(comm, parts.teacher.module)


@pytest.mark.parametrize(("method", "swin"), [("mocov3", False), ("esvit", False), ("esvit", True)])
def test_as_stage_zero(pool, tmp_path, method, swin):
    want = pool.run(2, train, str(tmp_path / "a"), method, 0, swin)
    for got, mine in zip(pool.run(2, train, str(tmp_path / "b"), method, 3, swin), want, strict=True):
        assert got[0] == pytest.approx(mine[0], rel=3e-6)
        for side in (1, 2):
            assert got[side].keys() == mine[side].keys()
            for name, value in mine[side].items():
                torch.testing.assert_close(
                    torch.from_numpy(got[side][name]), torch.from_numpy(value), rtol=0, atol=3e-6
                )


class Collectives(TorchDispatchMode):
    """Names of the collectives that run inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def piecewise(comm, out):
    """Collectives of an EMA update and of a forward of the teacher, the most of each network that was ever whole."""
    cfg = settings(out, "esvit", 3, swin=True)
    one_by_one = {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
                  "stage3_param_persistence_threshold": 0}  # fmt: skip
    with open(cfg.engine.ds_config, "w") as file:
        json.dump({"zero_optimization": {"stage": 3, "overlap_comm": False, **one_by_one}}, file)
    same_ids()
    parts = build_run(comm, cfg).parts
    networks = {"student": parts.student, "teacher": parts.teacher.module}
    total = {side: sum(p.ds_numel for p in net.parameters()) for side, net in networks.items()}
    most = dict.fromkeys(networks, 0)

    def look(*_):
        for side, net in networks.items():
            most[side] = max(most[side], sum(p.numel() for p in net.parameters() if p.numel() == p.ds_numel))

    for net in networks.values():
        for module in net.modules():
            module.register_forward_pre_hook(look)
    parts.method.progress.step = 0
    batch = batch_of(comm.rank, comm.world)
    step(parts, [batch], 0, 0.9)
    student, teacher = (dict(net.named_parameters()) for net in networks.values())
    want = {n: 0.75 * local(t)[1] + 0.25 * local(student[n])[1] for n, t in teacher.items() if student[n].requires_grad}
    with Collectives() as update:
        parts.teacher.update(0.75)
    with Collectives() as forward:
        parts.method.encode_teacher(parts.teacher, batch)
    exact = all(torch.allclose(local(teacher[n])[1], value, rtol=0, atol=1e-6) for n, value in want.items())
    cut = all(p.ds_tensor.numel() < p.ds_numel or p.ds_numel == 1 for p in teacher.values())
    return update.seen, len(forward.seen), exact, cut, {side: most[side] / total[side] for side in networks}


def test_the_model_is_never_gathered(pool, tmp_path):
    for update, forward, exact, cut, share in pool.run(2, piecewise, str(tmp_path / "run")):
        assert not update and forward > 0, "the average works on shards; the forward shows that the probe sees messages"
        assert exact and cut
        assert all(0 < value < 0.6 for value in share.values()), share
