"""An out dir with one complete checkpoint of a small encoder, and two folders of pictures, without a training run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_prep.cli import main as data_prep
from moe_cl import config, methods
from moe_cl.comm import LocalComm
from moe_cl.config import EvalConfig, ModelConfig, MoEConfig, RunConfig, ViewsConfig, build
from moe_cl.engine.checkpoint.format import MANIFEST, Manifest, TensorEntry, write_shard
from moe_cl.models.build import from_config

SMALL = {"mocov3": {"dim": 8, "mlp_dim": 32}, "esvit": {"out_dim": 16, "hidden": 8, "bottleneck": 4}}
TINY = {"img_size": 16, "patch_size": 8, "dim": 16, "depth": 2, "heads": 2}


def make_run(
    out: Path,
    images: Path | None = None,
    model: ModelConfig | None = None,
    moe: str = "odd",
    sides: tuple[str, ...] = ("teacher",),
    method: str = "mocov3",
) -> RunConfig:
    """``config.yaml`` and ``checkpoints/step-*`` with the fresh weights of encoders and heads, other ones each side."""
    cfg = RunConfig(method=method, recipe="small", out=str(out), params=build(methods.params_of(method), SMALL[method]))
    cfg.model = model or ModelConfig("vit", TINY)
    cfg.moe, cfg.views = MoEConfig(moe, experts=4, hidden_ratio=1.0), ViewsConfig(size=16)
    if images is not None:
        cfg.eval = EvalConfig(bank=f"folder:{images / 'train'}", test=f"folder:{images / 'test'}", k=5)
    path = out / "checkpoints" / "step-00000007"
    path.mkdir(parents=True)
    manifest, tensors = Manifest(step=7, world=1), {}
    for number, side in enumerate(sides, 1):
        torch.manual_seed(number)
        backbone, parts = from_config(cfg.model, cfg.moe, teacher=True), methods.get(method)(cfg.params, LocalComm())
        module = (parts.build_teacher if side == "teacher" else parts.build_student)(backbone)
        for name, value in module.state_dict().items():
            key = f"{side}/{name}"
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


def make_dtd(root: Path, images: Path) -> None:
    """torchvision's layout of DTD: images by class, and lists of a split."""
    (root / "labels").mkdir(parents=True)
    shutil.copytree(images / "train", root / "images")
    files = sorted(p.relative_to(root / "images") for p in (root / "images").rglob("*.png"))
    for number, split in enumerate(("train", "val", "test")):
        (root / "labels" / f"{split}1.txt").write_text("\n".join(map(str, files[number::3])))


def make_shards(folder: Path) -> Path:
    """``make_images`` as a sharded set with ``train`` and ``test``; the set's directory."""
    images, out = make_images(folder / "images"), folder / "set"
    for split in ("train", "test"):
        options = ["--split", split, "--out", str(out), "--name", "set", "--workers", "1"]
        assert data_prep(["shard", str(images / split), *options]) == 0
    return out
