"""What differs between two checkpoints: tensors, and the numbers beside them (step counts, cursor, loss scale)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moe_cl.engine.checkpoint.format import Reader

OTHERWISE = ("extra.json/extra/mlflow_run",)  # who tracked a run is no part of its state


def differences(one: Reader, other: Reader, tolerance: float = 0.0) -> tuple[int, list[str]]:
    """Tensors of ``one`` (generators apart), and a line for everything that is not within ``tolerance``.

    Raises Damaged.
    """
    names = [{n for n in r.manifest.tensors if not n.startswith("rng/")} for r in (one, other)]
    out = [f"{name}: only in {one.path}" for name in sorted(names[0] - names[1])]
    out += [f"{name}: only in {other.path}" for name in sorted(names[1] - names[0])]
    for name in sorted(names[0] & names[1]):
        a, b = one.tensor(name), other.tensor(name)
        if a.shape != b.shape:
            out.append(f"{name}: {tuple(a.shape)} and {tuple(b.shape)}")
        elif not torch.equal(a, b):
            distance = (a.double() - b.double()).abs().max().item()
            if not distance <= tolerance:
                out.append(f"{name}: largest difference {distance:.3g}")
    for file in ("extra.json", "optimizer.json"):
        a, b = (dict(_leaves(_tree(r, file), file)) for r in (one, other))
        for key in sorted((a.keys() | b.keys()) - set(OTHERWISE)):
            if not _equal(a.get(key, ...), b.get(key, ...), tolerance):
                out.append(f"{key}: {' and '.join(_said(x, key) for x in (a, b))}")
    return len(names[0]), out


def _tree(reader: Reader, file: str) -> Any:
    return reader.json(file) if file in reader.manifest.files else {}


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if pairs is None or not tree:
        yield path, tree
        return
    for key, value in pairs:
        yield from _leaves(value, f"{path}/{key}")


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    if a == b or (a != a and b != b):
        return True
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    return numbers and isinstance(a, float) and isinstance(b, float) and abs(a - b) <= tolerance


def _said(leaves: dict[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else "nothing"
