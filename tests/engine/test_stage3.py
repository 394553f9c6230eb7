"""ZeRO 3 for dense networks: the same run as at stage 0, the teacher's average on its shards."""

import pytest
import torch

from moe_cl import methods
from moe_cl.config import build
from moe_cl.engine.flat import local
from moe_cl.engine.step import step
from tests.engine.runs import batch_of, build_run, config
from tests.engine.tiny import same_ids

pytestmark = pytest.mark.processes
PARAMS = {
    "mocov3": {"dim": 8, "mlp_dim": 16},
    "esvit": {"out_dim": 12, "hidden": 16, "bottleneck": 8, "freeze_last_layer": 1},
}


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


def train(comm, out, method, stage):
    cfg = config(out, method="mocov3", stage=stage)
    cfg.method, cfg.params = method, build(methods.params_of(method), PARAMS[method])
    same_ids()
    parts = build_run(comm, cfg).parts
    losses = []
    for number in range(3):
        parts.method.progress.step = number
        losses.append(float(step(parts, [batch_of(comm.rank, comm.world, seed=number)], number, 0.9).metrics["loss"]))
    return losses, gathered(comm, parts.student), gathered(comm, parts.teacher.module)


@pytest.mark.parametrize("method", list(PARAMS))
def test_as_stage_zero(pool, tmp_path, method):
    want = pool.run(2, train, str(tmp_path / "a"), method, 0)
    for got, mine in zip(pool.run(2, train, str(tmp_path / "b"), method, 3), want, strict=True):
        assert got[0] == pytest.approx(mine[0], rel=3e-6)
        for side in (1, 2):
            assert got[side].keys() == mine[side].keys()
            for name, value in mine[side].items():
                torch.testing.assert_close(
                    torch.from_numpy(got[side][name]), torch.from_numpy(value), rtol=0, atol=3e-6
                )
