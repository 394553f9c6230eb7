"""Frozen features of a labelled set: computed once, in data order, whole on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moe_cl.comm import Comm, LocalComm
from moe_cl.config import ConfigError
from moe_cl.counting import counted
from moe_cl.data.faults import DataStop

T = TypeVar("T")
Encode = Callable[[Tensor], Tensor]  # images (b, C, H, W) -> features (b, D)
Batches = Iterable[tuple[Tensor, Tensor, Tensor]]  # images, labels (b,), ids (b,): this rank's part of a set


def extract(encode: Encode, loader: Batches, comm: Comm | None = None, what: str = "") -> tuple[Tensor, Tensor]:
    """Features (n, D) fp32 and labels (n,) of the whole set, ordered by sample id, the same on every rank.

    Each rank encodes its own part; parts may differ in size. While one rank still has batches the others encode a
    blank image and drop it, because expert-parallel layers exchange tokens in every forward.

    ``what``: rank 0 counts its images on stderr under this name. Raises the DataStop or ConfigError of one rank's data
    on every rank.
    """
    comm = comm or LocalComm()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    show, images = bool(what) and comm.rank == 0, getattr(loader, "samples", None)
    iterator = counted(loader, what, "images", total=images, show=show, size=lambda batch: len(batch[1]))
    while True:
        batch = error = None
        try:
            batch = next(iterator, None)
        except (DataStop, ConfigError) as reason:
            error = reason
        shapes = _all(comm, None if batch is None else tuple(batch[0].shape[1:]), error)
        shape = next((s for s in shapes if s is not None), None)
        if shape is None:
            return _together(parts, comm)
        if batch is None:
            encode(torch.zeros(1, *shape))
        else:
            parts.append((encode(batch[0]).float(), batch[1], batch[2]))


def opened(open_sets: Callable[[], T], comm: Comm) -> T:
    """What ``open_sets()`` gives on this rank. Raises the DataStop or ConfigError of one rank on every rank."""
    out = error = None
    try:
        out = open_sets()
    except (DataStop, ConfigError) as reason:
        error = reason
    _all(comm, None, error)
    return out


def _all(comm: Comm, value: Any, error: Exception | None) -> list[Any]:
    """Every rank's ``value``; if one rank has an error, all raise it, who would else wait for that rank's next word."""
    values, errors = zip(*comm.gather_objects((value, error)), strict=True)
    if found := next((e for e in errors if e is not None), None):
        raise type(found)(*found.args)
    return list(values)


def _together(parts: list[tuple[Tensor, Tensor, Tensor]], comm: Comm) -> tuple[Tensor, Tensor]:
    """All ranks' (features, labels, ids) in the order of ids."""
    mine = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else None
    sizes = comm.gather_objects((len(mine[0]), mine[0].shape[1], mine[0].device.type) if mine else None)
    if not any(sizes):
        raise ConfigError("evaluation: the data set is empty")
    rows = max(size[0] for size in sizes if size)
    _, width, kind = next(size for size in sizes if size)
    if mine is None:  # on this rank's own device, not the other's
        mine = [torch.zeros(0, width, device=kind), torch.zeros(0).long(), torch.zeros(0).long()]
    counts = [size[0] if size else 0 for size in sizes]

    def gather(x: Tensor) -> Tensor:
        # equal shapes for the collective: padded, then cut
        padded = torch.cat([x.to(mine[0].device), x.new_zeros(rows - len(x), *x.shape[1:]).to(mine[0].device)])
        return torch.cat([p[:n] for p, n in zip(comm.all_gather(padded).split(rows), counts, strict=True)])

    features, labels, ids = (gather(x) for x in mine)
    order = torch.argsort(ids, stable=True)
    return features[order], labels[order]


@contextlib.contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode and without gradient inside; their modes come back afterwards."""
    modes = [m.training for m in modules]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def encoder(
    backbone: nn.Module,
    device: torch.device | str = "cpu",
    *,
    blocks: int = 1,
    patches: bool = False,
    dtype: torch.dtype | None = None,
) -> Encode:
    """``encode`` of a backbone (``moe_cl.models``): pooled features, or those of the last ``blocks`` blocks.

    ``dtype``: autocast to it (bf16, fp16). Use it inside ``frozen``.
    """
    device = torch.device(device)

    def encode(images: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            if blocks == 1 and not patches:
                return backbone([images]).features.float()
            return backbone.last_features(images, blocks, patches).float()

    return encode


def fingerprint(module: nn.Module) -> dict[str, Tensor]:
    """Copies of every tensor and buffer, for ``changed``."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names whose values are not bit-equal to ``fingerprint``'s (the check that a probe left its backbone alone)."""
    state = module.state_dict()
    return [name for name, value in before.items() if not torch.equal(_bits(value), _bits(state[name]))]


def _bits(value: Tensor) -> Tensor:
    """A tensor's bytes: a NaN equals itself, -0 is not 0."""
    return value.detach().contiguous().flatten().view(torch.uint8)


def not_finite(module: nn.Module) -> list[str]:
    """Names of parameters and floating buffers that hold a NaN or an infinity."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return [name for name, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]


def depth(backbone: nn.Module) -> int:
    """How many blocks (of a ResNet: stages) ``last_features`` can take."""
    if hasattr(backbone, "blocks"):
        return len(backbone.blocks)
    stages = getattr(backbone, "layers", None)
    return 4 if stages is None else sum(len(stage.blocks) for stage in stages)
