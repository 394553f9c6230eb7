"""Small real runs for engine tests: a CR-MoE (or dense MoCo v3) of a few thousand parameters through DeepSpeed."""

from __future__ import annotations

import json
import os
from unittest import mock

import torch

from moe_cl import methods
from moe_cl.config import BatchConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig, TeacherConfig, build
from moe_cl.engine import setup
from moe_cl.engine.ranks import leave_out_shm_op
from moe_cl.models.build import from_config
from moe_cl.views.spec import Batch


def config(
    out="run", *, method="crmoe", ep=1, stage=1, precision="fp32", batch=8, accumulation=1, optim="sgd", **moe
) -> RunConfig:
    """ViT of 2 blocks on 16 px; experts get xavier weights so that a dispatch error cannot hide in their smallness."""
    params = build(methods.params_of(method), {"dim": 8, "mlp_dim": 16})
    cfg = RunConfig(method=method, out=str(out), params=params, teacher=TeacherConfig(0.9))
    cfg.model = ModelConfig("vit", {"img_size": 16, "patch_size": 8, "dim": 16, "depth": 2, "heads": 2})
    cfg.batch = BatchConfig(batch, None, accumulation)
    cfg.optim = OptimConfig(optim, base_lr=0.05, lr_scaling="none", weight_decay=0.01)
    cfg.engine.precision, cfg.engine.ds_config = precision, write_json(out, stage)
    if method == "crmoe":
        cfg.moe = MoEConfig("odd", experts=4, top_k=2, hidden_ratio=1.0, init="xavier", ep_size=ep, **moe)
    return cfg


def write_json(out, stage: int) -> str:
    """A plain DeepSpeed JSON of that ZeRO stage beside the run."""
    path = f"{out}-zero{stage}-{os.getpid()}.json"  # every rank writes its own
    with open(path, "w") as f:
        json.dump({"zero_optimization": {"stage": stage, "overlap_comm": False}, "gradient_clipping": 0.0}, f)
    return path


def batch_of(rank: int, world: int, total: int = 8, seed: int = 0, size: int = 16) -> Batch:
    """This rank's samples (position mod world == rank) of one fixed global batch of two views."""
    g = torch.Generator().manual_seed(seed)
    views = torch.randn(2, total, 3, size, size, generator=g)
    boxes = torch.rand(2, total, 5, generator=g) * 0.2
    boxes[..., 2:4] += 0.6
    boxes[..., 4] = (boxes[..., 4] > 0.1).float()
    mine = torch.arange(rank, total, world)
    ids, labels, positions = mine + 100 * seed, torch.full((len(mine),), -1), mine + total * seed
    return Batch([views[:, mine].flatten(0, 1)], boxes[:, mine], ids, labels, positions)


def micro(batch: Batch, parts: int) -> list[Batch]:
    """A rank's batch cut into ``parts`` micro-batches."""
    v, b = batch.boxes.shape[:2]
    views = [x.view(v, b, *x.shape[1:]).chunk(parts, 1) for x in batch.views]
    return [
        Batch([x[i].flatten(0, 1) for x in views], batch.boxes.chunk(parts, 1)[i], *(
            t.chunk(parts)[i] for t in (batch.sample_ids, batch.labels, batch.positions)
        ))
        for i in range(parts)
    ]  # fmt: skip


def build_run(comm, cfg: RunConfig) -> setup.Built:
    """Engine, teacher and method on the pool's ranks."""
    import deepspeed

    leave_out_shm_op()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    with mock.patch.object(setup, "from_config", well_conditioned):
        return setup.build(cfg, comm)


def well_conditioned(*args, **options):
    """The backbone with a cls token of ordinary size: its published start N(0, 1e-6) sits on LayerNorm's eps, where the
    last bit of a gradient becomes the fourth digit of a step, and layouts could not be compared."""
    backbone = from_config(*args, **options)
    if not hasattr(backbone, "cls_token"):  # Swin
        return backbone
    with torch.no_grad():
        backbone.cls_token.copy_(torch.linspace(-1, 1, backbone.cls_token.numel()).view_as(backbone.cls_token))
    return backbone
