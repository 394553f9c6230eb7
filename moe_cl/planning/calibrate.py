"""What this machine reaches (``plan --calibrate FILE``): the figures of ``hardware.Hardware``, measured.

Products and convolutions are timed forward and backward in shapes of the networks here (a block of ViT-S/16, its
experts, bottlenecks of ResNet-50), memory by an activation function that makes a new tensor, messages between two
processes, images through the loader's code.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._pytree import tree_map

from moe_cl.allocator import keep_freed_memory
from moe_cl.config import ConfigError, ViewsConfig
from moe_cl.data.decode import decode
from moe_cl.models.vit import attention
from moe_cl.moe.experts import Experts
from moe_cl.planning.hardware import GIB, GPUS, LINE, Hardware
from moe_cl.planning.trace import LARGE
from moe_cl.views.augment import make_views
from moe_cl.views.spec import build_spec

Clock = Callable[[], float]
ROUNDS = 3


def measure(
    seconds: float = 0.5, links: bool = True, clock: Clock = time.perf_counter, rounds: int = ROUNDS
) -> Hardware:
    """This machine's accelerator if it has one, else its processor with torch's threads.

    Args:
        seconds: for each of about a dozen figures.
        links: start two processes that send to each other (none where there is one GPU); without them the links are
            those of an H100's node.
        clock: processor time where others compute on the machine too.
        rounds: of all products, which share their seconds; the fastest counts.

    Raises:
        ConfigError: the two processes did not meet.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timer = Timer(device, seconds, clock)
    if device.type == "cpu":
        keep_freed_memory()  # as a training process does
    rates = best(dataclasses.replace(timer, seconds=seconds / rounds), rounds)
    alone = device.type == "cuda" and torch.cuda.device_count() < 2
    other = _links() if links and not alone else {}
    known = GPUS["H100-80G"]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        name, memory, reserve = found.name, found.total_memory, known.reserve
    else:
        name, memory, reserve = f"CPU, {torch.get_num_threads()} threads a rank", psutil.virtual_memory().total, GIB
    return Hardware(
        name=name, memory=float(memory), low=rates[torch.bfloat16], full=rates[torch.float32],
        stream=stream(timer), fresh=fresh(timer), link=other.get("link", known.link), network=known.network,
        launch=launch(timer), latency=other.get("latency", known.latency), reserve=float(reserve),
        image=image(timer), gpu=device.type == "cuda", types=["bf16", "fp16"],
        source=f"measured {time.strftime('%Y-%m-%d')}; the network is not: {known.network / LINE / 1e9 * 8:.0f} Gbit/s",
    )  # fmt: skip


@dataclass(frozen=True)
class Timer:
    """How things are timed: for about ``seconds`` each, on ``device``, by ``clock``."""

    device: torch.device
    seconds: float
    clock: Clock = time.perf_counter

    def __call__(self, run: Callable[[], object]) -> float:
        """Median seconds of ``run``, at least three times, after two that are not counted."""
        times: list[float] = []
        end = float("inf")
        for number in range(10_000):
            begin = self.clock()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if number == 1:
                end = time.perf_counter() + self.seconds
            if number > 1:
                times.append(self.clock() - begin)
                if len(times) >= 3 and time.perf_counter() > end:
                    break
        return float(np.median(times))


def best(timer: Timer, rounds: int) -> dict[torch.dtype, dict[str, float]]:
    """``products`` in fp32 and bf16, the fastest of ``rounds``: what disturbs a shared machine lasts seconds and
    only ever slows."""
    kinds = (torch.float32, torch.bfloat16)
    found = [{dtype: products(timer, dtype) for dtype in kinds} for _ in range(rounds)]
    return {dtype: {kind: max(each[dtype][kind] for each in found) for kind in found[0][dtype]} for dtype in kinds}


def products(timer: Timer, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s forward and backward: a ViT's linear layers, its attention (products, whole), convolutions, experts."""
    device = timer.device
    images = 64 if device.type == "cuda" else 8

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    def rate(call: Callable[..., torch.Tensor], flops: float, *inputs: torch.Tensor) -> float:
        grad = tree_map(torch.ones_like, call(*inputs))

        def run() -> None:
            torch.autograd.grad(call(*inputs), inputs, grad)

        return 3 * flops / timer(run)  # backward: twice the forward

    n, d, heads, t = images, 384, 6, 197
    linear = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    out = {"matmul": rate(_all(F.linear), *_sum(
        (2.0 * n * t * i * o, tensor(n, t, i), tensor(o, i)) for i, o in linear))}  # fmt: skip
    pairs = 2.0 * n * heads * t * t * (d // heads)
    q, k = tensor(n * heads, t, d // heads), tensor(n * heads, d // heads, t)
    out["batched"] = rate(torch.bmm, pairs, q, k)
    convs = [conv for block in ((56, 256, 64, 1), (28, 512, 128, 1), (28, 512, 256, 2), (14, 1024, 256, 1))
             for conv in _bottleneck(*block)]  # fmt: skip
    out["conv"] = rate(_all(lambda x, w, stride: F.conv2d(x, w, padding=w.shape[2] // 2, stride=stride),
                            [stride for *_, stride in convs]), *_sum(
        (2.0 * n * (side // stride) ** 2 * i * o * size * size, tensor(n, i, side, side), tensor(o, i, size, size))
        for side, i, o, size, stride in convs))  # fmt: skip
    out["attention"] = rate(attention, 2 * pairs, *(tensor(n, heads, t, d // heads) for _ in range(3)))
    out["experts"] = _experts(rate, tensor, dtype, n * t, d) if device.type == "cpu" else out["matmul"]
    return out


def _bottleneck(side: int, width: int, inner: int, stride: int) -> list[tuple[int, int, int, int, int]]:
    """(side, channels in, out, kernel, stride) of a block of ResNet-50: one of four is the first of its stage."""
    convs = [(side, width, inner, 1, 1), (side, inner, inner, 3, stride), (side // stride, inner, 4 * inner, 1, 1)]
    return convs + ([(side, width, 4 * inner, 1, stride)] if stride > 1 else [])


def _all(call: Callable[..., torch.Tensor], *more: list[Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """``call`` on each pair of its inputs, and what else is its own."""
    return lambda *inputs: tuple(map(call, inputs[::2], inputs[1::2], *more))


def _sum(parts: Iterable[tuple[float, torch.Tensor, torch.Tensor]]) -> list[Any]:
    """FLOPs of all parts, then their inputs."""
    each = list(parts)
    return [sum(part[0] for part in each), *(x for part in each for x in part[1:])]


def _experts(
    rate: Callable[..., float], tensor: Callable[..., torch.Tensor], dtype: torch.dtype, rows: int, d: int
) -> float:
    """Of VMoE's 16 experts, two a token, each half as wide as the MLP, rows spread evenly."""
    experts, k = Experts(d, 2 * d, 16, 0, "xavier", 0, 0), 2
    ids = torch.stack([torch.arange(rows) % 16, (torch.arange(rows) + 5) % 16], 1)
    weights = torch.full((rows, k), 0.5)

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return experts(x, ids, weights)

    return rate(call, 4.0 * rows * k * d * 2 * d, tensor(rows, d), *experts.parameters())


def stream(timer: Timer) -> float:
    """Bytes/s read and written by GELU on a ViT's hidden layer, forward."""
    x = torch.randn((64 if timer.device.type == "cuda" else 8) * 197, 1536, device=timer.device)
    return 2 * x.numel() * 4 / timer(lambda: F.gelu(x))


def fresh(timer: Timer) -> float:
    """Seconds a byte by which a new block that the C allocator does not keep is slower than one that is there."""
    if timer.device.type == "cuda":
        return 0.0
    held = torch.empty(2 * LARGE // 4)
    return max(0.0, timer(lambda: torch.ones(len(held))) - timer(lambda: held.fill_(1.0))) / (2 * LARGE)


def launch(timer: Timer) -> float:
    """Seconds of an operation without work, forward and backward counted alike."""
    x = torch.ones(8, device=timer.device, requires_grad=True)

    def run() -> None:
        y = x
        for _ in range(100):
            y = y * 1.0
        y.sum().backward()

    return timer(run) / 200


def image(timer: Timer) -> float:
    """Seconds in which this core decodes a 500 x 375 JPEG and makes MoCo v3's two views of 224 px."""
    smooth = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    stream = io.BytesIO()
    picture = Image.fromarray(smooth).resize((500, 375), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(1).integers(-16, 16, (375, 500, 3))
    picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    picture.save(stream, "JPEG", quality=92)
    spec, threads = build_spec(ViewsConfig(spec="mocov3")), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step = iter(range(10_000))
        one = dataclasses.replace(timer, device=torch.device("cpu"))
        return one(lambda: make_views(decode(stream.getvalue()), spec, 0, 0, next(step)))
    finally:
        torch.set_num_threads(threads)


def _links() -> dict[str, float]:
    """Two processes of this host send to each other (``links.py``); the slower of all-reduce and all-to-all counts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "moe_cl.planning.links"], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = processes[0].communicate(timeout=300)[0]
    processes[1].communicate(timeout=60)
    if processes[0].returncode or not said.strip():
        raise ConfigError(
            "plan --calibrate: two processes of this host did not meet; `python -m moe_cl doctor` says why"
        )
    found = json.loads(said.strip().splitlines()[-1])
    slower = min(found["all_reduce_mb_s"], found["all_to_all_mb_s"])
    return {"link": slower * 1e6, "latency": found["latency_ms"] / 1e3}
