"""A cell of the accuracy table: a method on a set with a seed, pretrained and evaluated by the project's own verbs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from moe_cl import config, methods
from moe_cl.config import RunConfig
from moe_cl.tracking.tail import read

# What is shown: (recipe, "student" or "teacher" as the method's authors evaluate it).
METHODS = {
    "MoCo v1": ("mocov1_vit_fmnist", "student"),
    "MoCo v2": ("mocov2_vit_fmnist", "student"),
    "SimCLR": ("simclr_vit_fmnist", "student"),
    "MoCo v3": ("mocov3_vit_micro_fmnist", "student"),
    "JCL": ("jcl_vit_fmnist", "student"),
    "DINO": ("dino_vit_fmnist", "teacher"),
    "EsViT": ("esvit_vit_fmnist", "teacher"),
    "naive V-MoE": ("naive_vmoe_micro_fmnist", "student"),
    "CR-MoE": ("crmoe_vit_micro_fmnist", "student"),
}
SIX = ("MoCo v2", "MoCo v3", "JCL", "EsViT", "naive V-MoE", "CR-MoE")
BASELINES = {"dense": "MoCo v3", "sparse": "CR-MoE"}  # whose cell measures the untrained network; the first, pixels too
SPARSE = ("naive V-MoE", "CR-MoE")
HEALTH = ("health/feature_std", "health/effective_rank", "health/positive", "health/negative", "health/kl")


@dataclass(frozen=True)
class Set:
    """Shards, what to say about them, and what the small recipes change for them."""

    about: str
    settings: tuple[str, ...] = ()
    local: int = 14  # EsViT's local views, pixels
    queue: int = 4096

    def of(self, method: str) -> list[str]:
        """Settings of a method's recipe on this set."""
        out = list(self.settings)
        if method in ("EsViT", "DINO"):
            out.append(f"views.local_size={self.local}")
        if method in ("MoCo v1", "MoCo v2", "JCL"):
            out.append(f"params.queue={self.queue}")
        return out


SETS = {
    "fashion-mnist": Set("Fashion-MNIST, 28 px grey, 10 classes, 60,000 training and 10,000 test images"),
    "openclipart": Set(
        "Drawings of Debian's package `openclipart-png` 0.18 on white, in colour, shrunk to 48 px. A class is a folder "
        "of the collection (`data_prep/clipart.py` says which drawings are taken): {classes} classes, {train:,} images "
        "to train on, at most 240 of a class, and {test:,} to test on. Folders overlap in what they show, and drawings "
        "of one series lie on both sides of the split",
        (
            "views.size=48",
            "model.options.img_size=48",
            "model.options.patch_size=12",
            "views.overrides={sigma: [0.1, 0.5]}",  # a blur made for 224 px would leave no line of a drawing
        ),
        local=24,
        queue=1024,
    ),
    "digits": Set("scikit-learn's digits, 8 px grey, for `--quick`", queue=512),
}


@dataclass(frozen=True)
class Budget:
    """What is equal for all methods; another budget is another table."""

    images: int = 40_000  # seen by a method
    batch: int = 128
    ranks: int = 0  # 0 = one process without a launcher; N = the DeepSpeed launcher
    overrides: tuple[str, ...] = ()  # for all cells, by the user


@dataclass(frozen=True)
class Cell:
    """A method on a set with a seed."""

    set: str
    method: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.set}/{self.method}/{self.seed}"


@dataclass
class Result:
    """Figures of a cell, and of what it measured beside: ``figures[row][measure]``, rows trained, untrained, pixels."""

    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    health: dict[str, list[float]] = field(default_factory=dict)  # first and last value
    images: int = 0
    seconds: float = 0.0


def resolve(cell: Cell, budget: Budget, data: Path) -> tuple[list[str], RunConfig]:
    """The settings of a cell's run, and its resolved config."""
    recipe, _ = METHODS[cell.method]
    settings = [f"data.train={data}/train", f"eval.bank={data}/train", f"eval.test={data}/test", f"seed={cell.seed}"]
    settings += [f"batch.global_batch={budget.batch}", "track.uri=none", "engine.threads=1" if not budget.ranks else ""]
    settings += [*SETS[cell.set].of(cell.method), *budget.overrides]
    if cell.method in SPARSE:
        settings.append(f"moe.ep_size={max(1, budget.ranks)}")
    settings = [s for s in settings if s]
    cfg = config.load(recipe, settings, methods.params_of)
    steps = budget.images // budget.batch
    per_epoch = steps_per_epoch(cfg)
    epochs = steps / per_epoch
    settings += [f"schedule.epochs={epochs:.6g}", f"schedule.warmup_epochs={0.1 * epochs:.6g}"]
    # A killed cell goes on from here; nothing is kept of it once it is measured.
    settings += [f"checkpoint.every_steps={max(1, steps // 4)}", "checkpoint.keep_last=1"]
    return settings, config.load(recipe, settings, methods.params_of)


def steps_per_epoch(cfg: RunConfig) -> int:
    """Optimizer steps of one pass over the run's training set."""
    from moe_cl.data.loader import Loader
    from moe_cl.views.spec import build_spec

    batch = cfg.batch.global_batch
    spec = build_spec(cfg.views)
    loader = Loader(cfg.data, spec, seed=0, global_batch=batch, micro_batch=batch, rank=0, world=1)
    try:
        return loader.steps_per_epoch
    finally:
        loader.close()


def run(cell: Cell, budget: Budget, data: Path, folder: Path) -> Result:
    """Pretrain (or go on) and evaluate. Raises RuntimeError with the end of what a verb printed."""
    recipe, which = METHODS[cell.method]
    settings, cfg = resolve(cell, budget, data)
    begin = time.monotonic()
    pretrain = ["pretrain", "--recipe", recipe, "--out", str(folder), "--resume", *settings]
    if budget.ranks:
        _call(["bash", "launchers/local.sh", str(budget.ranks), *pretrain[1:]])
    else:
        _call([sys.executable, "-m", "moe_cl", *pretrain])
    rows = ["trained"]
    if cell.method in BASELINES.values():
        rows.append("untrained")
        if cell.method == BASELINES["dense"] and cell.seed == 0:
            rows.append("pixels")
    _call([sys.executable, "-m", "moe_cl", "eval", "summary", "--checkpoint", str(folder), "--which", which, "--full",
           "--rows", *rows, "--shots", "4", "10", "--batch", "512"])  # fmt: skip
    values = json.loads((folder / "summary.json").read_text())
    result = Result(seconds=time.monotonic() - begin)
    for row in rows:
        end = f"_{row}"
        result.figures[row] = {name.removesuffix(end): v for name, v in values.items() if name.endswith(end)}
    steps = [line for line in read(folder / "journal.jsonl") if line["kind"] == "step"]
    result.images = steps[-1]["step"] * budget.batch
    for name in HEALTH:
        seen = [line["values"][name] for line in steps if name in line["values"]]
        if seen:
            result.health[name.removeprefix("health/")] = [seen[0], seen[-1]]
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def _call(command: list[str]) -> None:
    environment = os.environ | {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def prepare(name: str) -> tuple[Path, dict[str, int]]:
    """The set's shards, made if they are not there; (folder, samples of its splits and classes)."""
    folder = Path("data") / name
    if not (folder / "dataset.json").is_file():
        raw = Path("data/raw") / name
        _call([sys.executable, "-m", "data_prep", "fetch", name, "--out", str(raw)])
        source = str(raw) if name == "openclipart" else f"{name}:{raw}"
        for split in ("train", "test"):
            _call([sys.executable, "-m", "data_prep", "shard", source, "--split", split, "--out", str(folder)])
    splits = json.loads((folder / "dataset.json").read_text())["splits"]
    counts = {split: splits[split]["samples"] for split in ("train", "test")}
    return folder, counts | {"classes": splits["train"]["classes"]}
