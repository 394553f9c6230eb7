"""What a step costs in floating-point operations, and what that makes of a measured speed: TFLOP/s and MFU.

Counted once, before the run, by ``torch.utils.flop_counter`` on one small step of the run's own code in fp32 on the
CPU: student, teacher, heads and loss, backward. Of the experts only the rows that are routed to them are computed, so
the number is the active one. Matrix products, convolutions and attention; a multiply-add is two. What is only computed
again (activation checkpointing, ``moe.recompute``, the second forward of an exact large batch) does not count. Logits
between the images of a batch are those of the small batch: they are thousandths of a backbone's work.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_cl.comm import LocalComm
from moe_cl.config import RunConfig
from moe_cl.engine.setup import build_method
from moe_cl.engine.step import with_keys
from moe_cl.tracking.progress import count as size
from moe_cl.views.spec import Batch, build_spec


@dataclass(frozen=True)
class Flops:
    """What the run's speed is multiplied with.

    image: FLOPs of a training step an image. peak: FLOP/s of all ranks together (``engine.peak_tflops`` times their
    number), None where nobody said.
    """

    image: float
    peak: float | None = None

    def __str__(self) -> str:
        known = f"peak {size(self.peak)}FLOP/s" if self.peak else "no engine.peak_tflops, so no mfu"
        return f"{size(self.image)}FLOP an image and step, of the experts the chosen ones; {known}"

    def rates(self, images_per_second: float) -> dict[str, float]:
        """``tflops`` (10^12 FLOP/s over all ranks), and ``mfu`` (its share of the peak) if the peak is known."""
        speed = self.image * images_per_second
        return {"tflops": speed / 1e12} | ({"mfu": speed / self.peak} if self.peak else {})


@contextlib.contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """A counter of what is run inside. The CPU's fused attention is unknown to it, as matrix products it is not; and
    for oneDNN experts' rows are filled up with zeros (moe/mlp.py), which is no work."""
    enabled = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)  # ``flags`` would warn of another device's settings
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def count(cfg: RunConfig, world: int) -> Flops:
    """The FLOPs of an image in this run's step. Costs seconds and a copy of the networks in main memory; touches no
    random state.

    Args:
        cfg: the run. world: its ranks.
    """
    peak = cfg.engine.peak_tflops
    with torch.random.fork_rng(), torch.autocast("cpu", enabled=False):
        image = _image(cfg)
    gc.collect()  # networks and methods point at each other: their memory is given back now, before training
    return Flops(image, peak * 1e12 * world if peak else None)


def _image(cfg: RunConfig) -> float:
    one = copy.deepcopy(cfg)
    one.model.activation_checkpointing = one.model.compile = one.moe.recompute = False
    one.moe.ep_size, one.engine.statistics = 1, "global"
    images = max(2, getattr(cfg.params, "bn_groups", 1))
    comm, spec = LocalComm(), build_spec(cfg.views)
    method, student, teacher = build_method(one, comm, None)
    method.bind(student, teacher)
    method.progress.epochs, method.progress.steps_per_epoch = cfg.schedule.epochs, 1
    views = [torch.zeros(number * images, 3, side, side) for side, number in spec.resolutions]
    ids = torch.arange(images)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]).expand(spec.views, images, 5).clone()
    batch = with_keys(Batch(views, boxes, ids, ids, ids), cfg.seed, 0)
    with counting() as counter:
        features = method.encode_student(student, batch)
        keys = None
        if teacher is not None:
            with torch.no_grad():
                keys = method.encode_teacher(teacher, batch)
        method.loss(features, keys, batch, comm).loss.backward()
    return counter.get_total_flops() / images
