"""Weights written by others: safetensors, torch files, DeepSpeed's own native-MoE checkpoints.

Nothing is unpickled freely: torch files go through the weights-only unpickler with argparse.Namespace as the only extra
class (published checkpoints carry one). DeepSpeed's optimizer files need more than that and are left alone.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moe_cl.config import ConfigError

_MODEL = "mp_rank_00_model_states.pt"
_EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
_EXPERT_KEY = re.compile(r"(.*)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")
_CLASS = re.compile(r"GLOBAL ([\w.]+)")
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_GATE = ".deepspeed_moe.gate.wg.weight"


def read_torch(path: Path) -> Any:
    """What a torch file holds, by the weights-only unpickler. Raises ConfigError for anything it refuses, and for a
    damaged file: torch does not look at the checksums of its archive (files from before torch 1.6 have none)."""
    try:
        if not (damaged := _damaged(path)):
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, *_UNREADABLE) as error:
        raise ConfigError(f"{path}: {_complaint(path, error)}") from None
    raise ConfigError(f"{path}: the file is damaged ({damaged} has another checksum); get it again")


def _complaint(path: Path, error: Exception) -> str:
    """Why a file was not read, never in torch's words where these recommend to read it with its code running."""
    reason = (str(error).splitlines() or ["it is empty"])[0]  # torch's EOFError says nothing
    if not isinstance(error, (OSError, EOFError)) and not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            if file.read(1) != b"\x80":
                reason = "it is neither an archive nor a pickle"
                error = ValueError()
    if isinstance(error, pickle.UnpicklingError):
        found = _CLASS.search(str(error))
        return f"not read, because it holds more than tensors and plain values{f' ({found[1]})' if found else ''}"
    if "weights_only" in reason:
        reason = "TorchScript is code; give a file of weights"
    return f"no readable torch file ({reason})"


def _damaged(path: Path) -> str | None:
    """The first member of the archive whose checksum is not its own; None for whole ones and other files."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def read_file(path: Path) -> dict[str, Tensor]:
    """A flat state dict from a .safetensors or torch file (its ``state_dict``, ``model`` or ``module`` if nested)."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: no readable safetensors file ({error})") from None
    tree = read_torch(path)
    for key in ("state_dict", "model", "module"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    return {name.removeprefix("module."): value for name, value in _state_dict(tree, path).items()}


def _state_dict(tree: Any, path: Path) -> dict[str, Tensor]:
    """``tree`` if it is tensors by name. Raises ConfigError."""
    if not isinstance(tree, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tree.items()):
        raise ConfigError(f"{path}: no state dict in it (a mapping from names to tensors); give a file of weights")
    return tree


def is_deepspeed(path: Path) -> bool:
    """True for a directory that DeepSpeed's ``save_checkpoint`` wrote, or one of its tags."""
    return (_tag(path) / _MODEL).is_file()


def _tag(path: Path) -> Path:
    latest = path / "latest"
    if (path / _MODEL).is_file() or not latest.is_file():
        return path
    try:
        name = latest.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return path
    # One of the directory's own folders, whatever the file says.
    return path / name if name != ".." and name.isprintable() and Path(name).name == name else path


def read_deepspeed(path: Path) -> dict[str, Tensor]:
    """Weights of a DeepSpeed checkpoint, its native MoE layers under our names.

    ``X.deepspeed_moe.gate.wg.weight`` (E, D) becomes ``X.router.weight`` (D, E); the experts' two linear layers,
    each expert in its own file, become the stacks ``X.experts.{w1,b1,w2,b2}``. Raises ConfigError if one is missing.
    """
    folder = _tag(path)
    tree = read_torch(folder / _MODEL)
    if not isinstance(tree, dict) or "module" not in tree:
        raise ConfigError(f"{folder}: no module weights in {_MODEL}; give a directory of DeepSpeed's save_checkpoint")
    state = _state_dict(tree["module"], folder / _MODEL)
    state = {name: value for name, value in state.items() if not _EXPERT_KEY.match(name)}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for file in sorted(folder.glob("layer_*_expert_*_mp_rank_00_model_states.pt")):
        if _EXPERT_FILE.fullmatch(file.name):
            for name, value in _state_dict(read_torch(file), file).items():
                found = _EXPERT_KEY.fullmatch(name)
                if found is None:
                    raise ConfigError(f"{file}: {name} is no expert's parameter")
                layer, expert, key = found.groups()
                experts.setdefault(layer, {}).setdefault(int(expert), {})[key] = value
    out = {}
    for name, value in state.items():
        if name.endswith(_GATE):
            if value.dim() != 2:
                raise ConfigError(
                    f"{folder}: {name} has shape {tuple(value.shape)}, a gate's weight is (experts, width)"
                )
            out[name.removesuffix(_GATE) + ".router.weight"] = value.t().contiguous()
        else:
            out[name] = value
    for layer, by_id in experts.items():
        count = len(out[f"{layer}.router.weight"].t()) if f"{layer}.router.weight" in out else max(by_id) + 1
        missing = sorted(set(range(count)) - set(by_id))
        if missing:
            raise ConfigError(f"{folder}: expert {missing[0]} of the {count} of {layer} is missing")
        if len(by_id) != count:
            raise ConfigError(f"{folder}: {layer} has files of {len(by_id)} experts, and a gate of {count}")
        out.update({f"{layer}.experts.{key}": value for key, value in _stack(folder, layer, by_id).items()})
    return out


def _stack(folder: Path, layer: str, by_id: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """w1 (E, H, D), b1 (E, H), w2 (E, D, H), b2 (E, D) from experts of two linear layers, whatever these are called."""
    first = by_id[0]
    weights = [key for key, value in first.items() if value.dim() == 2]
    if len(weights) != 2 or len(first) not in (2, 4):
        raise ConfigError(f"{folder}: an expert of {layer} has {', '.join(first)}; two linear layers can be read")
    names = {}
    for number, key in enumerate(weights, 1):
        names[f"w{number}"] = key
        bias = key.removesuffix("weight") + "bias"
        if bias in first:
            names[f"b{number}"] = bias
    out = {}
    for name, key in names.items():
        held = [by_id[e].get(key) for e in sorted(by_id)]
        shapes = [None if value is None else tuple(value.shape) for value in held]
        for expert, shape in zip(sorted(by_id), shapes, strict=True):
            if shape != shapes[0] or len(by_id[expert]) != len(first):
                raise ConfigError(
                    f"{folder}: {key} of {layer} is {shapes[0]} in expert 0 and {shape} in expert {expert}; "
                    "experts of one shape can be read"
                )
        out[name] = torch.stack(held)
    for number in (1, 2):
        out.setdefault(f"b{number}", torch.zeros(out[f"w{number}"].shape[:2]))
    return out
