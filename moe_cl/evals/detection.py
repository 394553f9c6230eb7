"""Detection transfer: a pretrained ResNet fine-tuned in an R-CNN, scored by pycocotools (moco_jcl.md section 3).

Schedules are in iterations of 16 images: lr .02, momentum .9, weight decay 1e-4, linear warm-up, x0.1 at the steps;
other batches scale lr and lengths linearly (moco#11). Data are images and annotations in COCO's JSON; a VOC devkit is
read as that (``--annotations voc:2007:trainval+2012:trainval``), difficult boxes as crowds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_cl.arguments import real, whole
from moe_cl.comm import Comm, LocalComm, mean_gradients
from moe_cl.config import ConfigError
from moe_cl.counting import counted
from moe_cl.evals.coco import CocoImages

if TYPE_CHECKING:
    from moe_cl.evals.context import Context
    from moe_cl.evals.regions import Draws


@dataclass(frozen=True)
class Schedule:
    """Lengths at 16 images an iteration."""

    iterations: int = 90_000
    steps: tuple[int, ...] = (60_000, 80_000)
    warmup: int = 1000
    lr: float = 0.02
    batch: int = 16
    min_sizes: tuple[int, ...] = (640, 672, 704, 736, 768, 800)

    def scaled(self, batch: int) -> Schedule:
        """The same number of images seen with another batch."""
        times = self.batch / batch
        return Schedule(
            round(self.iterations * times), tuple(round(s * times) for s in self.steps), round(self.warmup * times),
            self.lr / times, batch, self.min_sizes,
        )  # fmt: skip

    def rate(self, iteration: int) -> float:
        """Learning rate of an iteration."""
        warm = min(1.0, 0.001 + 0.999 * iteration / max(self.warmup, 1))
        return self.lr * warm * 0.1 ** sum(iteration >= s for s in self.steps)


_VOC_SIZES = tuple(range(480, 801, 32))
SCHEDULES = {
    "coco_1x": Schedule(),
    "coco_2x": Schedule(180_000, (120_000, 160_000)),
    "voc_24k": Schedule(24_000, (18_000, 22_000), 100, min_sizes=_VOC_SIZES),
}


def batches(data: CocoImages, schedule: Schedule, seed: int, comm: Comm) -> Iterator[tuple[list[Any], list[Any]]]:
    """This rank's part of each global batch, without end; images are mirrored or not by (seed, place)."""
    indices, position, order = np.array(data.trainable()), 0, np.array([], dtype=int)
    epoch = 0
    while True:
        while len(order) < schedule.batch:
            order = np.concatenate([order, np.random.default_rng([seed, epoch]).permutation(indices)])
            epoch += 1
        items = []
        for place in places(schedule, comm):
            image, target = data[int(order[place])]
            flip = np.random.default_rng([seed, 1, position + place]).random() < 0.5
            items.append(mirror(image, target) if flip else (image, target))
        order, position = order[schedule.batch :], position + schedule.batch
        yield [image for image, _ in items], [target for _, target in items]


def places(schedule: Schedule, comm: Comm) -> range:
    """Where this rank's images of a batch stand in the global one."""
    return range(comm.rank, schedule.batch, comm.world)


# COCO's person: left and right eyes, ears, shoulders ... change places in the mirror
_MIRRORED = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


def mirror(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Left and right exchanged."""
    width, out = image.shape[2], dict(target)
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = width - target["boxes"][:, [2, 0]]
    out["boxes"] = boxes
    if "masks" in target:
        out["masks"] = target["masks"].flip(2)
    if "keypoints" in target:
        points = target["keypoints"].clone()
        points[..., 0] = torch.where(points[..., 2] > 0, width - 1 - points[..., 0], points[..., 0])
        out["keypoints"] = points[:, _MIRRORED] if points.shape[1] == len(_MIRRORED) else points
    return image.flip(2), out


def train(
    model: nn.Module, data: CocoImages, schedule: Schedule, *, seed: int = 0, comm: Comm | None = None,
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
) -> list[float]:  # fmt: skip
    """Fine-tune ``model`` in place; returns the loss of every iteration, the mean over the ranks."""
    from moe_cl.evals.regions import keyed

    comm, device = comm or LocalComm(), torch.device(device)
    if not data.trainable():
        raise ConfigError("eval detection: no training image has a box")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=schedule.lr, momentum=0.9, weight_decay=1e-4)
    model.to(device).train()
    losses, source, draws = [], batches(data, schedule, seed, comm), keyed(model)
    for iteration in counted(range(schedule.iterations), "detector", "iterations", show=comm.rank == 0):
        images, targets = next(source)
        optimizer.param_groups[0]["lr"] = schedule.rate(iteration)
        images = [x.to(device) for x in images]
        targets = [{k: v.to(device) for k, v in t.items()} for t in targets]
        draws.at(seed, iteration, places(schedule, comm))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = sum(model(images, targets).values())
        losses.append(float(comm.all_reduce(loss.detach(), "mean")))
        if not math.isfinite(losses[-1]):
            raise ConfigError(
                f"detection: the loss is not finite at iteration {iteration}; lower --lr or warm up longer"
            )
        optimizer.zero_grad()
        loss.backward()
        mean_gradients(trained, comm)
        optimizer.step()
    return losses


@torch.no_grad()
def detect(
    model: nn.Module, data: CocoImages, comm: Comm | None = None, device: torch.device | str = "cpu"
) -> dict[str, list[dict[str, Any]]]:
    """All ranks' detections in COCO's result format, by type: bbox, segm, keypoints."""
    from pycocotools import mask as rle

    comm = comm or LocalComm()
    model.eval()
    found: dict[str, list[dict[str, Any]]] = {"bbox": [], "segm": [], "keypoints": []}
    mine = range(comm.rank, len(data), comm.world)
    for i in counted(mine, "detections", "images", show=comm.rank == 0):
        image, target = data[i]
        (out,) = model([image.to(device)])
        out = {k: v.cpu() for k, v in out.items()}
        for n in range(len(out["scores"])):
            x0, y0, x1, y1 = out["boxes"][n].tolist()
            row = {"image_id": int(target["image_id"]), "category_id": data.category_of[int(out["labels"][n])]}
            row["score"] = float(out["scores"][n])
            found["bbox"].append({**row, "bbox": [x0, y0, x1 - x0, y1 - y0]})
            if "masks" in out:
                mask = rle.encode(np.asfortranarray((out["masks"][n, 0] > 0.5).numpy().astype(np.uint8)))
                found["segm"].append({**row, "segmentation": {**mask, "counts": mask["counts"].decode()}})
            if "keypoints" in out:
                found["keypoints"].append({**row, "keypoints": out["keypoints"][n].flatten().tolist()})
    parts = comm.gather_objects(found)
    return {kind: [row for part in parts for row in part[kind]] for kind in found}


def score(data: CocoImages, found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """COCO's AP, AP50 and AP75 of each type that was detected, in percent."""
    from pycocotools.cocoeval import COCOeval

    values: dict[str, float] = {}
    for kind, rows in found.items():
        if kind != "bbox" and not rows:
            continue
        figures = [0.0, 0.0, 0.0]
        if rows:
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation = COCOeval(data.coco, data.coco.loadRes(copy.deepcopy(rows)), kind)
                if kind == "keypoints" and data.keypoints != 17:  # pycocotools knows the 17 of a person
                    evaluation.params.kpt_oks_sigmas = np.full(data.keypoints, 0.05)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            figures = [100.0 * max(float(v), 0.0) for v in evaluation.stats[:3]]
        values |= {f"{kind}/{name}": v for name, v in zip(("AP", "AP50", "AP75"), figures, strict=True)}
    return values


HELP = "detection transfer of a ResNet: Mask and Keypoint R-CNN with FPN, or the C4 head; COCO metrics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``eval detection``."""
    parser.add_argument(
        "--detector", choices=("mask_fpn", "keypoint_fpn", "box_fpn", "box_c4", "mask_c4"), default="mask_fpn"
    )
    parser.add_argument("--images", required=True, help="folder of the training images")
    parser.add_argument("--annotations", required=True, help="their COCO JSON, or voc:YEAR:SPLIT")
    parser.add_argument("--test-images", help="folder of the test images (default: --images)")
    parser.add_argument("--test-annotations", required=True, help="their COCO JSON")
    parser.add_argument("--schedule", choices=tuple(SCHEDULES), default="coco_1x")
    parser.add_argument("--train-batch", type=whole(1), default=16, help="images an iteration, all ranks (default: 16)")
    parser.add_argument("--iterations", type=whole(1), help="instead of the schedule's; steps keep their place in it")
    parser.add_argument("--lr", type=real(above=0), help="instead of the schedule's")
    parser.add_argument("--min-size", type=whole(1), nargs="+", help="short sides, the last one at test")
    parser.add_argument("--rois", type=whole(1), default=512, help="regions an image in training (default: 512)")
    parser.add_argument("--precise-bn", type=whole(0), default=200, help="batches for the statistics before the test")
    parser.add_argument("--trials", type=whole(1), default=1, help="trainings whose mean is given (VOC: 5)")


def run(ctx: Context) -> dict[str, float]:
    """Table and JSON of ``eval detection``."""
    from dataclasses import replace

    from moe_cl.evals.context import DTYPES
    from moe_cl.evals.detectors import build_detector, precise_norms
    from moe_cl.evals.features import opened
    from moe_cl.evals.record import record
    from moe_cl.evals.regions import keyed

    args, comm = ctx.args, ctx.comm
    schedule = SCHEDULES[args.schedule].scaled(args.train_batch)
    if args.iterations:
        times = args.iterations / schedule.iterations
        steps = tuple(round(s * times) for s in schedule.steps)
        schedule = replace(
            schedule, iterations=args.iterations, steps=steps, warmup=min(schedule.warmup, args.iterations // 4)
        )
    schedule = replace(schedule, lr=args.lr or schedule.lr, min_sizes=tuple(args.min_size or schedule.min_sizes))
    if args.train_batch % comm.world:
        raise ConfigError(f"--train-batch {args.train_batch} must be a multiple of the {comm.world} ranks")
    data, test = opened(lambda: _sets(args), comm)
    longest = round(max(schedule.min_sizes) * 1333 / 800)
    trials: list[dict[str, float]] = []
    for trial in range(args.trials):
        torch.manual_seed(args.seed + trial)
        net = copy.deepcopy(ctx.backbone)
        sizes = {"min_size": schedule.min_sizes, "max_size": longest, "keypoints": data.keypoints}
        model = build_detector(net, args.detector, 1 + len(data.class_of), **sizes, rois=args.rois, comm=comm)
        seed = args.seed + trial
        losses = train(model, data, schedule, seed=seed, comm=comm, device=ctx.device, dtype=DTYPES[args.dtype])
        if args.precise_bn:
            precise_norms(model, _more(args.precise_bn, data, schedule, seed + 1, comm, keyed(model), ctx.device))
        trials.append(score(test, detect(model, test, comm, ctx.device)) | {"train_loss": losses[-1]})
    values = {k: statistics.fmean(t[k] for t in trials) for k in trials[0]}
    if comm.rank == 0:
        rows = [[k, v, min(t[k] for t in trials), max(t[k] for t in trials)] for k, v in values.items()]
        setting = ctx.setting(schedule_used=asdict(schedule))
        columns = ("figure", f"mean of {args.trials}", "min", "max")
        record(ctx.out, ctx.name, ctx.step, values, setting, columns=columns, rows=rows, more={"trials": trials})
    return values


def _sets(args: argparse.Namespace) -> tuple[CocoImages, CocoImages]:
    """Training and test images, checked for the detector. Raises ConfigError."""
    data = CocoImages(args.images, args.annotations)
    test = CocoImages(args.test_images or args.images, args.test_annotations)
    for part in (data, test):
        part.check(args.detector)
    if sorted(data.coco.cats) != sorted(test.coco.cats):
        raise ConfigError(f"{test.name} has other categories than {data.name}; give annotations of the same classes")
    if not data.trainable():
        raise ConfigError(f"{data.name}: no training image has a box")
    return data, test


def _more(
    count: int, data: CocoImages, schedule: Schedule, seed: int, comm: Comm, draws: Draws, device: torch.device
) -> Iterator[tuple[list[Any], list[Any]]]:
    """``count`` batches for the statistics before the test, made one at a time, each with the draws of its images."""
    for step, (images, targets) in zip(range(count), batches(data, schedule, seed, comm), strict=False):
        draws.at(seed, step, places(schedule, comm))
        yield [x.to(device) for x in images], [{k: v.to(device) for k, v in t.items()} for t in targets]
