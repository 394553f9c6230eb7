"""What ``plan`` predicts beside what is measured: a rank's peak memory, and how step times of recipes compare.

Every case runs in a process of its own: the DeepSpeed engine, teacher and method of the recipe, steps on one random
batch, no loader. Memory is the process's peak resident size over what it held after imports, the start of its process
group and one small product of each kind (libraries allocate at first use). Time is the median step after the second.
All cases are run twice, one after the other: the larger memory and the shorter time count (a shared machine's
neighbours only ever slow).

The machine's rates are measured first (``plan --calibrate``). Absolute times depend on how its caches are shared;
compared are times relative to each other: predicted / measured of a case over the geometric mean of all cases, and
of the two cases that are furthest apart ("pair", without a target).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks._memory import begin as hold
from benchmarks._memory import resident

os.environ.setdefault("DS_ACCELERATOR", "cpu")

VIT = ("mocov3_vit_small_300ep", ["views.size=160", "batch.global_batch=8"])
MOE = ("crmoe_vmoe_small_300ep", ["views.size=160", "batch.global_batch=8", "engine.statistics=global"])
RESNET = ("mocov2_r50_200ep", ["views.size=128", "batch.global_batch=16", "params.queue=65536"])
SIMCLR = ("simclr_r50_200ep", ["views.size=128", "batch.global_batch=8"])
JCL = ("jcl_paper_r50_200ep", ["views.size=128", "batch.global_batch=8"])
SWIN = ("esvit_swin_tiny_w7", ["batch.global_batch=2"])
DINO = ("dino_deit_small", ["batch.global_batch=2"])
SMALL = ("crmoe_vit_micro_fmnist", ["batch.global_batch=256", "moe.ep_size=1"])
CASES: dict[str, tuple[str, list[str]]] = {
    f"{name}, {precision}": (recipe, [*settings, f"engine.precision={precision}"])
    for name, (recipe, settings), precisions in (
        ("MoCo v3, ViT-S/16, 160 px", VIT, ("fp32", "bf16")),
        ("CR-MoE, VMoE-S/16, 160 px", MOE, ("fp32", "bf16")),
        ("MoCo v2, ResNet-50, 128 px", RESNET, ("fp32", "bf16")),
        ("SimCLR, ResNet-50, 128 px", SIMCLR, ("fp32",)),
        ("JCL, ResNet-50, 128 px", JCL, ("fp32",)),
        ("EsViT, Swin-T, 224 + 96 px", SWIN, ("fp32", "bf16")),
        ("DINO, DeiT-S, 224 + 96 px", DINO, ("fp32",)),
        ("CR-MoE, micro ViT, 28 px", SMALL, ("fp32",)),
    )
    for precision in precisions
}
_TINY = ["model.options={dim: 192, depth: 4, heads: 6}", "views.size=96", "batch.global_batch=16"]
QUICK: dict[str, tuple[str, list[str]]] = {
    "MoCo v3, tiny ViT, fp32": ("mocov3_vit_small_300ep", [*_TINY, "engine.precision=fp32"]),
    "CR-MoE, tiny ViT, bf16": (
        "crmoe_vmoe_small_300ep",
        [*_TINY, "engine.precision=bf16", "engine.statistics=global"],
    ),
    "MoCo v2, ResNet-18, fp32": (
        "mocov2_r50_200ep",
        ["model.backbone=resnet18", "views.size=96", "batch.global_batch=16", "engine.precision=fp32"],
    ),
}
TARGETS = {"memory": 0.15, "time": 0.25}
TURNS = 2
LEAST, MOST, SECONDS = 3, 9, 8.0  # measured steps of a case, and how long to go on for more


def measured(case: str, settings: tuple[str, list[str]], threads: int) -> dict[str, float]:
    """Peak bytes and seconds a step of one case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan", "--child", json.dumps(settings), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(recipe: str, settings: list[str], threads: int) -> None:
    """Runs the steps; prints one line of JSON."""
    import torch

    from moe_cl import config, methods
    from moe_cl.allocator import keep_freed_memory
    from moe_cl.engine import large_batch, ranks, setup, step
    from moe_cl.views.spec import Batch, build_spec

    torch.set_num_threads(threads)
    ranks.leave_out_shm_op()
    comm = ranks.init(ranks.Ranks(), 600.0)
    cfg = config.load(recipe, settings, methods.params_of)
    _first_use()
    before = hold()

    built = setup.build(cfg, comm)
    keep_freed_memory()  # as a training process does
    samples, spec = cfg.batch.global_batch, build_spec(cfg.views)
    views = [torch.randn(number * samples, 3, side, side) for side, number in spec.resolutions]
    boxes = torch.tensor([0.1, 0.1, 0.8, 0.8, 0.0]).expand(spec.views, samples, 5).contiguous()
    ids = torch.arange(samples)
    batch = Batch(views, boxes, ids, ids, ids)
    driver = large_batch.step if cfg.batch.exact_large_batch else step.step
    wall, processor, begin = [], [], time.perf_counter()
    for number in range(MOST + 2):
        times = time.perf_counter(), time.process_time()
        driver(built.parts, [batch], number, 0.99)
        if number > 1:
            wall.append(time.perf_counter() - times[0])
            processor.append(time.process_time() - times[1])
            if len(wall) >= LEAST and time.perf_counter() - begin > SECONDS:
                break
    print(json.dumps({"memory": resident("VmHWM") - before, "seconds": statistics.median(wall),
                      "processor": statistics.median(processor)}), flush=True)  # fmt: skip
    os._exit(0)  # gloo's threads may abort in the interpreter's teardown


def _first_use() -> None:
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 64, 16, 16, dtype=dtype, requires_grad=True)
        w = torch.randn(64, 64, 3, 3, dtype=dtype)
        (torch.conv2d(x, w).sum() + (x.flatten(2) @ x.flatten(2).transpose(1, 2)).sum()).backward()


def compare(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Adds each case's errors; returns the worst ones."""
    for row in rows.values():
        row["memory_ratio"] = row["predicted_memory"] / row["memory"]
        row["time_ratio"] = row["predicted_seconds"] / row["clock"]
    scale = math.exp(statistics.fmean(math.log(row["time_ratio"]) for row in rows.values()))
    for row in rows.values():
        row["time_ratio"] /= scale
    ratios = [row["time_ratio"] for row in rows.values()]
    return {
        "memory": max(abs(row["memory_ratio"] - 1) for row in rows.values()),
        "time": max(abs(ratio - 1) for ratio in ratios),
        "pair": max(ratios) / min(ratios) - 1,
        "absolute_time": scale,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three small cases")
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--threads", type=int, default=2, help="of a process (default: 2)")
    parser.add_argument(
        "--processor-time", action="store_true", help="compare processor time, where others compute too"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*json.loads(args.child), args.threads)

    import torch

    from moe_cl import config, methods
    from moe_cl.planning import calibrate, plan, show

    torch.set_num_threads(args.threads)
    clock = time.process_time if args.processor_time else time.perf_counter
    how = {"seconds": 0.1, "rounds": 1} if args.quick else {}
    device = calibrate.measure(**how, links=False, clock=clock)
    print(show.device(device, "nothing"), flush=True)
    cases = {n: case for n, case in (QUICK if args.quick else CASES).items() if not args.only or args.only in n}
    rows: dict[str, dict[str, Any]] = {}
    for turn in range(1 if args.quick else TURNS):
        for name, settings in cases.items():
            row = measured(name, settings, args.threads)
            clock_of = "processor" if args.processor_time else "seconds"
            before = rows.get(name, {"memory": 0, "clock": math.inf})
            row |= {"memory": max(row["memory"], before["memory"]), "clock": min(row[clock_of], before["clock"])}
            if not turn:
                found = plan.make(config.load(*settings, methods.params_of), 1, 1, device)
                row |= {"predicted_memory": found["memory_total"], "predicted_seconds": found["step_seconds"]}
            rows[name] = before | row
    for name, row in rows.items():
        memory = f"{row['predicted_memory'] / 2**20:6.0f} MiB planned, {row['memory'] / 2**20:6.0f} measured"
        taken = f"{row['predicted_seconds']:6.3f} s planned, {row['clock']:6.3f} measured"
        print(f"{name:32s} memory {memory}; a step {taken}", flush=True)
    worst = compare(rows)
    print("\ncase | memory planned / measured | step time planned / measured, all cases' mean taken out")
    for name, row in rows.items():
        print(f"{name:32s} | {row['memory_ratio']:.3f} | {row['time_ratio']:.3f}")
    met = all(worst[name] <= target for name, target in TARGETS.items())
    ratios = {name: round(value, 4) for name, value in worst.items()}
    print(json.dumps({"benchmark": "plan", "ratios": ratios, "targets": TARGETS, "met": met}))


if __name__ == "__main__":
    main()
