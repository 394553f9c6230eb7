"""What every evaluation of the command line starts from: ranks, device, the frozen encoder, two labelled sets."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_cl.arguments import whole
from moe_cl.comm import Comm, LocalComm
from moe_cl.config import ConfigError, RunConfig
from moe_cl.engine.checks import check_folder
from moe_cl.evals import classes, pretrained, sets, subset
from moe_cl.evals.features import Encode, changed, depth, encoder, extract, fingerprint, frozen, not_finite, opened

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every protocol has."""
    parser.add_argument("--checkpoint", required=True, help="a run's out directory or one of its checkpoints")
    whose = "whose encoder; auto: what the method's authors evaluate (EsViT's teacher, else the student)"
    parser.add_argument("--which", choices=("auto", "teacher", "student"), default="auto", help=whose)
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
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of the sets opened so far, by source

    def check(self) -> None:
        """What can be known to be wrong before any work. Raises ConfigError, on all ranks, for what one rank meets."""
        opened(self._check, self.comm)

    def _check(self) -> None:
        if Path(self.name).name != self.name or self.name.startswith("."):
            raise ConfigError(f"--name {self.name}: give a plain name, without folders: it becomes evals/NAME.json")
        _ = self.device
        pretrained.side(Path(self.args.checkpoint), self.args.which)
        if self.comm.rank == 0:  # who writes
            check_folder("--out" if self.args.out else "the results' folder", str(self.out / "evals"))

    @cached_property
    def _loaded(self) -> tuple[nn.Module, RunConfig, int]:
        backbone, cfg, step = pretrained.load(Path(self.args.checkpoint), self.which)
        return usable(backbone).to(self.device), cfg, step

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
    def which(self) -> str:
        """Whose encoder it is, teacher or student."""
        return pretrained.side(Path(self.args.checkpoint), self.args.which)

    @cached_property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        if self.args.device != "auto":
            try:
                device = torch.device(self.args.device)
            except RuntimeError:
                raise ConfigError(f"--device {self.args.device}: unknown; give auto, cpu or cuda:N") from None
            try:
                torch.zeros(1, device=device).cpu()
            except (RuntimeError, AssertionError, NotImplementedError):  # as torch says it of each kind
                raise ConfigError(f"--device {self.args.device}: not on this machine; give auto or cpu") from None
            return device
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

    def loader(self, train: bool, view: sets.View | None = None, source: str | None = None) -> sets.LabelledSet:
        """This rank's part of the training or test set (or of ``source``), in order; ``view`` replaces the plain
        evaluation view."""
        return sets.open_set(
            source or self.source(train),
            train=train,
            size=self.size,
            normalize=self.normalize,
            batch=self.args.batch,
            rank=self.comm.rank,
            world=self.comm.world,
            workers=self.args.workers,
            interpolation=self.args.interpolation,
            view=view,
            chosen=self.chosen if train else None,
        )

    @cached_property
    def chosen(self) -> np.ndarray | None:
        """Indices of the training images that ``--fraction`` or ``--list`` leave; None = all."""
        fraction, listed = (getattr(self.args, name, None) for name in ("fraction", "listed"))
        if fraction is None and listed is None:
            return None
        images = sets.images_of(self.source(True), True, self.size)
        return subset.chosen(images, fraction, listed, self.args.seed)

    def numbered(self, labels: Tensor, source: str) -> Tensor:
        """Labels of a set by the training set's numbers: classes are the same by name (``classes.places``).

        Raises ConfigError for a class that the training set does not have.
        """
        names = (self.class_names.get(name, ()) for name in (self.source(True), source))
        if labels.ndim > 1 or (to := classes.places(*names)) is None:
            return labels
        if int(labels.max()) >= len(to):
            raise ConfigError(
                f"{source}: a label is {int(labels.max())}, but it names {len(to)} classes; index it anew"
            )
        if self.comm.rank == 0:
            print(f"{source} numbers its classes otherwise than the training set: they are matched by name")
        return torch.tensor(to, device=labels.device)[labels]

    def encode(self, backbone: nn.Module | None = None, blocks: int = 1, patches: bool = False) -> Encode:
        """``images -> features`` of the encoder (or of another one); use inside ``frozen``.

        Raises ConfigError for more ``blocks`` than it has.
        """
        if blocks > (there := depth(backbone or self.backbone)):
            raise ConfigError(f"features of the last {blocks} blocks: this encoder has {there}; give --blocks {there}")
        dtype = DTYPES[self.args.dtype]
        return encoder(backbone or self.backbone, self.device, blocks=blocks, patches=patches, dtype=dtype)

    @contextlib.contextmanager
    def untouched(self, module: nn.Module | None = None) -> Iterator[None]:
        """The encoder (or ``module``) frozen; at the end every tensor and buffer must be bit-equal to what it was."""
        module = module or self.backbone
        before = fingerprint(usable(module))
        with frozen(module):
            yield
        if names := changed(module, before):
            raise AssertionError(f"the frozen encoder changed: {names[:3]} ({len(names)} tensors)")

    def features(
        self, train: bool, encode: Encode | None = None, view: sets.View | None = None, what: str = "",
        source: str | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Features (n, D) and labels (n,) of a whole set; ``what``: they are counted under this name.

        The test set's labels (or those of another ``source``) are numbered as the training set's, which comes first.
        """
        what = what or ("training features" if train else "test features")
        source = source or self.source(train)
        loader = self.loader(train, view, source)
        self.class_names[source] = tuple(getattr(loader, "class_names", None) or ())
        x, y = extract(encode or self.encode(), loader, self.comm, what)
        return x, y if train else self.numbered(y, source)

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
        options |= {"which": self.which, "step": self.step, "recipe": self.cfg.recipe, "ranks": self.comm.world}
        return options | more


def usable(module: nn.Module) -> nn.Module:
    """``module``. Raises ConfigError for weights that are not finite."""
    if names := not_finite(module):
        raise ConfigError(
            f"the checkpoint's weights are not finite ({names[0]}; {len(names)} tensors); name an earlier checkpoint"
        )
    return module


def class_count(*labels: Tensor) -> int:
    """Number of classes that the labels name."""
    return int(max(y.max() for y in labels)) + 1
