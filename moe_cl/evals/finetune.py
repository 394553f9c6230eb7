"""End-to-end fine-tuning with DeiT's recipe: all labels, 1 % or 10 % of them, or a transfer set.

AdamW, lr = base * B/512, cosine with warm-up, mixup and cutmix, RandAugment, erasing, label smoothing, stochastic
depth, repeated augmentation (Touvron et al. 2021; crmoe.md 3.3, moco_jcl.md section 3). Augmentations are timm's, their
random numbers a function of (seed, epoch, image, repeat); mixing's are of (seed, step), stochastic depth's of (seed,
step, place in the global batch). The accuracy after the last epoch is reported, not the best.
Semi-supervised runs take part of the training set, by seed or by a list, and may start from the first projector layer.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from moe_cl import rng
from moe_cl.arguments import real, whole
from moe_cl.comm import mean_gradients
from moe_cl.config import ConfigError
from moe_cl.counting import counted
from moe_cl.data.faults import IN_A_ROW, SampleFault, TooManyFaults
from moe_cl.engine.optim import matrix
from moe_cl.evals import subset
from moe_cl.evals.sets import picture
from moe_cl.models.backbone import set_drop_path
from moe_cl.views.spec import NORMALIZE

if TYPE_CHECKING:
    from moe_cl.evals.context import Context

log = logging.getLogger("moe_cl.data")


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters; ``deit`` unless a preset says otherwise."""

    epochs: int = 150
    batch: int = 1024  # global
    base_lr: float = 5e-4
    weight_decay: float = 0.05
    warmup: float = 5.0  # epochs, from 1e-6
    min_lr: float = 1e-5
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    jitter: float = 0.4
    erasing: float = 0.25
    scale_min: float = 0.08
    repeats: int = 3
    drop_path: float = 0.1


_PLAIN = {"auto_augment": None, "jitter": 0.0, "erasing": 0.0, "scale_min": 0.05, "repeats": 1, "smoothing": 0.0}
_TRANSFER = Recipe(epochs=100, base_lr=3e-4, warmup=3.0, weight_decay=0.1, **_PLAIN)  # MoCo v3's, ViT-B
PRESETS = {
    "deit": Recipe(),
    "cifar10": _TRANSFER,
    "cifar100": replace(_TRANSFER, mixup=0.5),
    "flowers": replace(_TRANSFER, weight_decay=0.3, erasing=0.25, mixup=0.0, cutmix=0.0),
    "pets": replace(_TRANSFER, drop_path=0.0, cutmix=0.0),
    "plain": replace(_TRANSFER, mixup=0.0, cutmix=0.0, drop_path=0.0, epochs=30),
}


def learning_rate(step: int, steps_per_epoch: int, recipe: Recipe) -> float:
    """Linear warm-up from 1e-6, then cosine to ``min_lr``, by the epoch as timm has it."""
    peak, epoch = recipe.base_lr * recipe.batch / 512, step // steps_per_epoch
    if epoch < recipe.warmup:
        return 1e-6 + (peak - 1e-6) * epoch / recipe.warmup
    return recipe.min_lr + 0.5 * (peak - recipe.min_lr) * (1 + math.cos(math.pi * epoch / recipe.epochs))


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators set from ``numbers`` inside, and as they were afterwards."""
    key = int(rng.fold(torch.tensor([0]), *numbers)) & 0x7FFFFFFF
    saved = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(key), np.random.seed(key), torch.manual_seed(key)
        try:
            yield
        finally:
            random.setstate(saved[0])
            np.random.set_state(saved[1])


class Augmented(Dataset):
    """``augmented[epoch, i, repeat]`` = (C, S, S) tensor and label of image i, one of ``chosen``.

    In the place of a broken image comes the next good one of ``chosen``, so that batches keep their size on every rank.
    """

    def __init__(self, images: Dataset, chosen: np.ndarray, size: int, normalize: str, recipe: Recipe, seed: int):
        from timm.data import create_transform

        self.images, self.seed, self._bad = images, seed, set()
        ids = np.unique(chosen)
        self._next = dict(zip(ids.tolist(), np.roll(ids, -1).tolist(), strict=True))
        mean, std = NORMALIZE[normalize]
        self.transform = create_transform(
            size, is_training=True, scale=(recipe.scale_min, 1.0), color_jitter=recipe.jitter or None,
            auto_augment=recipe.auto_augment, interpolation="bicubic", re_prob=recipe.erasing, re_mode="pixel",
            mean=mean, std=std,
        )  # fmt: skip

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int]:
        from PIL import Image

        epoch, i, repeat = key
        image, label = self._good(i)
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        with seeded(self.seed, epoch, i, repeat):
            return self.transform(image), int(label)

    def _good(self, i: int) -> tuple[Any, Any]:
        most = min(IN_A_ROW, len(self._next))
        for _ in range(most):
            try:
                return picture(self.images, i)
            except SampleFault as fault:
                if i not in self._bad:
                    log.warning("sample %d: %s; the next one takes its place", i, fault)
                self._bad.add(i)
                i = self._next[i]
        raise TooManyFaults(f"{most} training images in a row cannot be read; mend the set")


def order(chosen: np.ndarray, epoch: int, recipe: Recipe, seed: int, rank: int, world: int) -> list[list[Any]]:
    """This rank's batches of (epoch, image, repeat) of one epoch; the global batches do not depend on the ranks.

    With repeats the epoch keeps its length: the first len(chosen) of the repeated order (DeiT's sampler). A last batch
    that is smaller is left out unless it is the only one; where images are mixed, the last one without a partner too.
    """
    shuffled = np.random.default_rng([seed, epoch]).permutation(chosen)
    keys = [(epoch, int(i), r) for i in shuffled for r in range(recipe.repeats)][: len(chosen)]
    batches = [keys[at : at + recipe.batch] for at in range(0, len(keys), recipe.batch)]
    if len(batches) > 1 and len(batches[-1]) < recipe.batch:
        batches.pop()
    mine = places(len(batches[0]), recipe, rank, world)
    return [[batch[place] for place in mine] for batch in batches]


def mixes(recipe: Recipe) -> bool:
    """Whether images are mixed in pairs."""
    return bool(recipe.mixup or recipe.cutmix)


def places(count: int, recipe: Recipe, rank: int, world: int) -> list[int]:
    """Where this rank's images stand in a global batch of ``count``.

    Where images are mixed, place p and its partner, the p-th from the end, are on one rank and partners again there:
    timm's mixing of a rank's part is then that of the global batch.
    """
    if not mixes(recipe) or count < 2:
        return list(range(rank, count, world))
    first = list(range(rank, count // 2, world))
    return first + [count // 2 * 2 - 1 - place for place in reversed(first)]


class Classifier(nn.Module):
    """A backbone and a linear layer; with ``first`` (h, D), the first projector layer without norm, between them."""

    def __init__(self, backbone: nn.Module, classes: int, first: Tensor | None = None):
        super().__init__()
        self.backbone = backbone
        self.first = None
        width = backbone.dim
        if first is not None:
            self.first = nn.Linear(first.shape[1], first.shape[0], bias=False)
            self.first.weight.data.copy_(first)
            width = first.shape[0]
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Scores (N, classes) of images (N, C, S, S); ``keys`` (N,): of their random numbers, None = torch's."""
        x = self.backbone([x], keys).features
        return self.head(x if self.first is None else self.first(x))


# What DeiT's and Swin's ``no_weight_decay`` names, beside biases and norms.
UNDECAYED = ("pos_embed", "cls_token", "relative_position_bias_table")


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices (an expert of a stack counted alone) decay; vectors and ``UNDECAYED`` do not."""
    decayed, other = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (decayed if matrix(name, p) and not name.endswith(UNDECAYED) else other).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}]


def train(
    model: Classifier, images: Dataset, chosen: np.ndarray, classes: int, recipe: Recipe, ctx: Context
) -> list[float]:
    """Fine-tune in place on images ``chosen``; returns each epoch's mean loss."""
    from timm.data import Mixup

    from moe_cl.evals.context import DTYPES

    comm, args = ctx.comm, ctx.args
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups(model, recipe.weight_decay), lr=0.0)
    mix = None
    if mixes(recipe):
        mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
    data = Augmented(images, chosen, ctx.size, ctx.normalize, recipe, args.seed)
    dtype, losses, step = DTYPES[args.dtype], [], 0
    parts = [places(min(recipe.batch, len(chosen)), recipe, rank, comm.world) for rank in range(comm.world)]
    mine = parts[comm.rank]
    share = len(mine) * comm.world / sum(map(len, parts))  # gradients are a mean over ranks: 1 where parts are equal
    for epoch in range(recipe.epochs):
        batches = order(chosen, epoch, recipe, args.seed, comm.rank, comm.world)
        total = torch.zeros((), device=ctx.device)
        loader = DataLoader(data, batch_sampler=batches, num_workers=args.workers)
        shown = counted(loader, f"epoch {epoch + 1} of {recipe.epochs}", "batches", show=comm.rank == 0)
        for number, (x, y) in enumerate(shown):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(batches), recipe)
            x, y = x.to(ctx.device), y.to(ctx.device)
            if mix is not None and len(x) > 1:
                with seeded(args.seed, epoch, number, 0, 1):
                    x, y = mix(x, y)
            keys = rng.sample_keys(args.seed, step, torch.tensor(mine, device=ctx.device))
            with torch.autocast(ctx.device.type, dtype, enabled=dtype is not None):
                scores = model(x, keys)
            loss = F.cross_entropy(scores.float(), y, label_smoothing=recipe.smoothing if y.ndim == 1 else 0.0) * share
            optimizer.zero_grad()
            loss.backward()
            mean_gradients(trained, comm)
            optimizer.step()
            total += loss.detach()
            step += 1
        losses.append(float(comm.all_reduce(total / len(batches), "mean")))
    return losses


HELP = "fine-tune end to end with DeiT's recipe; 1 % and 10 % of the labels, or transfer presets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``eval finetune``."""
    parser.add_argument("--preset", choices=tuple(PRESETS), default="deit", help="default: deit")
    ranges = {
        "epochs": whole(1),
        "base-lr": real(above=0),
        "weight-decay": real(low=0),
        "drop-path": real(low=0, below=1),
    }
    for name, kind in ranges.items():
        parser.add_argument(f"--{name}", type=kind, help="instead of the preset's")
    parser.add_argument("--train-batch", type=whole(1), help="global batch instead of the preset's")
    parser.add_argument("--repeats", type=whole(1), help="repeated augmentation instead of the preset's")
    subset.add_arguments(parser)
    parser.add_argument("--first-layer", action="store_true", help="keep the projector's first layer before the head")


def run(ctx: Context) -> dict[str, Any]:
    """Table and JSON of ``eval finetune``."""
    from moe_cl.evals import sets
    from moe_cl.evals.classes import class_names, places
    from moe_cl.evals.features import frozen
    from moe_cl.evals.metrics import metric
    from moe_cl.evals.record import record

    args = ctx.args
    ctx.one_label()
    asked = {
        "epochs": args.epochs, "base_lr": args.base_lr, "weight_decay": args.weight_decay, "repeats": args.repeats,
        "drop_path": args.drop_path, "batch": args.train_batch,
    }  # fmt: skip
    recipe = replace(PRESETS[args.preset], **{k: v for k, v in asked.items() if v is not None})
    images = sets.images_of(ctx.source(True), True, ctx.size)
    chosen = subset.chosen(images, args.fraction, args.listed, args.seed)
    classes = 1 + max(subset.labels_of(images))
    ctx.class_names[ctx.source(True)] = names = class_names(images)
    places(names, getattr(ctx.loader(False), "class_names", None) or ())  # refused before the training, not after it
    _check_shares(min(recipe.batch, len(chosen)), recipe, ctx.comm.world)
    first = _first_layer(Path(args.checkpoint), ctx.which) if args.first_layer else None
    torch.manual_seed(args.seed)
    model = Classifier(ctx.backbone, classes, first).to(ctx.device).train()
    model.requires_grad_(True)
    set_drop_path(model.backbone, recipe.drop_path)
    losses = train(model, images, chosen, classes, recipe, ctx)
    with frozen(model):
        scores, truth = ctx.features(False, lambda x: model(x.to(ctx.device)), what="test images")
    best = scores.topk(min(5, classes), 1).indices == truth[:, None]
    values = {
        "top1": float(best[:, 0].float().mean()), "top5": float(best.any(1).float().mean()), "train_loss": losses[-1],
        "images": float(len(chosen)),
    }  # fmt: skip
    rows = [[args.preset, len(chosen), recipe.epochs, values["top1"], values["top5"]]]
    columns = ["preset", "training images", "epochs", "top-1", "top-5"]
    if (name := sets.metric_of(ctx.source(False))) != "accuracy":
        values[name] = metric(name, scores.cpu().numpy(), truth.cpu().numpy())
        rows[0].append(values[name])
        columns.append(name)
    if ctx.comm.rank == 0:
        setting = ctx.setting("train", "test", fine_tuning=asdict(recipe))
        more = {"losses": losses}
        record(ctx.out, ctx.name, ctx.step, values, setting, columns=columns, rows=rows, more=more)
    return values


def _check_shares(batch: int, recipe: Recipe, world: int) -> None:
    """Every rank has a part of a global batch of ``batch`` images. Raises ConfigError."""
    pairs = mixes(recipe) and world > 1
    if (least := world * (1 + pairs)) > batch:
        why = " that mix images in pairs" if pairs else ""
        raise ConfigError(
            f"{batch} training images a batch are too few for {world} ranks{why}: take {least} or more "
            "(--train-batch, --fraction), or fewer ranks"
        )


def _first_layer(checkpoint: Path, which: str) -> Tensor:
    """Weight (h, D) of the first layer of the checkpoint's projector. Raises ConfigError if there is none."""
    from moe_cl.engine.checkpoint.format import Reader
    from moe_cl.evals.pretrained import checkpoint_of

    path = checkpoint_of(checkpoint)
    reader = Reader(path)
    for name in (f"{which}/heads.{head}.0.weight" for head in ("projector", "fc")):
        if name in reader.manifest.tensors:
            return reader.tensor(name)
    raise ConfigError(f"--first-layer: {path.name} has no projector")
