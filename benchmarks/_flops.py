"""Floating-point operations of a recipe: of a training step an image, and of the backbone's forward a view."""

from __future__ import annotations

import torch

from moe_cl.config import RunConfig
from moe_cl.engine import flops as step
from moe_cl.evals import pretrained
from moe_cl.views.spec import build_spec


def flops(cfg: RunConfig) -> tuple[float, float]:
    """(a training step's, an image; the backbone's forward, a global view): both networks, heads, loss and backward in
    the first; a queue at its full length."""
    side, _ = build_spec(cfg.views).resolutions[0]
    with torch.random.fork_rng(), torch.no_grad():
        backbone = pretrained.backbone(cfg)
        with step.counting() as counter:
            backbone([torch.zeros(1, 3, side, side)])
    return step.count(cfg, 1).image, float(counter.get_total_flops())
