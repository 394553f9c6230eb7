"""A whole MoCo v3 step beside plain PyTorch, with compiled blocks, and as an exact large batch; MoCo beside end-to-end
(MoCo v2's table 3); EsViT's region loss.

Sides take turns; a ratio is the median over rounds of ours / plain in that round, for the wall clock and for the
processor time of the process (which other programs disturb less), each with an interval of its median. Memory is the
peak of a process of its own over what it held before its first step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks import _regions
from benchmarks._memory import begin, resident
from benchmarks._plain_mocov3 import PlainStep
from benchmarks.moe import HEAD, Row, alternate, columns
from moe_cl import config, methods
from moe_cl.allocator import keep_freed_memory
from moe_cl.config import RunConfig
from moe_cl.views.spec import Batch

_ENV = dict(os.environ)  # as it is before this process joins a process group, for the processes that measure memory
TARGETS = {
    "step_fp32": 1.02,
    "step_bf16": 1.02,
    "step_memory": 1.0,
    "region_memory": 1 / 3,
    "compiled_loss_fp32": 1e-5,
    "large_batch_fp32": 1.4,
    "large_batch_bf16": 1.4,
}
PARTS_OF_LARGE = 4  # micro-batches of the exact large batch


def images(batch: int, size: int) -> Batch:
    """Two views of random images."""
    ids = torch.arange(batch)
    x = torch.randn(2 * batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Batch([x], torch.zeros(2, batch, 5), ids, ids, ids)


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Two views' batch as ``parts`` micro-batches."""
    ids, size = batch.sample_ids.chunk(parts), batch.views[0].shape[1:]
    views = batch.views[0].view(2, -1, *size).chunk(parts, 1)
    boxes = batch.boxes.chunk(parts, 1)
    return [Batch([v.flatten(0, 1)], b, i, i, i) for v, b, i in zip(views, boxes, ids, strict=True)]


def ours(recipe: str, settings: list[str], batch: Batch, parts: int = 1) -> Callable[[], object]:
    """A step of a recipe through the DeepSpeed engine and the project's driver; ``parts``: of an exact large batch."""
    from moe_cl.engine import large_batch, ranks, setup
    from moe_cl.engine.step import step

    size = batch.views[0].shape[-1]
    if parts > 1:
        settings = [*settings, "batch.exact_large_batch=true", f"batch.micro_batch={len(batch.sample_ids) // parts}"]
    more = [f"batch.global_batch={len(batch.sample_ids)}", f"views.size={size}"]
    cfg: RunConfig = config.load(recipe, [*more, *settings], methods.params_of)
    cfg.engine.ds_config = write_json()
    comm = _group(ranks)
    built = setup.build(cfg, comm)
    number, batches = iter(range(1, 10**9)), cut(batch, parts)
    driver = step if parts == 1 else large_batch.step
    return lambda: driver(built.parts, batches, next(number), 0.99)


_GROUP: list = []


def _group(ranks) -> object:
    if not _GROUP:
        ranks.leave_out_shm_op()
        _GROUP.append(ranks.init(ranks.Ranks(), 600.0))
    return _GROUP[0]


def write_json() -> str:
    """A DeepSpeed JSON of stage 0 for one process."""
    path = os.path.join(tempfile.gettempdir(), f"benchmark-step-{os.getpid()}.json")
    with open(path, "w") as f:
        json.dump({"zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}, f)
    return path


def plain(precision: str, batch: Batch, backbone: str, options: dict) -> Callable[[], object]:
    """The same step in plain PyTorch."""
    step, (x1, x2) = PlainStep(backbone, options, precision), batch.views[0].chunk(2)
    return lambda: step(x1, x2)


def side(name: str, quick: bool) -> Callable[[], object]:
    """A measured side by name: ``ours bf16``, ``compiled bf16``, ``large bf16``, ``plain fp32``, ``moco``,
    ``end_to_end``, ``fused``, ``gathered``."""
    kind, _, precision = name.partition(" ")
    if kind in ("ours", "compiled", "large", "plain"):
        batch = images(4, 64) if quick else images(16, 224)
        options = {"img_size": 64, "depth": 4} if quick else {}
        if kind == "plain":
            return plain(precision, batch, "vit_small", options)
        settings = [f"model.options.{k}={v}" for k, v in options.items()] + [f"engine.precision={precision}"]
        settings += ["model.compile=true"] if kind == "compiled" else []
        return ours("mocov3_vit_small_300ep", settings, batch, PARTS_OF_LARGE if kind == "large" else 1)
    if kind in ("moco", "end_to_end"):
        batch = images(8, 64) if quick else images(32, 112)
        settings = ["engine.precision=fp32"] + (["model.backbone=resnet18"] if quick else [])
        recipe = {"moco": "mocov2_r50_200ep", "end_to_end": "end_to_end_r50_200ep"}[kind]
        return ours(recipe, settings, batch)
    tensors = _regions.inputs(2 if quick else 8, 8192 if quick else 65536)
    loss = {"fused": _regions.fused, "gathered": _regions.gathered}[kind]
    return lambda: torch.autograd.grad(loss(*tensors), (tensors[0], tensors[2]))


def peak(name: str, quick: bool) -> float:
    """MiB of two steps of ``name`` in a process of its own, over what it held before."""
    code = f"from benchmarks import step; step.memory_child({name!r}, {quick})"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=_ENV)
    return float(out.stdout.split()[-1])


def memory_child(name: str, quick: bool) -> None:
    """Prints the peak; the networks are held before, their gradients and moments are not."""
    torch.set_num_threads(2)
    run = side(name, quick)
    before = begin()
    for _ in range(2):
        run()
    print((resident("VmHWM") - before) / 2**20)


@dataclass
class Figures:
    """What the parts found: ratios, and the intervals of those that are medians over rounds."""

    ratios: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)

    def take(self, name: str, row: Row, clock: str = "") -> None:
        """A side's ratio; ``clock``: the wall's, or ``cpu_``."""
        self.ratios[name], self.intervals[name] = row[f"{clock}ratio"], row[f"{clock}interval"]


def in_turn(kinds: list[str], precision: str, quick: bool, rounds: int) -> dict[str, Row]:
    """MoCo v3's step of both kinds, printed."""
    sides = {name: side(name, quick) for name in (f"{kind} {precision}" for kind in kinds)}
    if "compiled" in kinds:  # the losses of the first steps, before they are timed
        losses = [[float(run().metrics["loss"]) for _ in range(2)] for run in sides.values()]
        worst = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
        print(f"compiled {precision}: losses of two steps differ by {worst:.1e}", flush=True)
    rows = alternate(sides, rounds)
    show(rows)
    if "compiled" in kinds:
        rows[f"compiled {precision}"]["worst"] = worst
    return rows


def show(rows: dict[str, Row]) -> None:
    """A table of the sides."""
    print("\n".join([f"{'':16s}{HEAD}", *(f"{name:16s}{columns(row)}" for name, row in rows.items())]), flush=True)


def step_part(quick: bool, rounds: int, out: Figures) -> None:
    """MoCo v3's step, time and memory."""
    for precision in ("bf16", "fp32"):
        row = in_turn(["plain", "ours"], precision, quick, rounds)[f"ours {precision}"]
        out.take(f"step_{precision}", row)
        out.take(f"step_{precision}_cpu", row, "cpu_")
    out.ratios["step_memory"] = compare("plain fp32", "ours fp32", quick)


def compile_part(quick: bool, rounds: int, out: Figures) -> None:
    """``model.compile``: what it gains over the plain blocks, and how far the losses of the first steps differ."""
    for precision in ("bf16", "fp32"):
        row = in_turn(["ours", "compiled"], precision, quick, rounds)[f"compiled {precision}"]
        out.take(f"compiled_{precision}", row)
        out.ratios[f"compiled_loss_{precision}"] = row["worst"]


def large_part(quick: bool, rounds: int, out: Figures) -> None:
    """The exact large batch in micro-batches beside the same batch in one piece: time, and memory of the step."""
    for precision in ("bf16", "fp32"):
        row = in_turn(["ours", "large"], precision, quick, rounds)[f"large {precision}"]
        out.take(f"large_batch_{precision}", row)
    out.ratios["large_batch_memory"] = compare("ours fp32", "large fp32", quick)


def table3_part(quick: bool, rounds: int, out: Figures) -> None:
    """MoCo v2's table 3: MoCo against end-to-end at equal batch."""
    rows = alternate({k: side(k, quick) for k in ("moco", "end_to_end")}, max(2, rounds - 4))
    show(rows)
    out.take("end_to_end_time", rows["end_to_end"], "cpu_")
    out.ratios["end_to_end_memory"] = compare("moco", "end_to_end", quick)


def regions_part(quick: bool, rounds: int, out: Figures) -> None:
    """The region loss in both forms: memory, time, and that they are one function."""
    out.ratios["region_memory"] = compare("gathered", "fused", quick)
    sides = {k: side(k, quick) for k in ("gathered", "fused")}
    worst = max(
        float((x - y).abs().max() / x.abs().max())
        for x, y in zip(*(run() for run in sides.values()), strict=True)  # fmt: skip
    )
    print(f"region loss, gradients of the two forms differ by {worst:.1e} of the largest")
    rows = alternate(sides, 1 if quick else 2)
    show(rows)
    out.take("region_time", rows["fused"], "cpu_")


def compare(a: str, b: str, quick: bool) -> float:
    """Peak memory of ``b`` over ``a``'s."""
    first, second = peak(a, quick), peak(b, quick)
    print(f"peak memory, {a}: {first:.0f} MiB, {b}: {second:.0f} MiB, ratio {second / first:.3f}", flush=True)
    return second / first


PARTS = {
    "regions": regions_part, "step": step_part, "compile": compile_part, "large": large_part, "table3": table3_part,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small networks, few rounds")
    parser.add_argument("--part", choices=PARTS, help="one part alone")
    parser.add_argument("--rounds", type=int, help="rounds of the timings")
    args = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()
    rounds = args.rounds or (3 if args.quick else 7)
    found = Figures()
    print(f"{torch.get_num_threads()} threads, {rounds} rounds{', quick sizes' if args.quick else ''}", flush=True)
    for name in [args.part] if args.part else PARTS:
        PARTS[name](args.quick, rounds, found)
    ratios = found.ratios
    targets = {name: target for name, target in TARGETS.items() if name in ratios}
    out = {"benchmark": "step", "ratios": {k: float(f"{v:.4g}") for k, v in ratios.items()},
           "targets": {k: float(f"{v:.4g}") for k, v in targets.items()},
           "met": all(ratios[k] <= v for k, v in targets.items()),
           "intervals": {k: [float(f"{v:.4g}") for v in pair] for k, pair in found.intervals.items()}}  # fmt: skip
    print(json.dumps(out))


if __name__ == "__main__":
    main()
