"""From a traced step to memory, time and traffic of a run: the stated model.

Operation: max(FLOPs / rate of its kind, bytes / stream, launch), and on a CPU the first writing of the large blocks
that it makes (of a convolution also its copies of large maps): they come from the system anew in every step
(``moe_cl/allocator.py`` keeps the others). Step: student + teacher + loss + backward, then optimizer and EMA (bytes /
stream), then messages; nothing overlaps (``overlap_comm: false``), but for reading data.
Messages of S bytes over n ranks (rings inside a node, all of a node's ranks together on its network): all-reduce
2 S (n-1)/n a rank, all-gather S (n-1), all-to-all S (n-1)/n; of a group with p ranks on a node and N nodes, the
network of that node carries 2 S (N-1)/N, S (n-p) and p S (n-p)/n, and the busiest node counts. ZeRO 1 and 2 reduce
every gradient to all ranks (DeepSpeed's ``use_multi_rank_bucket_allreduce``) and gather the weights after the step;
ZeRO 3 gathers them in forward and backward.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from moe_cl.config import RunConfig
from moe_cl.planning.hardware import Hardware
from moe_cl.planning.layout import Layout, Spread, carried
from moe_cl.planning.ledger import Op
from moe_cl.planning.trace import LARGE, Trace

# Parts of a rank's memory, in the order they are shown; a plan always has all of them.
PARTS = (
    "weights", "master weights", "optimizer", "teacher", "gradients", "reduction buffers", "activations",
    "teacher's activations", "dispatch buffers", "heads and loss", "region loss", "backward", "queue", "buffers",
    "images", "libraries",
)  # fmt: skip


FLAT = 500_000_000  # elements that DeepSpeed's stage 0 reduces at once
MIB = 2**20
# On a CPU, measured on torch 2.14 and DeepSpeed 0.19: what the engine's start loads (with experts MOE more), oneDNN's
# copies of feature maps in layouts of its own; blocks whose size follows the routing do not fit those freed before:
# the heap grows by 1.0 to 1.7 times what is alive of them within some dozens of steps.
LIBRARIES, MOE, CONVOLUTIONS, MISFITS = 70 * MIB, 120 * MIB, 150 * MIB, 1.5
# Experts through torch's operations (no compiler): every block of the layer follows the routing, so half of all; and
# oneDNN's kernels for 64 numbers of rows and five products, 0.57 MiB each. Those of the compiled experts are 10 MiB.
TORCH_MISFITS, TORCH_KERNELS, KERNELS = 0.5, 185 * MIB, 10 * MIB


@dataclass(frozen=True)
class Zero:
    """What the DeepSpeed JSON says: stage, elements of a reduction bucket, most gathered elements of stage 3."""

    stage: int = 0
    bucket: int = 500_000_000
    live: int = 1_000_000_000

    @property
    def gradient_share(self) -> float:
        """What counts of a complete gradient while the backward goes on (``Ledger``): with ZeRO 2 and 3 it moves into
        the bucket at once, which is counted apart."""
        return 0.0 if self.stage >= 2 else 1.0


def states(cfg: RunConfig) -> int:
    """fp32 numbers an optimizer keeps a parameter."""
    return 2 if cfg.optim.name == "adamw" else 1


def partition(traced: Trace, layout: Layout, stage: int) -> float:
    """Elements of the trained parameters that this rank's optimizer owns."""
    return traced.dense / layout.world + traced.experts / layout.copies if stage else float(traced.trained)


def memory(cfg: RunConfig, traced: Trace, layout: Layout, zero: Zero, gpu: bool) -> dict[str, int]:
    """Bytes of a rank by part at its worst moment: in the backward, in the reduction or in the optimizer's step."""
    whole, cut = traced.trained, partition(traced, layout, zero.stage)
    held = min(whole, cut + min(whole, zero.live)) if zero.stage == 3 else whole
    fixed = {
        "weights": 4 * (held + traced.frozen),
        "master weights": 4 * cut if zero.stage else 0,
        "optimizer": 4 * states(cfg) * cut,
        "teacher": 4 * (min(traced.teacher, zero.live) if zero.stage == 3 else traced.teacher),
        "queue": traced.queue,
        "buffers": traced.buffers,
        "images": traced.images,
    }
    if gpu:
        worst = max(_moments(cfg, traced, zero, cut), key=lambda moment: sum(moment.values()))
    else:
        worst = _on_cpu(cfg, traced, zero, cut, layout.world)
    return {part: round(fixed.get(part, 0) + worst.get(part, 0)) for part in PARTS}


def _moments(cfg: RunConfig, traced: Trace, zero: Zero, cut: float) -> list[dict[str, float]]:
    """Bytes that come and go: in forward and backward, while gradients are reduced, while weights are updated."""
    whole, once = traced.trained, max(traced.dense, traced.experts)  # experts are reduced in a bucket of their own
    spare = {"sgd": 1, "lars": traced.largest / whole, "adamw": 0}[cfg.optim.name]
    if zero.stage == 0:
        return [
            traced.peak,
            {"gradients": 4 * whole, "reduction buffers": 4 * min(once, FLAT)},
            {"gradients": 4 * whole, "reduction buffers": 4 * spare * whole},
        ]
    own = {"gradients": 4 * cut}
    return [
        {**traced.peak, "reduction buffers": 4 * zero.bucket},
        {"reduction buffers": 4 * (zero.bucket + min(once, zero.bucket))},
        {**own, "reduction buffers": 4 * zero.bucket},
        {**own, "reduction buffers": 4 * cut * (1 + (cfg.optim.name != "adamw"))},
    ]


def _on_cpu(cfg: RunConfig, traced: Trace, zero: Zero, cut: float, world: int) -> dict[str, float]:
    """The same on a CPU, where the C allocator keeps small blocks for their next use (``moe_cl/allocator.py``).

    So their worst moments add up instead of sharing room: activations, gradients and, with ZeRO, the weights' first
    blocks (the engine copies them into one). Large blocks come and go: the bucket, of which only what is written
    exists, with a rank's own part beside it or (several ranks) a copy of it.
    """
    once, inside = max(traced.dense, traced.experts), min(zero.bucket, traced.trained)
    out = {part: float(size) for part, size in traced.peak.items()}
    out["gradients"] = 4.0 * traced.small
    out["libraries"] = LIBRARIES + (CONVOLUTIONS if traced.convolutions else 0)
    if traced.experts:
        own = KERNELS + MISFITS * traced.routed
        through_torch = TORCH_KERNELS + TORCH_MISFITS * sum(traced.peak.values())
        out["libraries"] += MOE + (own if traced.routed else through_torch)
    if zero.stage == 0:
        out["gradients"] = 4.0 * traced.trained
        large, part = 4 * min(once, FLAT), "reduction buffers"
    else:
        out["weights"] = 4.0 * traced.small
        step = cut * (2 + (cfg.optim.name != "adamw"))  # this rank's gradients, together, and with decay
        reduction = inside + max(cut, min(once, inside) if world > 1 else 0)
        large, part = 4 * max(step, reduction), "reduction buffers"
    if sum(traced.large.values()) > large:
        return {key: out.get(key, 0) + traced.large.get(key, 0) for key in {*out, *traced.large}}
    return out | {part: large}


def seconds(ops: Counter[Op], hardware: Hardware) -> float:
    """Time of counted operations on one device."""
    total = 0.0
    for op, times in ops.items():
        rate = (hardware.low if op.low else hardware.full).get(op.kind, math.inf)
        total += times * max(op.flops / rate, op.size / hardware.stream, hardware.launch)
        total += times * op.fresh * hardware.fresh
    return total


@dataclass
class Traffic:
    """Collectives of a step: seconds, bytes that a rank sends, and bytes out of the busiest node."""

    seconds: float = 0.0
    sent: float = 0.0
    outside: float = 0.0

    def add(self, kind: str, size: float, spread: Spread, hardware: Hardware, times: int = 1) -> None:
        """``times`` collectives of ``size`` bytes in every group of ``spread``."""
        if spread.ranks == 1 or not size:
            return
        sent, outside = carried(kind, size, spread)
        inside = sent if spread.together > 1 else 0.0
        waiting = hardware.latency * math.ceil(math.log2(spread.ranks))
        self.seconds += times * (waiting + max(inside / hardware.link, outside / hardware.network))
        self.sent += times * sent
        self.outside += times * outside


def messages(traced: Trace, group: str, layout: Layout, hardware: Hardware) -> Traffic:
    """All messages of a step in ``group`` (world or expert)."""
    out = Traffic()
    for message, times in traced.messages.items():
        if message.group == group:
            out.add(message.kind, message.size, layout.spread(group), hardware, times)
    return out


def between_ranks(traced: Trace, layout: Layout, hardware: Hardware, zero: Zero) -> Traffic:
    """Gradients between ranks and weights back (the experts' among their copies)."""
    out, world, copies = Traffic(), layout.spread("world"), layout.spread("copies")
    out.add("all_reduce", 4 * traced.dense, world, hardware)
    out.add("all_reduce", 4 * traced.experts, copies, hardware)
    gathers = {0: 0, 1: 1, 2: 1, 3: 2}[zero.stage]
    out.add("all_gather", 4 * traced.dense / layout.world, world, hardware, gathers)
    out.add("all_gather", 4 * traced.experts / layout.copies, copies, hardware, gathers)
    if zero.stage == 3:  # the teacher is cut too
        out.add("all_gather", 4 * traced.teacher / layout.world, world, hardware)
    return out


def update_bytes(cfg: RunConfig, traced: Trace, layout: Layout, zero: Zero) -> float:
    """Read and written after the backward: reduction's copies, norms, optimizer, EMA, queue.

    Stage 0: gradients are copied together (2 passes), scaled (2) and copied back (2), the norm reads them (1). Stages
    1 to 3: into the bucket (2), scaled (2), together (2) and back (2); then of this rank's part: out of the bucket (2),
    together (2), norms and the check (3), weights back (2). AdamW reads four and writes three numbers a parameter, SGD
    and LARS with decay about eleven.
    """
    whole, cut = traced.trained, partition(traced, layout, zero.stage)
    passes = 7 if cfg.optim.name == "adamw" else 11
    moved = 7 * whole + passes * whole if zero.stage == 0 else 8 * whole + (9 + passes) * cut
    average = 3 * traced.teacher / (layout.world if zero.stage == 3 else 1)
    return 4 * (moved + average)


def fresh_bytes(cfg: RunConfig, traced: Trace, layout: Layout, zero: Zero) -> float:
    """Large blocks that a CPU's reduction and optimizer write first: all gradients together (stage 0); the bucket,
    which is made anew for every backward, this rank's gradients together, and those with decay."""
    if zero.stage == 0:
        return 4.0 * traced.trained if 4 * traced.trained >= LARGE else 0.0
    cut = 4.0 * partition(traced, layout, zero.stage)
    return 4.0 * min(zero.bucket, traced.trained) + (cut * (1 + (cfg.optim.name != "adamw")) if cut >= LARGE else 0.0)


def step_seconds(
    cfg: RunConfig, traced: Trace, layout: Layout, hardware: Hardware, zero: Zero
) -> tuple[dict[str, float], dict[str, Traffic]]:
    """Seconds of an optimizer step by part, and the messages among these parts."""
    out = {phase: seconds(ops, hardware) for phase, ops in traced.ops.items()}
    launches = 4 * traced.tensors * hardware.launch  # copy, norm, update, average
    out["optimizer and EMA"] = update_bytes(cfg, traced, layout, zero) / hardware.stream + launches
    out["optimizer and EMA"] += fresh_bytes(cfg, traced, layout, zero) * hardware.fresh
    sent = {
        "messages of the method": messages(traced, "world", layout, hardware),
        "expert all-to-all": messages(traced, "expert", layout, hardware),
        "gradients and weights": between_ranks(traced, layout, hardware, zero),
    }
    return out | {name: traffic.seconds for name, traffic in sent.items()}, sent


def image_seconds(views: list[tuple[int, int]], hardware: Hardware, pixels: float = 500 * 375) -> float:
    """Seconds of a core for one image of ``pixels``: decoding and (side, number) views.

    A million pixels of the image take 3.7 ms to decode, those of its views 10.5 ms, and a view 0.055 ms and 0.32 ms a
    million pixels of the image: through benchmarks/README.md's decoder (0.69 ms), 2 x 224 and 2 x 224 + 8 x 96 of
    decoded images (1.28 ms, 2.97 ms) and two views of a 28 px image (0.13 ms), scaled to the core at hand.
    """

    def model(million: float, views: list[tuple[int, int]]) -> float:
        number, made = sum(n for _, n in views), sum(n * side * side for side, n in views) / 1e6
        return 3.7 * million + (0.055 + 0.32 * million) * number + 10.5 * made

    return model(pixels / 1e6, views) / model(500 * 375 / 1e6, [(224, 2)]) * hardware.image
