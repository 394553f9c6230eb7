"""A checkpoint into a running set of student, optimizer, teacher and method, at whatever world, ep_size and stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moe_cl.config import ConfigError
from moe_cl.engine.checkpoint.format import Reader
from moe_cl.engine.flat import FlatView, Placement, fill, local, placements
from moe_cl.engine.scaler import scaler_of


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
    for name in there & set(places):
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


@torch.no_grad()
def load_optimizer(reader: Reader, view: FlatView, steps: dict[str, float], skip: Iterable[str] = ()) -> None:
    """Moments of every fragment; a name without state in the checkpoint (frozen so far) starts without.

    Raises ConfigError when the checkpoint's optimizer is another one, or a flat partition would mix step counts.
    """
    kinds = sorted({name.split("/")[1] for name in reader.manifest.tensors if name.startswith("optimizer/")})
    known = {"AdamW": {"exp_avg", "exp_avg_sq"}, "SGD": {"momentum_buffer"}, "LARS": {"mu"}}
    mine = known.get(type(view.inner).__name__)
    if mine is not None and not set(kinds) <= mine:
        raise ConfigError(
            f"{reader.path.name} has {', '.join(kinds)} of another optimizer: keep optim.name, or start anew"
        )
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
