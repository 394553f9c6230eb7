"""The MoE layer beside the dense MLP it replaces, and beside DeepSpeed's own: time, memory, messages.

VMoE-S/16 against ViT-S/16 of equal FLOPs (six MoE layers, 16 experts, top-2, hidden 768, 224 px, batch 16, 2 threads).
Each side takes turns with the dense one; a ratio is the median over rounds of side / dense in that round, for the wall
clock and for the processor time of the process (which other programs on the machine disturb less), each with an
interval of its median.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks._memory import begin, resident
from benchmarks._moe_messages import bytes_of_two_ranks
from moe_cl.allocator import keep_freed_memory
from moe_cl.config import MoEConfig
from moe_cl.models.build import build_backbone

MOE = MoEConfig(blocks="odd", experts=16, top_k=2, hidden_ratio=2.0)
TARGETS = {
    "train_fp32": 1.05, "forward_fp32": 1.05, "train_bf16": 1.08, "forward_bf16": 1.08,
    "skew": 1.15, "message_rows": 1.0,
}  # fmt: skip


class Native(nn.Module):
    """DeepSpeed's layer without drops, behind our layers' interface."""

    def __init__(self, dim: int, layer: int, moe: MoEConfig):
        super().__init__()
        from deepspeed.moe.layer import MoE

        hidden = round(dim * moe.hidden_ratio)
        expert = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.moe = MoE(
            dim, expert, moe.experts, k=moe.top_k, drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False
        )

    def forward(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, None]:
        return self.moe(x)[0], None


def model(side: str) -> nn.Module:
    torch.manual_seed(0)
    if side == "dense":
        return build_backbone("vit_small")
    return build_backbone("vmoe_small", moe=MOE, moe_factory=Native if side == "native" else None)


def autocast(precision: str):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def train_step(net: nn.Module, x: Tensor, precision: str) -> None:
    net.zero_grad(set_to_none=True)
    with autocast(precision):
        loss = net([x]).features.float().square().mean()
    loss.backward()


def forward(net: nn.Module, x: Tensor, precision: str) -> None:
    with torch.no_grad(), autocast(precision):
        net([x])


Row = dict[str, float | list[float]]  # of one side: see ``alternate``
Intervals = dict[str, list[float]]


def alternate(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, Row]:
    """Each side's median seconds and ratio to the first side, wall and processor time; one unmeasured round first.

    Every second round goes backwards, so that no side always finds the caches as one other side leaves them.

    Returns:
        By side ``seconds``, ``ratio``, ``cpu_ratio`` and the ``interval`` and ``cpu_interval`` of those ratios.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(sides):
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            if number:
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    first = taken[next(iter(sides))]
    out: dict[str, Row] = {}
    for name, pairs in taken.items():
        ratios = [[p[i] / q[i] for p, q in zip(pairs, first, strict=True)] for i in (0, 1)]
        out[name] = {
            "seconds": statistics.median(p[0] for p in pairs),
            "ratio": statistics.median(ratios[0]),
            "cpu_ratio": statistics.median(ratios[1]),
            "interval": median_interval(ratios[0]),
            "cpu_interval": median_interval(ratios[1]),
        }
    return out


def median_interval(values: list[float], level: float = 0.9) -> list[float]:
    """[low, high] that covers the median of what ``values`` are drawn from, whatever their distribution.

    The k-th smallest and k-th largest with the largest k of coverage 1 - 2 P(Bin(n, 1/2) < k) >= ``level`` (the sign
    test's). Fewer than 5 values cannot reach 90 %: then it is their whole range (3 values: 75 %).
    """
    ordered, n, k = sorted(values), len(values), 1
    while 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n >= level:
        k += 1
    return [ordered[k - 1], ordered[n - k]]


class Forced(nn.Module):
    """A router whose indices are given: what any routing costs, with weights and gradients as usual."""

    def __init__(self, router: nn.Module, kind: str):
        super().__init__()
        self.router, self.kind = router, kind

    def forward(self, x: Tensor, keys: Tensor | None = None):
        routing = self.router(x, keys)
        n, t, k = routing.indices.shape
        share = torch.ones(routing.experts)
        if self.kind == "skewed":
            share = 1.0 / torch.arange(1, routing.experts + 1).float() ** 1.5
        elif self.kind == "two experts":
            share[k:] = 0.0
        routing.indices = torch.multinomial(share, n * t * k, replacement=True).view(n, t, k)
        routing.indices[..., 1] = (routing.indices[..., 0] + 1) % (2 if self.kind == "two experts" else routing.experts)
        routing.weights = routing.probabilities.gather(-1, routing.indices)
        return routing


def skew(rounds: int, x: Tensor, intervals: Intervals) -> dict[str, float]:
    """The training step with even, skewed and degenerate routing; the slowest over the even one."""
    nets = {}
    for kind in ("uniform", "skewed", "two experts"):
        net = nets[kind] = model("ours")
        for block in net.blocks:
            if hasattr(block.mlp, "router"):
                block.mlp.router = Forced(block.mlp.router, kind)
    figures = alternate({kind: partial(train_step, net, x, "fp32") for kind, net in nets.items()}, rounds)
    for kind, row in figures.items():
        show(f"train fp32 {kind}", row)
    out = {}
    for name, clock in (("skew", ""), ("skew_cpu", "cpu_")):
        slowest = max(figures.values(), key=lambda row: row[f"{clock}ratio"])
        out[name], intervals[name] = slowest[f"{clock}ratio"], slowest[f"{clock}interval"]
    return out


def peak_memory(side: str, batch: int) -> float:
    """MiB of a process of its own at the peak of a training step, over what it held before."""
    code = f"from benchmarks import moe; moe.memory_child({side!r}, {batch})"
    return float(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def memory_child(side: str, batch: int) -> None:
    net, x = model(side), torch.randn(batch, 3, 224, 224)
    forward(net, x[:1], "fp32")
    before = begin()
    train_step(net, x, "fp32")
    print((resident("VmHWM") - before) / 2**20)


def columns(row: Row) -> str:
    """Seconds, then each ratio with its interval."""
    wall, cpu = ("{:.3f} - {:.3f}".format(*row[key]) for key in ("interval", "cpu_interval"))
    return f"{row['seconds']:>9.3f}{row['ratio']:>12.3f}{wall:>16s}{row['cpu_ratio']:>11.3f}{cpu:>16s}"


HEAD = f"{'seconds':>9s}{'wall ratio':>12s}{'interval':>16s}{'cpu ratio':>11s}{'interval':>16s}"


def show(title: str, row: Row) -> None:
    print(title.ljust(26) + columns(row), flush=True)


def times(batch: int, rounds: int, intervals: Intervals) -> dict[str, float]:
    """Training step and forward in both precisions: ours and DeepSpeed's, each in turns with the dense model.

    Not all three in turns: DeepSpeed's layer leaves gigabytes of freed memory behind, and who comes next pays for it.
    ``intervals`` gets those of the ratios.
    """
    x, nets = torch.randn(batch, 3, 224, 224), {side: model(side) for side in ("dense", "ours", "native")}
    out = {}
    for side, suffix, turns in (("ours", "", rounds), ("native", "_native", max(1, rounds // 3))):
        for precision in ("fp32", "bf16"):
            for name, run, more in (("train", train_step, 1), ("forward", forward, 3)):
                pair = {who: partial(run, nets[who], x, precision) for who in ("dense", side)}
                figures = alternate(pair, turns * more)
                for who, row in figures.items():
                    show(f"{name} {precision} {who}", row)
                out[f"{name}_{precision}{suffix}"] = figures[side]["ratio"]
                out[f"{name}_{precision}{suffix}_cpu"] = figures[side]["cpu_ratio"]
                intervals[f"{name}_{precision}{suffix}"] = figures[side]["interval"]
                intervals[f"{name}_{precision}{suffix}_cpu"] = figures[side]["cpu_interval"]
    return out


def images(sizes: list[int]) -> dict[str, float]:
    """Milliseconds an image of a forward."""
    out, nets = {}, {side: model(side) for side in ("dense", "ours")}
    for size in sizes:
        x = torch.randn(size, 3, 224, 224)
        sides = {side: partial(forward, net, x, "fp32") for side, net in nets.items()}
        figures = alternate(sides, 20 if size == 1 else 1)
        for side, row in figures.items():
            print(f"batch {size} {side}: {1e3 * row['seconds'] / size:.2f} ms an image", flush=True)
        out[f"image_batch_{size}"] = figures["ours"]["ratio"]
    return out


def memory(batch: int) -> dict[str, float]:
    peaks = {side: peak_memory(side, batch) for side in ("dense", "ours", "native")}
    print("peak memory of a training step, MiB: " + ", ".join(f"{s} {m:.0f}" for s, m in peaks.items()))
    return {"memory": peaks["ours"] / peaks["dense"], "memory_native": peaks["native"] / peaks["dense"]}


def messages(batch: int) -> dict[str, float]:
    sent = bytes_of_two_ranks(batch)
    print("ep 2, bytes of one layer's forward, both ranks: " + ", ".join(f"{k} {v}" for k, v in sent.items()))
    formula = sent["pairs x width x 2"]
    return {"message_rows": sent["rows"] / formula, "message_bytes": sent["sent"] / formula}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, small batches")
    parser.add_argument("--only", nargs="+", choices=["times", "skew", "images", "memory", "messages"])
    args = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()
    batch, rounds = (2, 2) if args.quick else (16, 9)
    intervals: Intervals = {}
    parts = {
        "times": partial(times, batch, rounds, intervals),
        "skew": partial(skew, rounds // 2, torch.randn(batch, 3, 224, 224), intervals),
        "images": partial(images, [1] if args.quick else [1, 256]),
        "memory": partial(memory, batch),
        "messages": partial(messages, batch),
    }
    print(f"VMoE-S/16 beside ViT-S/16, batch {batch}, {torch.get_num_threads()} threads, {rounds} rounds")
    print(f"{'':26s}{HEAD}", flush=True)
    ratios: dict[str, float] = {}
    for name, part in parts.items():
        if name in (args.only or parts):
            ratios |= part()
    ratios = {name: round(value, 4) for name, value in ratios.items()}
    met = all(ratios[name] <= target for name, target in TARGETS.items() if name in ratios)
    out = {"benchmark": "moe", "ratios": ratios, "targets": TARGETS, "met": met}
    print(json.dumps(out | {"intervals": {name: [round(x, 4) for x in pair] for name, pair in intervals.items()}}))


if __name__ == "__main__":
    main()
