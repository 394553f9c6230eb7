"""A checkpoint into a running set of student, optimizer, teacher and method, at whatever world, ep_size and stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moe_cl.comm import Comm
from moe_cl.config import ConfigError
from moe_cl.engine.checkpoint.format import Damaged, Reader
from moe_cl.engine.flat import FlatView, Placement, fill, local, placements
from moe_cl.engine.scaler import scaler_of

T = TypeVar("T")
MOMENTS = {"AdamW": {"exp_avg", "exp_avg_sq"}, "SGD": {"momentum_buffer"}, "LARS": {"mu"}}


def agreed(action: Callable[[], T], comm: Comm) -> T:
    """What ``action`` (which meets no other rank) gives; Damaged or ConfigError on all ranks if it is so on one."""
    out, complaint = None, None
    try:
        out = action()
    except ConfigError as error:
        complaint = isinstance(error, Damaged), str(error)
    for found in comm.gather_objects(complaint):
        if found:
            raise (Damaged if found[0] else ConfigError)(found[1])
    return out


def open_verified(path: Path, comm: Comm) -> Reader:
    """A reader of a checkpoint all of whose files are as the manifest says; hashing is dealt out over the ranks.

    Raises Damaged, or ConfigError for another format version; on every rank the same.
    """

    def open_mine() -> Reader:
        reader = Reader(path)
        reader.verify(sorted(reader.manifest.files)[comm.rank :: comm.world])
        reader.state(), reader.steps()
        return reader

    reader = agreed(open_mine, comm)
    reader.trust()
    return reader


def check_names(reader: Reader, kind: str, places: dict[str, tuple[int, ...]], allow: Iterable[str] = ()) -> None:
    """Every name on both sides with equal shapes, but for ``allow`` (missing in the checkpoint). Raises ConfigError."""
    there, allowed = set(reader.names(kind)), set(allow)
    missing = sorted(set(places) - there - allowed)
    extra = sorted(there - set(places))
    for what, names in (("lacks", missing), ("has, and this model does not,", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(
                f"{reader.path.name} {what} {kind} {', '.join(names[:3])}{more}: resume with the recipe that wrote it, "
                "or start anew from its weights with model.init_from"
            )
    for name in sorted(there & set(places)):
        shape = tuple(reader.manifest.tensors[f"{kind}/{name}"].shape)
        if shape != tuple(places[name]):
            raise ConfigError(
                f"{reader.path.name}: {kind} {name} has shape {shape}, this model {tuple(places[name])}: "
                "resume with the recipe that wrote it"
            )


@torch.no_grad()
def load_module(
    reader: Reader, kind: str, module: nn.Module, places: dict[str, Placement], skip: Iterable[str] = ()
) -> None:
    """Parameters (this rank's experts) and buffers of ``module``; strict but for ``skip``."""
    buffers = saved_buffers(module)
    shapes = {name: place.shape for name, place in places.items()}
    left = set(skip)
    check_names(reader, kind, shapes | {name: tuple(b.shape) for name, b in buffers.items()}, left)
    for name, p in module.named_parameters():
        if name not in left:
            at = places[name].start
            fill(p, lambda a, b, name=name, at=at: reader.flat(f"{kind}/{name}", at + a, at + b))
    for name, b in buffers.items():
        if name not in left:
            b.copy_(reader.tensor(f"{kind}/{name}"))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """What a checkpoint has of ``module``, which holds all experts and is not cut up; it may stand on meta tensors."""
    state = [*module.named_parameters(), *saved_buffers(module).items()]
    return {name: tuple(tensor.shape) for name, tensor in state}


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state (persistent ones)."""
    names = set(module.state_dict(keep_vars=True))
    return {name: b for name, b in module.named_buffers() if name in names}


@torch.no_grad()
def load_student(reader: Reader, view: FlatView, skip: Iterable[str] = ()) -> None:
    """Student, masters in the flat partitions included."""
    left = set(skip)
    load_module(reader, "student", view.module, view.places, left)
    if not view.zero:
        return
    for fragment in view.fragments:
        if fragment.name not in left:
            start = fragment.place.start + fragment.start
            view.master(fragment).copy_(reader.flat(f"student/{fragment.name}", start, start + fragment.size))


@torch.no_grad()
def refresh_masters(view: FlatView) -> None:
    """Masters from the model's parameters (after weights came from elsewhere)."""
    if view.zero:
        for fragment in view.fragments:
            start, held = local(fragment.param)
            view.master(fragment).copy_(held.reshape(-1)[fragment.start - start : fragment.stop - start])


def check_moments(reader: Reader, optimizer: str) -> set[str]:
    """The moments of an ``optimizer`` (its class or ``optim.name``). Raises ConfigError if the reader has others."""
    kinds = {name.split("/")[1] for name in reader.manifest.tensors if name.startswith("optimizer/")}
    mine = next((moments for name, moments in MOMENTS.items() if name.lower() == optimizer.lower()), kinds)
    if not kinds <= mine:
        raise ConfigError(
            f"{reader.path.name} has {', '.join(sorted(kinds))} of another optimizer: keep optim.name, or start anew"
        )
    return mine


def check_optimizer(reader: Reader, view: FlatView, strict: bool = True) -> None:
    """The checkpoint's optimizer state is of this optimizer and whole: every moment of a parameter, or none of them.

    strict: it also is of the parameters trained here, all of them. One without state (frozen so far) is written down as
    such since format version 2, so that no other can be missing.

    Raises:
        ConfigError: another optimizer, or another choice of what is trained.
        Damaged: state that no run has.
    """
    at, mine = reader.path.name, check_moments(reader, type(view.inner).__name__)
    steps, weights, trained = reader.steps(), set(reader.names("student")), view.trained()
    have = {kind: set(reader.names(f"optimizer/{kind}")) for kind in mine}
    saved = set().union(*have.values())
    for name in sorted(saved | set(steps)):
        lacks = [kind for kind in sorted(mine) if name in saved and name not in have[kind]]
        shapes = {reader.shape(f"optimizer/{kind}/{name}") for kind in mine if name in have[kind]}
        if name not in weights:
            raise Damaged(f"{at}: optimizer state of {name}, which is no parameter in it")
        if lacks or (name in saved and shapes != {reader.shape(f"student/{name}")}):
            raise Damaged(f"{at}: {f'no {lacks[0]}' if lacks else 'optimizer state of another shape'} of {name}")
    counted = {name for name, count in steps.items() if count is not None}
    if not counted <= saved or (counted and counted != saved):
        raise Damaged(f"{at}: optimizer state and step counts differ in {min(counted ^ saved)}")
    if strict and (other := sorted(saved - trained)):
        raise ConfigError(f"{at} trained {other[0]}, which is frozen here: resume with the recipe that wrote it")
    if strict and reader.manifest.version > 1 and (other := sorted(trained - saved - set(steps))):
        raise ConfigError(f"{at} did not train {other[0]}: resume with the recipe that wrote it")


@torch.no_grad()
def load_optimizer(reader: Reader, view: FlatView, skip: Iterable[str] = (), strict: bool = True) -> None:
    """Moments of every fragment; a name without state in the checkpoint (frozen so far) starts without.

    Raises as ``check_optimizer``, and ConfigError when a flat partition would mix step counts.
    """
    check_optimizer(reader, view, strict)
    kinds = sorted({name.split("/")[1] for name in reader.manifest.tensors if name.startswith("optimizer/")})
    steps = {name: count for name, count in reader.steps().items() if count is not None}
    left, have = set(skip), {kind: set(reader.names(f"optimizer/{kind}")) for kind in kinds}
    counts: dict[Tensor, float] = {}
    view.inner.state.clear()
    for fragment in view.fragments:
        holder = view.holder(fragment)
        if fragment.name in left:
            continue
        state = view.inner.state[holder]
        start = fragment.place.start + fragment.start
        for kind in kinds:
            if fragment.name in have[kind]:
                if kind not in state:
                    state[kind] = torch.zeros_like(holder, memory_format=torch.preserve_format)
                values = reader.flat(f"optimizer/{kind}/{fragment.name}", start, start + fragment.size)
                target = view.state(fragment)[kind]
                target.copy_(values.view(target.shape) if target.numel() == values.numel() else values)
        if fragment.name in steps:
            count = steps[fragment.name]
            if counts.setdefault(holder, count) != count:
                raise ConfigError(
                    f"{reader.path.name}: parameters with {counts[holder]:g} and {count:g} optimizer steps would share "
                    f"a partition ({fragment.name}): keep the recipe's parameter groups"
                )
            # Fused AdamW wants the count on the tensor's device, the others on the host.
            fused = view.settings(fragment).get("fused")
            state["step"] = torch.tensor(count, dtype=torch.float32, device=holder.device if fused else "cpu")
    for holder in [h for h, state in view.inner.state.items() if not state]:
        del view.inner.state[holder]
    if view.zero and not view.third:
        view.optimizer._hp_optimizer_states_linked = False  # its links point into the old state


@torch.no_grad()
def load_teacher(reader: Reader, teacher: nn.Module, view: FlatView, skip: Iterable[str] = ()) -> None:
    """Teacher parameters (this rank's experts) and buffers."""
    load_module(reader, "teacher", teacher, placements(teacher, view.comm), skip)


@torch.no_grad()
def load_method(reader: Reader, method: nn.Module, skip: Iterable[str] = ()) -> None:
    """Queue, pointer, centres."""
    load_module(reader, "method", method, {}, skip)


def load_engine(engine: Any, state: dict[str, Any]) -> None:
    """Counters and loss scale."""
    for name, value in state["counters"].items():
        setattr(engine, name, value)
    if hasattr(engine, "micro_steps"):
        # Another world has another accumulation: what counts is that the next micro-batch opens a step.
        engine.micro_steps = state["counters"]["global_steps"] * engine.gradient_accumulation_steps()
    scaler = scaler_of(engine)
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
