"""One rank of a layout with torch's fake process group (``simulate.py``): builds the run, makes a step, tells facts.

python -m moe_cl.planning.one_rank RANK < {"world": ..., "per_node": ..., "config": ...}
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from moe_cl import config, methods
from moe_cl.comm import Comm
from moe_cl.config import ConfigError, RunConfig
from moe_cl.engine import checks, fake, large_batch, setup, step
from moe_cl.planning import model
from moe_cl.planning.layout import Layout
from moe_cl.planning.plan import zero_of
from moe_cl.planning.trace import trace
from moe_cl.views.spec import Batch, build_spec


def batches(cfg: RunConfig, micro: int, parts: int) -> list[Batch]:
    """Random micro-batches."""
    spec = build_spec(cfg.views)
    torch.manual_seed(cfg.seed)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]).expand(spec.views, micro, 5).contiguous()
    out = []
    for part in range(parts):
        ids = torch.arange(micro) + part * micro
        views = [torch.randn(number * micro, 3, side, side) for side, number in spec.resolutions]
        out.append(Batch(views, boxes.clone(), ids, ids, ids))
    return out


def facts(rank: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Build, step once, and what came of it."""
    cfg = config.from_tree(asked["config"], methods.params_of)
    world = asked["world"]
    comm = fake.join(rank, world, asked["per_node"])
    batch = checks.batch_identity(cfg, world)
    tree = checks.ds_config(cfg, world, True)
    heard: list[str] = []
    Comm.watch = staticmethod(heard.append)  # of every communicator, those inside the MoE layers too
    built = setup.build(cfg, comm)
    engine, student = built.parts.engine, built.parts.student
    heard.clear()
    before = _owned(engine)
    before = [x.clone() for x in before]
    driver = large_batch.step if cfg.batch.exact_large_batch else step.step
    agreed = driver(built.parts, batches(cfg, batch.micro_batch, batch.accumulation), 0, 0.99)
    after = _owned(engine)
    strided = bool(tree.get("use_data_before_expert_parallelism", False))
    zero, layout = zero_of(tree), Layout(world // asked["per_node"], asked["per_node"], cfg.moe.ep_size, strided)
    traced = trace(cfg, world, batch.micro_batch, batch.accumulation, "fp32", False)
    return {
        "world": world, "strided": strided, "asked": cfg.batch.global_batch,
        "batch": {"global": engine.train_batch_size(), "micro": engine.train_micro_batch_size_per_gpu(),
                  "accumulation": engine.gradient_accumulation_steps()},
        "stage": engine.zero_optimization_stage(), "collectives": heard,
        "shapes": [list(getattr(p, "ds_shape", p.shape)) for p in student.parameters()],
        "loss": float(agreed.metrics["loss"]), "finite": all(bool(torch.isfinite(x).all()) for x in after),
        "moved": any(not torch.equal(x, y) for x, y in zip(before, after, strict=True)),
        "owned": sum(x.numel() for x in after), "planned": model.partition(traced, layout, zero.stage),
        "padding": 2 * len(after) + traced.tensors,
        **_experts(student),
    }  # fmt: skip


def _owned(engine: Any) -> list[torch.Tensor]:
    """What this rank's optimizer updates."""
    optimizer = engine.optimizer
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):  # ZeRO 1 and 2, ZeRO 3
        if hasattr(optimizer, name):
            return [x.detach() for x in getattr(optimizer, name)]
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def _experts(student: torch.nn.Module) -> dict[str, Any]:
    layers = [m for m in student.modules() if hasattr(m, "expert_group_name")]
    if not layers:
        return {"expert_group": None}
    group, copies = fake.expert_groups(layers[0].expert_group_name)
    return {
        "expert_group": group,
        "copies": copies,
        "first_experts": [layer.experts.first for layer in layers],
        "local_experts": len(layers[0].experts.w1),
    }


def main() -> int:
    """One line of JSON on stdout; a ConfigError is one line on stderr."""
    rank, asked = int(sys.argv[1]), json.loads(sys.stdin.read())
    torch.set_num_threads(1)
    try:
        found = facts(rank, asked)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found), flush=True)
    os._exit(0)  # the fake group has nothing to tear down, and DeepSpeed would wait for the others


if __name__ == "__main__":
    sys.exit(main())
