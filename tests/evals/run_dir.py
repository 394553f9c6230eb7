"""An out dir with one complete checkpoint of a small encoder, and two folders of pictures, without a training run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moe_cl import config, methods
from moe_cl.config import EvalConfig, ModelConfig, MoEConfig, RunConfig, ViewsConfig, build
from moe_cl.engine.checkpoint.format import MANIFEST, Manifest, TensorEntry, write_shard
from moe_cl.models.build import from_config

TINY = {"img_size": 16, "patch_size": 8, "dim": 16, "depth": 2, "heads": 2}


def make_run(out: Path, images: Path | None = None, model: ModelConfig | None = None, moe: str = "odd") -> RunConfig:
    """``config.yaml`` and ``checkpoints/step-*`` holding an encoder's fresh weights as the teacher's."""
    cfg = RunConfig(method="mocov3", recipe="small", out=str(out), params=build(methods.params_of("mocov3"), {}))
    cfg.model = model or ModelConfig("vit", TINY)
    cfg.moe, cfg.views = MoEConfig(moe, experts=4, hidden_ratio=1.0), ViewsConfig(size=16)
    if images is not None:
        cfg.eval = EvalConfig(bank=f"folder:{images / 'train'}", test=f"folder:{images / 'test'}", k=5)
    torch.manual_seed(1)
    backbone = from_config(cfg.model, cfg.moe, teacher=True)
    path = out / "checkpoints" / "step-00000007"
    path.mkdir(parents=True)
    manifest, tensors = Manifest(step=7, world=1), {}
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state["heads.projector.0.weight"] = torch.randn(32, backbone.dim) * 0.1
    for name, value in state.items():
        key = f"teacher/{name}"
        tensors[key] = value.contiguous()
        piece = ["weights.safetensors", key, 0, value.numel()]
        manifest.tensors[key] = TensorEntry(list(value.shape), str(value.dtype).removeprefix("torch."), [piece])
    manifest.files["weights.safetensors"] = write_shard(path / "weights.safetensors", tensors)
    (path / MANIFEST).write_text(manifest.dump())
    for folder in (out, path):
        config.save(cfg, folder / "config.yaml")
    return cfg


def make_images(folder: Path, per_class: int = 12, classes: int = 3, size: int = 16, seed: int = 0) -> Path:
    """``train`` and ``test``, one sub-folder a class; a class is a colour with noise on it."""
    rng = np.random.default_rng(seed)
    for part, count in (("train", per_class), ("test", per_class // 2)):
        for c in range(classes):
            target = folder / part / f"class{c}"
            target.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (size, size, 3))
                pixels[..., c % 3] += 120 + 20 * (c // 3)
                Image.fromarray(pixels.astype(np.uint8)).save(target / f"{i:03d}.png")
    return folder
