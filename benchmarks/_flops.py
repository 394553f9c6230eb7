"""Floating-point operations of a recipe: of a training step an image, and of the backbone's forward a view.

Matrix products, convolutions and attention alone, a multiply-add as two, counted by ``torch.utils.flop_counter`` on a
real step of a few images (both networks, heads, loss, backward; a queue is counted at its full length).
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_cl.comm import LocalComm
from moe_cl.config import RunConfig
from moe_cl.engine.setup import build_method
from moe_cl.engine.step import with_keys
from moe_cl.views.spec import Batch, build_spec


def flops(cfg: RunConfig, images: int = 8) -> tuple[float, float]:
    """(a training step's, an image; the backbone's forward, a global view)."""
    spec, comm = build_spec(cfg.views), LocalComm()
    method, student, teacher = build_method(cfg, comm, None)
    method.bind(student, teacher)
    views = [torch.randn(count * images, 3, size, size) for size, count in spec.resolutions]
    ids = torch.arange(images)
    boxes = torch.tensor([0.1, 0.2, 0.6, 0.5, 0.0]).expand(spec.views, images, 5).clone()
    batch = with_keys(Batch(views, boxes, ids, ids, ids), cfg.seed, 0)
    with FlopCounterMode(display=False) as step:
        features = method.encode_student(student, batch)
        with torch.no_grad():
            keys = method.encode_teacher(teacher, batch) if teacher is not None else None
        method.loss(features, keys, batch, comm).loss.backward()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        student.backbone([views[0][:images]])
    return step.get_total_flops() / images, forward.get_total_flops() / images
