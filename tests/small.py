"""A small data set and a small CR-MoE run, for tests that start the real command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": ""}
ENV["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{ENV['PATH']}"
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MLFLOW_TRACKING_URI"):
    ENV.pop(_name, None)


def only_launcher(given: dict[str, str], monkeypatch) -> None:
    """The environment has no launcher's variables but these."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def make_shards(folder: Path, images: int = 96, classes: int = 3) -> Path:
    """Shards of ``images`` 16 px pictures (a class is a brightness), made by the project's own sharder."""
    rng = np.random.default_rng(0)
    for i in range(images):
        c = i % classes
        path = folder / "images" / f"class{c}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 40, (16, 16, 3))
        Image.fromarray((noise + 70 * c).astype(np.uint8)).save(path)
    command = [sys.executable, "-m", "data_prep", "shard", str(folder / "images"), "--out", str(folder / "shards")]
    subprocess.run(
        [*command, "--name", "small", "--max-count", "40"], check=True, cwd=ROOT, env=ENV, capture_output=True
    )
    return folder / "shards"


def settings(shards: Path, out: Path, *more: str) -> list[str]:
    """Options of a run of six steps that takes a second once it has started."""
    return [
        "--recipe", "crmoe_vit_micro_fmnist", "--out", str(out), f"data.train={shards}",
        "model.options={img_size: 16, patch_size: 8, dim: 16, depth: 2, heads: 2}", "views.size=16",
        "moe.experts=4", "params.dim=8", "params.mlp_dim=16", "batch.global_batch=16", "data.streams=4",
        "schedule.epochs=1", "schedule.warmup_epochs=0", "checkpoint.every_steps=2", "engine.precision=fp32",
        "engine.collective_timeout=60", "track.uri=none", *more,
    ]  # fmt: skip


def launch(ranks: int, *options: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess:
    """``deepspeed --num_accelerators RANKS --module moe_cl pretrain ...`` (0: no launcher), with ``env`` set."""
    command = [sys.executable, "-m", "moe_cl"]
    if ranks:
        command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(_port()), "--module", "moe_cl"]
    return subprocess.run(
        [*command, "pretrain", *options], cwd=ROOT, env={**ENV, **env}, capture_output=True, text=True, timeout=timeout
    )


def _port() -> int:
    from tests.pool import free_port

    return free_port()
