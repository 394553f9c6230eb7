"""What this rank writes: its share of every tensor of the run, copied to host memory.

ZeRO partitions and experts are written by who holds them. What several ranks hold alike (the teacher, the student at
stage 0, frozen parameters, buffers) is dealt out among the holders, so that all ranks write in parallel.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_cl.engine.flat import FlatView, Placement, local, placements
from moe_cl.engine.scaler import scaler_of


@dataclass
class Piece:
    """Elements [start, start + numel) of the full flat tensor ``kind/name`` of ``shape``, copied from ``source``."""

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    source: Tensor

    @property
    def whole(self) -> bool:
        return self.source.numel() == int(np.prod(self.shape, dtype=np.int64))

    @property
    def key(self) -> str:
        """Name inside the shard: the tensor's own if it is whole, else with its range."""
        stop = self.start + self.source.numel()
        return self.name if self.whole else f"{self.name}[{self.start}:{stop}]"


def pieces(view: FlatView, teacher: nn.Module | None, method: nn.Module | None) -> list[Piece]:
    """Everything this rank writes of student, optimizer, teacher and method."""
    rank, out = view.comm.rank, list(_trained(view))
    out += _module("student", view.module, view.places, rank, skip=view.trained())
    if teacher is not None:
        out += _module("teacher", teacher, placements(teacher, view.comm), rank)
    if method is not None and rank == 0:
        out += [Piece("method", name, tuple(b.shape), 0, b.detach()) for name, b in method.named_buffers()]
    return out


def _trained(view: FlatView) -> Iterator[Piece]:
    """fp32 masters and optimizer state, from the flat partitions."""
    for index, fragment in enumerate(view.fragments):
        place = fragment.place
        if not view.zero and index % place.copies != place.copy:
            continue
        start = place.start + fragment.start
        yield Piece("student", fragment.name, place.shape, start, view.master(fragment))
        for key, value in view.state(fragment).items():
            if key != "step":  # that is in optimizer.json
                yield Piece(f"optimizer/{key}", fragment.name, place.shape, start, value)


def _module(
    kind: str, module: nn.Module, places: dict[str, Placement], rank: int, skip: set[str] = frozenset()
) -> Iterator[Piece]:
    """Parameters not in ``skip``, dealt out among their holders; buffers of rank 0 (as DDP would broadcast them)."""
    for index, (name, p) in enumerate(module.named_parameters()):
        place = places[name]
        if name in skip:
            continue
        start, held = local(p)
        if hasattr(p, "ds_tensor") or index % place.copies == place.copy:
            if held.numel():
                yield Piece(kind, name, place.shape, place.start + start, held)
    if rank == 0:
        saved = set(module.state_dict(keep_vars=True))
        for name, b in module.named_buffers():
            if name in saved:
                yield Piece(kind, name, tuple(b.shape), 0, b.detach())


def optimizer_steps(view: FlatView) -> dict[str, float | None]:
    """The step count of each trained parameter this rank holds a part of (frozen ones count fewer); None: it has no
    optimizer state yet. SGD and LARS count no steps: theirs with state are left out."""
    out: dict[str, float | None] = {}
    for fragment in view.fragments:
        state = view.state(fragment)
        if "step" in state:
            out[fragment.name] = float(state["step"])
        elif not state:
            out[fragment.name] = None
    return out


class HostCopies:
    """Host memory kept from save to save: the second save pays no page faults."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def take(self, parts: list[Piece]) -> list[Tensor]:
        """Contiguous host copies of the pieces' sources, complete when this returns."""
        hosts = []
        for part in parts:
            host = self._held.get((part.kind, part.key))
            source = part.source
            if host is None or host.shape != source.shape or host.dtype != source.dtype:
                host = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._held[part.kind, part.key] = host
            hosts.append(host)
        sources = [part.source for part in parts]
        for host, source in zip(hosts, sources, strict=True):
            host.copy_(source, non_blocking=True)
        if any(source.is_cuda for source in sources):
            torch.cuda.synchronize()
        return hosts


def rng_state() -> dict[str, Tensor]:
    """This rank's generators: torch, CUDA, NumPy, Python (what matters is keyed by position; these are the rest)."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    out = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Put back what ``rng_state`` gave."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    has, gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has else None))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def engine_state(engine: Any) -> dict[str, Any]:
    """The engine's counters and loss scale, as JSON."""
    scaler = scaler_of(engine)
    return {
        "counters": {name: int(getattr(engine, name)) for name in COUNTERS if hasattr(engine, name)},
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
