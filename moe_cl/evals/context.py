"""What every evaluation of the command line starts from: ranks, device, the frozen encoder, two labelled sets."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_cl.arguments import whole
from moe_cl.comm import Comm, LocalComm
from moe_cl.config import ConfigError, RunConfig
from moe_cl.evals import pretrained, sets
from moe_cl.evals.features import Encode, changed, encoder, extract, fingerprint, frozen

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every protocol has."""
    parser.add_argument("--checkpoint", required=True, help="a run's out directory or one of its checkpoints")
    parser.add_argument("--which", choices=("auto", "teacher", "student"), default="auto", help="auto: the teacher")
    parser.add_argument("--train", "--bank", help="labelled training set (default: the run's eval.bank, data.train)")
    parser.add_argument(
        "--test",
        help=f"labelled test set (default: the run's eval.test, or beside data.train). {sets.SOURCES}",
    )
    parser.add_argument("--size", type=whole(1), help="image side, pixels (default: the run's)")
    parser.add_argument("--normalize", choices=("imagenet", "half"), help="default: the run's")
    parser.add_argument("--interpolation", choices=("bilinear", "bicubic"), default="bilinear", help="of the resize")
    parser.add_argument("--batch", type=whole(1), default=256, help="images a forward, each rank")
    parser.add_argument("--workers", type=whole(0), default=0, help="decoding processes, each rank")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="autocast of the encoder")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--out", help="where results go (default: the run's out directory)")
    parser.add_argument("--name", help="what the results are called, in files, report and MLflow (default: PROTOCOL)")


@dataclass
class Context:
    """One evaluation's surroundings; the encoder and the sets are opened at first use."""

    args: argparse.Namespace
    comm: Comm = field(default_factory=LocalComm)

    @cached_property
    def _loaded(self) -> tuple[nn.Module, RunConfig, int]:
        backbone, cfg, step = pretrained.load(Path(self.args.checkpoint), self.args.which)
        return backbone.to(self.device), cfg, step

    @property
    def backbone(self) -> nn.Module:
        """The pretrained encoder."""
        return self._loaded[0]

    @property
    def cfg(self) -> RunConfig:
        """The run's config."""
        return self._loaded[1]

    @property
    def step(self) -> int:
        """Optimizer steps behind the checkpoint."""
        return self._loaded[2]

    @cached_property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        if self.args.device != "auto":
            try:
                return torch.device(self.args.device)
            except RuntimeError:
                raise ConfigError(f"--device {self.args.device}: unknown; give auto, cpu or cuda:N") from None
        return getattr(self.comm, "device", torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def out(self) -> Path:
        """Where results go: ``--out``, else the run's directory (also when one checkpoint of it was named)."""
        if self.args.out:
            return Path(self.args.out)
        path = Path(self.args.checkpoint)
        return path.parent.parent if path.parent.name == "checkpoints" else path

    @property
    def size(self) -> int:
        """Image side, pixels."""
        return self.args.size or self.cfg.eval.size or self.cfg.views.size

    @property
    def normalize(self) -> str:
        """Name of the normalisation."""
        return self.args.normalize or self.cfg.views.normalize

    def source(self, train: bool) -> str:
        """The training or test set's name. Raises ConfigError if there is none."""
        name = (self.args.train or self.cfg.eval.bank) if train else (self.args.test or self.cfg.eval.test)
        name = name or self._beside[train]
        if not name:
            option, key = ("--train", "eval.bank") if train else ("--test", "eval.test")
            raise ConfigError(
                f"no labelled {'training' if train else 'test'} set: give {option} ({key} of the run is empty)"
            )
        return name

    @cached_property
    def _beside(self) -> dict[bool, str | None]:
        """What a run without eval.bank and eval.test is measured on; said once."""
        given = {True: self.args.train or self.cfg.eval.bank, False: self.args.test or self.cfg.eval.test}
        found = {train: None if name else sets.beside(self.cfg.data.train, train) for train, name in given.items()}
        for train, name in found.items():
            if name and self.comm.rank == 0:
                what, option = ("training", "--train") if train else ("test", "--test")
                print(f"labelled {what} set: {name} (by the run's data.train; {option} names another)")
        return found

    def loader(self, train: bool, view: sets.View | None = None) -> sets.LabelledSet:
        """This rank's part of the training or test set, in order; ``view`` replaces the plain evaluation view."""
        return sets.open_set(
            self.source(train),
            train=train,
            size=self.size,
            normalize=self.normalize,
            batch=self.args.batch,
            rank=self.comm.rank,
            world=self.comm.world,
            workers=self.args.workers,
            interpolation=self.args.interpolation,
            view=view,
        )

    def encode(self, backbone: nn.Module | None = None, blocks: int = 1, patches: bool = False) -> Encode:
        """``images -> features`` of the encoder (or of another one); use inside ``frozen``."""
        dtype = DTYPES[self.args.dtype]
        return encoder(backbone or self.backbone, self.device, blocks=blocks, patches=patches, dtype=dtype)

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """The encoder frozen; at the end every tensor and buffer must be bit-equal to what it was."""
        before = fingerprint(self.backbone)
        with frozen(self.backbone):
            yield
        if names := changed(self.backbone, before):
            raise AssertionError(f"the frozen encoder changed: {names[:3]} ({len(names)} tensors)")

    def features(
        self, train: bool, encode: Encode | None = None, view: sets.View | None = None, what: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Features (n, D) and labels (n,) of a whole set; ``what``: they are counted under this name."""
        what = what or ("training features" if train else "test features")
        return extract(encode or self.encode(), self.loader(train, view), self.comm, what)

    @property
    def name(self) -> str:
        """What the results are called."""
        return self.args.name or self.args.protocol

    def one_label(self) -> None:
        """Raises ConfigError for a set with several labels an image (VOC2007)."""
        if "map11" in (sets.metric_of(self.source(True)), sets.metric_of(self.source(False))):
            raise ConfigError("this set has several labels an image: `eval logistic` is the protocol for it")

    def setting(self, *parts: str, **more: Any) -> dict[str, Any]:
        """What is needed to run this evaluation again. ``parts``: of the labelled sets, ``train`` or ``test``."""
        options = {k: v for k, v in vars(self.args).items() if k not in ("verb", "overrides", "local_rank")}
        options |= {part: self.source(part == "train") for part in parts}
        if parts:
            options |= {"size": self.size, "normalize": self.normalize}
        return options | {"step": self.step, "recipe": self.cfg.recipe, "ranks": self.comm.world, **more}


def class_count(*labels: Tensor) -> int:
    """Number of classes that the labels name."""
    return int(max(y.max() for y in labels)) + 1
