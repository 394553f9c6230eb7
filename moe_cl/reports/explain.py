"""Looks into a checkpoint: runs its encoder over images and keeps what the report draws (``moe_cl.reports.arrays``)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_cl.config import ConfigError, RunConfig
from moe_cl.engine.checkpoint.format import read_manifest
from moe_cl.evals.features import frozen
from moe_cl.evals.pretrained import checkpoint_of, load, run_config, side
from moe_cl.reports import arrays as file
from moe_cl.views.crops import match as overlap

THUMBNAIL = 48  # pixels; larger images are made smaller


def origin(out: str | Path, *, which: str = "auto", samples: int = 2000, pattern: str | None = None) -> dict[str, Any]:
    """All that the arrays of ``of_run`` depend on: equal origins, equal arrays. Raises ConfigError as that does."""
    from moe_cl.data.index import resolve
    from moe_cl.tracking import redact
    from moe_cl.tracking.tail import header

    out = Path(out)
    checkpoint = checkpoint_of(out)
    manifest, pattern = read_manifest(checkpoint), _pattern(run_config(checkpoint), pattern)
    shards = [f"{s.samples} {s.sha256}" for s in resolve(pattern).shards]
    return {
        "journal": header(out / "journal.jsonl").get("id", ""), "step": manifest.step, "written": manifest.created,
        "weights": side(checkpoint, which), "data": redact.text(pattern), "images": samples,
        "shards": hashlib.sha256("\n".join(shards).encode()).hexdigest()[:16],
    }  # fmt: skip


def _pattern(cfg: RunConfig, pattern: str | None) -> str:
    from moe_cl.evals.sets import beside

    return pattern or cfg.eval.test or beside(cfg.data.train, train=False) or cfg.data.train


def of_run(
    out: str | Path, *, which: str = "auto", samples: int = 2000, shown: int = 6, pattern: str | None = None
) -> Path:
    """Make ``OUT/explain.npz`` from the newest checkpoint of the run in ``out``.

    Args:
        which: teacher, student or auto. samples: evaluation images at most, spread evenly over the set.
        shown: images drawn as two views.
        pattern: labelled shards; None = the run's eval.test, else the test split beside its training data, else that.

    Raises:
        ConfigError: no checkpoint, or no labelled data.
    """
    from moe_cl.data.index import resolve
    from moe_cl.data.labelled import LabelledLoader
    from moe_cl.data.samples import Images, smallest_side
    from moe_cl.views.augment import make_views
    from moe_cl.views.spec import build_spec

    out = Path(out)
    made_of = origin(out, which=which, samples=samples, pattern=pattern)
    backbone, cfg, _ = load(checkpoint_of(out), which)
    pattern = _pattern(cfg, pattern)
    dataset = resolve(pattern)
    size = cfg.eval.size or cfg.views.size
    stride = math.ceil(len(dataset) / samples)
    batches = LabelledLoader(pattern, size, cfg.views.normalize, 64, world=stride, data=cfg.data)
    spec = replace(build_spec(cfg.views), implementation="fast")
    images = Images(dataset, cfg.data, smallest_side(spec))
    ids = [len(dataset) * (2 * i + 1) // (2 * shown) for i in range(shown)]
    data = images.reader.read(np.array(ids))
    made = [make_views(images.decode(d), spec, cfg.seed, 0, i) for i, d in zip(ids, data, strict=True)]
    pairs = torch.stack([views[v] for v in range(2) for views, _ in made])
    boxes = torch.stack([torch.stack([box[v] for _, box in made]) for v in range(2)])
    arrays = collect(
        backbone, batches, pairs, boxes, mean=spec.mean, std=spec.std, made_of=made_of,
        class_names=batches.class_names or (), view_labels=images.reader.labels(np.array(ids))[0],
    )  # fmt: skip
    path = out / file.NAME
    file.save(path, arrays)
    return path


def collect(
    backbone: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    pairs: Tensor,
    boxes: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    made_of: dict[str, Any],
    class_names: Sequence[str] = (),
    view_labels: Any = None,
    threshold: float = 0.2,
) -> dict[str, np.ndarray]:
    """The arrays above.

    Args:
        backbone: views in, ``Encoded`` out. batches: (images (b, C, S, S) normalised, labels (b,), ids).
        pairs: (2*m, C, S, S) normalised, view-major. boxes: (2, m, 5) of these views.
        mean, std: of the normalisation. made_of: see ``origin``. threshold: overlap above which patches match.
    """
    out: dict[str, Any] = {
        "origin": np.array(json.dumps(made_of)), "class_names": np.array(list(class_names), dtype=str),
    }  # fmt: skip
    with frozen(backbone):
        _evaluation_images(out, backbone, batches, mean, std)
        _pairs(out, backbone, pairs, boxes, mean, std, threshold)
    count = pairs.shape[0] // 2
    out["view_labels"] = np.full(count, -1) if view_labels is None else np.asarray(view_labels)
    return out


def _evaluation_images(
    out: dict[str, Any], backbone: nn.Module, batches: Iterable[Any], mean: Sequence[float], std: Sequence[float]
) -> None:
    features, labels, thumbnails, routing = [], [], [], []
    for images, label, *_ in batches:
        encoded = backbone([images])
        features.append(encoded.features.float())
        labels.append(label)
        thumbnails.append(_small(images, mean, std))
        routing.append([r.indices.to(torch.int16) for r in encoded.routing[0]] if encoded.routing else [])
        for layer, r in enumerate(encoded.routing[0] if encoded.routing else []):
            out[f"experts/L{layer}"] = np.int64(r.experts)
    if not features:
        raise ConfigError("explain: the evaluation set is empty")
    out["features"], out["labels"] = torch.cat(features).numpy(), torch.cat(labels).numpy()
    out["thumbnails"] = torch.cat(thumbnails).numpy()
    for layer, parts in enumerate(zip(*routing, strict=True)):
        out[f"routing/L{layer}"] = torch.cat(parts).numpy()


def _pairs(
    out: dict[str, Any], backbone: nn.Module, pairs: Tensor, boxes: Tensor,
    mean: Sequence[float], std: Sequence[float], threshold: float,
) -> None:  # fmt: skip
    count = pairs.shape[0] // 2
    encoded = backbone([pairs])
    out["views"] = _pixels(pairs, mean, std).unflatten(0, (2, count)).transpose(0, 1).contiguous().numpy()
    for layer, r in enumerate(encoded.routing[0] if encoded.routing else []):
        out[f"view_routing/L{layer}"] = r.indices.unflatten(0, (2, count)).transpose(0, 1).to(torch.int16).numpy()
    regions = encoded.regions[0] if encoded.regions else None
    if regions is None or regions.ndim != 3 or math.isqrt(regions.shape[1]) ** 2 != regions.shape[1]:
        return
    grid = math.isqrt(regions.shape[1])
    index, valid, _, _ = overlap(boxes[0], boxes[1], grid, threshold)
    out["match"] = torch.where(valid, index, -1).numpy()
    first, second = F.normalize(regions.float(), dim=-1).unflatten(0, (2, count)).unbind(0)
    similarity, best = (first @ second.transpose(1, 2)).max(-1)
    out["correspondence"], out["similarity"] = best.numpy(), similarity.numpy()
    if hasattr(backbone, "attention"):
        weights = backbone.attention(pairs[:count])[:, :, 0, 1:]
        out["attention"] = weights.float().unflatten(2, (grid, grid)).numpy()
        out["attention_images"] = _pixels(pairs[:count], mean, std).numpy()


def _pixels(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised (n, C, S, S) -> (n, S, S, 3) uint8."""
    x = x.float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return x.mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _small(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    if images.shape[-1] > THUMBNAIL:
        images = F.interpolate(images.float(), (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)
    return _pixels(images, mean, std)
