"""``model.init_from``: a run that starts from another's weights (EsViT's V -> V+R, sparse upcycling, a converted file).

From a checkpoint, parameters known to both keep their optimizer state and the schedules go on from its step; new heads
start fresh, with step counts of their own. From a file of weights the run starts at step 0, and so it does where the
dense blocks of a checkpoint become experts. Every key is accounted for: a backbone tensor on one side only, or of
another shape, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_cl.config import ConfigError
from moe_cl.engine.checkpoint import foreign, restore, store
from moe_cl.engine.checkpoint.format import MANIFEST, Damaged, Reader
from moe_cl.engine.checkpoint.report import Report
from moe_cl.engine.flat import FlatView, Placement, fill, local, placements

if TYPE_CHECKING:
    from moe_cl.models import upcycle

_EXPERT = re.compile(r"backbone\.blocks\.(\d+)\.mlp\.experts\.")


def checkpoint_at(path: Path) -> Path | None:
    """The checkpoint that ``path`` is, or the newest one of the run it is; None for anything else."""
    return path if (path / MANIFEST).is_file() else store.latest_complete(path)


def fresh_names(path: str | Path | None, names: Iterable[str]) -> list[str]:
    """Which of the student's ``names`` a checkpoint at ``path`` has no past for (for ``optim.param_groups``)."""
    found = checkpoint_at(Path(path)) if path else None
    if found is None:
        return []
    reader, names = Reader(found), list(names)
    known, late = set(reader.names("student")), set(reader.state().get("fresh") or ())
    # Without new ones, those that started late there keep a group, and step counts, of their own here too.
    return [name for name in names if name not in known] or [name for name in names if name in late]


def read_weights(path: Path) -> dict[str, Tensor]:
    """A student's state dict from a file or a DeepSpeed directory; a bare backbone gets its ``backbone.`` prefix."""
    if path.is_dir():
        if not foreign.is_deepspeed(path):
            raise ConfigError(f"model.init_from={path}: no complete checkpoint there")
        state = foreign.read_deepspeed(path)
    elif path.is_file():
        state = foreign.read_file(path)
    else:
        raise ConfigError(f"model.init_from={path}: no such file or directory")
    for prefix in ("student.", "encoder."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if not any(name.startswith("backbone.") for name in state):
        state = {f"backbone.{name}": value for name, value in state.items()}
    return state


def check(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Something to start from is at ``path`` and can be read: its student's tensors and their shapes. Raises
    ConfigError."""
    found = checkpoint_at(Path(path))
    if found is None:
        return {name: tuple(value.shape) for name, value in read_weights(Path(path)).items()}
    try:
        reader = Reader(found)
        return {name: reader.shape(f"student/{name}") for name in reader.names("student")}
    except Damaged as error:
        raise ConfigError(f"model.init_from: checkpoint {error}; take another") from None


def check_network(path: str | Path, there: Mapping[str, tuple[int, ...]], student: nn.Module, optimizer: str) -> None:
    """``init_from`` will find in these tensors of a student experts in the same blocks, the same backbone, and the
    state of this optimizer (``optim.name``). ``student``: all experts, maybe on meta tensors. Raises ConfigError."""
    check_experts(path, there, student)
    dense, found = _becomes_sparse(student, there), checkpoint_at(Path(path))
    _compare(there, restore.shapes(student), "student", path, dense)
    if found is not None and not dense:
        restore.check_moments(Reader(found), optimizer)


def check_experts(path: str | Path, names: Iterable[str], student: nn.Module) -> None:
    """A student of these tensors is dense, or has experts in the blocks where this one has them; nothing makes some of
    the blocks only. ``student`` may stand on meta tensors. Raises ConfigError."""
    from moe_cl.models.vit import Mlp, ViT

    theirs = sorted({int(found[1]) for name in names if (found := _EXPERT.match(name))})
    backbone = getattr(student, "backbone", None)
    if not theirs or not isinstance(backbone, ViT):
        return
    mine = [i for i, block in enumerate(backbone.blocks) if not isinstance(block.mlp, Mlp)]
    if mine != theirs:
        raise ConfigError(
            f"model.init_from={path} has experts in the blocks {theirs}, this run in {mine or 'none'}: they are made"
            f" in a wholly dense network only; set moe.blocks={theirs}, or start from one without experts"
        )


@torch.no_grad()
def init_from(path: str | Path, view: FlatView, teacher: nn.Module | None, method: nn.Module | None) -> Report:
    """Weights into fresh modules; from a checkpoint optimizer state, teacher and method too. Raises ConfigError."""
    found = view.comm.gather_objects(checkpoint_at(Path(path)))[0]  # its run may be writing and deleting still
    dense = found is not None and _becomes_sparse(view.module, Reader(found).names("student"))
    if found is not None and not dense:
        return _from_checkpoint(found, view, teacher, method)
    state = _student_of(found, view) if dense else read_weights(Path(path))
    made = _upcycle(view.module, state)
    report = _load(state, "student", view.module, view.places, Path(path), made is not None)
    if made is not None:
        report.loaded += [f"backbone.{name}" for name in made.copied + made.experts]
        report.fresh += [f"backbone.{name}" for name in made.fresh]
    restore.refresh_masters(view)
    if teacher is not None:
        _copy(view.module, teacher, [name for name, _ in teacher.named_parameters()])
    return report


def _from_checkpoint(path: Path, view: FlatView, teacher: nn.Module | None, method: nn.Module | None) -> Report:
    try:
        reader = restore.open_verified(path, view.comm)
        return restore.agreed(lambda: _go_on(reader, view, teacher, method), view.comm)
    except Damaged as error:
        raise ConfigError(f"model.init_from: checkpoint {error}; take another") from None


def _go_on(reader: Reader, view: FlatView, teacher: nn.Module | None, method: nn.Module | None) -> Report:
    report = _load(reader.tree("student"), "student", view.module, view.places, reader.path)
    restore.refresh_masters(view)
    restore.load_optimizer(reader, view, report.fresh, strict=False)
    if teacher is not None:
        theirs, places = reader.tree("teacher") or reader.tree("student"), placements(teacher, view.comm)
        part = report.others["teacher"] = _load(theirs, "teacher", teacher, places, reader.path)
        _copy(view.module, teacher, part.fresh)
    if method is not None:
        report.others["method"] = _load_method(reader.tree("method"), method)
    report.others["optimizer"] = _moments(reader, view)
    report.extra = reader.state()["extra"]
    return report


def _load_method(state: dict[str, Tensor], method: nn.Module) -> Report:
    """Queue, pointer and centres of the same shape; another's starts fresh, and the report says so."""
    report = Report([], [], [])
    for name, buffer in method.named_buffers():
        if name not in state:
            report.fresh.append(name)
        elif state[name].shape != buffer.shape:
            report.fresh.append(f"{name} ({tuple(state[name].shape)} there, {tuple(buffer.shape)} here)")
        else:
            buffer.copy_(state[name])
            report.loaded.append(name)
    report.unused = [name for name in state if name not in dict(method.named_buffers())]
    return report


def _moments(reader: Reader, view: FlatView) -> Report:
    """Which trained parameters go on with their optimizer state."""
    names = {name.split("/", 2)[2] for name in reader.manifest.tensors if name.startswith("optimizer/")}
    trained = view.trained()
    return Report(sorted(trained & names), sorted(trained - names), sorted(names - trained))


def _load(
    state: dict[str, Tensor], kind: str, module: nn.Module, places: dict[str, Placement], path: Path, done: bool = False
) -> Report:
    """Copy full tensors (this rank's experts) by name; backbone keys match on both sides, or are ``done`` already."""
    buffers = restore.saved_buffers(module)
    mine = {**{name: place.shape for name, place in places.items()}, **{n: tuple(b.shape) for n, b in buffers.items()}}
    if done:
        state = {name: value for name, value in state.items() if not name.startswith("backbone.")}
    loaded, fresh, unused = _compare({n: tuple(x.shape) for n, x in state.items()}, mine, kind, path, done)
    for name, p in module.named_parameters():
        if name in state:
            at, flat = places[name].start, state[name].reshape(-1)
            fill(p, lambda a, b, at=at, flat=flat: flat[at + a : at + b])
    for name, b in buffers.items():
        if name in state:
            b.copy_(state[name])
    return Report(loaded, [n for n in fresh if not (done and n.startswith("backbone."))], unused, upcycled=done)


def _compare(
    there: Mapping[str, tuple[int, ...]], mine: Mapping[str, tuple[int, ...]], kind: str, path: str | Path, done: bool
) -> tuple[list[str], list[str], list[str]]:
    """Names on both sides, here alone and there alone. Raises ConfigError: another backbone (unless ``done``: its
    tensors are made another way), or another shape."""
    fresh, unused = [n for n in mine if n not in there], [n for n in there if n not in mine]
    strict = [] if done else [n for n in (*fresh, *unused) if n.startswith("backbone.")]
    if strict:
        side = "lacks" if strict[0] in fresh else "has, and this model does not,"
        raise ConfigError(
            f"model.init_from={path} {side} {kind} {strict[0]} ({len(strict)} backbone tensors differ): "
            "use the backbone (model, moe) it was made with"
        )
    loaded = [n for n in mine if n in there]
    for name in loaded:
        if there[name] != tuple(mine[name]):
            raise ConfigError(
                f"model.init_from={path}: {kind} {name} has shape {there[name]}, this model {tuple(mine[name])}: "
                "use the settings it was made with"
            )
    return loaded, fresh, unused


def _student_of(path: Path, view: FlatView) -> dict[str, Tensor]:
    """The student's full tensors in a checkpoint. Raises ConfigError."""
    try:
        return restore.open_verified(path, view.comm).tree("student")
    except Damaged as error:
        raise ConfigError(f"model.init_from: checkpoint {error}; take another") from None


def _becomes_sparse(student: nn.Module, names: Iterable[str]) -> bool:
    """True if a student with these tensors is dense where this one has experts."""
    from moe_cl.models import upcycle
    from moe_cl.models.vit import ViT

    backbone = getattr(student, "backbone", None)
    dense = {name.removeprefix("backbone.") for name in names if name.startswith("backbone.")}
    return isinstance(backbone, ViT) and upcycle.can_upcycle(backbone, dense)


def _upcycle(student: nn.Module, state: dict[str, Tensor]) -> upcycle.Report | None:
    """Experts from a dense backbone, where the file is one and the model has experts; else None."""
    from moe_cl.models import upcycle

    if not _becomes_sparse(student, state):
        return None
    dense = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    return upcycle.upcycle(student.backbone, dense)


def _copy(student: nn.Module, teacher: nn.Module, names: Iterable[str]) -> None:
    source = dict(student.named_parameters())
    own = dict(teacher.named_parameters())
    for name in names:
        if name in own and name in source:
            start, held = local(source[name])
            mine = local(own[name])[1]
            mine.copy_(held)
            if own[name].numel() == source[name].numel():
                own[name].data.copy_(source[name].data)
