"""What a conformance run is made of: golden files that know which arrays were used, and rows of comparisons."""

from __future__ import annotations

import fnmatch
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Golden(Mapping[str, Any]):
    """Arrays (or JSON values) of one file by name; remembers what was asked for."""

    def __init__(self, path: Path):
        self.path = path
        self._arrays = json.loads(path.read_text()) if path.suffix == ".json" else np.load(path, allow_pickle=False)
        self.names = list(self._arrays)
        self._known, self.used = set(self.names), set()

    def __getitem__(self, name: str) -> Any:
        value = self._arrays[name]
        self.used.add(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def under(self, prefix: str) -> dict[str, Any]:
        """All arrays whose name starts with ``prefix``, without it; they count as used."""
        return {k.removeprefix(prefix): self[k] for k in self if k.startswith(prefix)}

    def cases(self, pattern: str) -> list[str]:
        """Distinct values of the first group of ``pattern`` over all names, in order."""
        found = (re.match(pattern, name) for name in self)
        return list(dict.fromkeys(m[1] for m in found if m))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """An array as a tensor of its own memory."""
        out = torch.from_numpy(np.array(self[name]))
        return out if dtype is None else out.to(dtype)

    def sibling(self, name: str) -> Golden:
        """Another file of the same folder."""
        return Golden(self.path.with_name(f"{name}.npz"))

    def skip(self, *names: str) -> None:
        """Inputs of the published run that nothing is computed from here."""
        self.used.update(n for n in names if n in self)


@dataclass
class Row:
    """One comparison."""

    file: str
    case: str
    quantity: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """NaN fails."""
        return bool(self.error <= self.tolerance)


@dataclass
class Report:
    """Rows of one file."""

    file: str
    rows: list[Row] = field(default_factory=list)

    def close(
        self,
        case: str,
        quantity: str,
        got: Any,
        want: Any,
        tolerance: float,
        absolute: bool = False,
        floor: float = 1e-3,
    ) -> None:
        """Largest difference, relative to the largest |want| unless ``absolute``; shapes must agree.

        ``floor``: smallest scale; some tensors are zero by maths (a mean after a batch norm) and hold float noise.
        """
        got = np.asarray(got.detach() if isinstance(got, Tensor) else got, dtype=np.float64)
        want = np.asarray(want, dtype=np.float64)
        if got.shape != want.shape:
            self.rows.append(Row(self.file, case, quantity, np.inf, tolerance, f"{got.shape} for {want.shape}"))
            return
        error = float(np.max(np.abs(got - want), initial=0.0))
        if not absolute:
            error /= max(float(np.max(np.abs(want), initial=0.0)), floor)
        self.rows.append(Row(self.file, case, quantity, error, tolerance))

    def same(self, case: str, quantity: str, got: Any, want: Any) -> None:
        """Equal: the error is the share of entries that differ."""
        got, want = np.asarray(got), np.asarray(want)
        same_shape = got.shape == want.shape
        error = float(np.mean(got != want)) if same_shape and got.size else float(not same_shape)
        self.rows.append(Row(self.file, case, quantity, error, 0.0))

    def each(
        self, case: str, quantity: str, got: Mapping[str, Any], want: Mapping[str, Any], tolerance: float, **more: Any
    ) -> None:
        """One row for many tensors: the worst of them, named; a missing one fails."""
        sub = Report(self.file)
        for name, value in want.items():
            if name in got:
                sub.close(case, quantity, got[name], value, tolerance, **more)
                sub.rows[-1].note = sub.rows[-1].note or name
            else:
                sub.rows.append(Row(self.file, case, quantity, np.inf, tolerance, f"{name} is missing"))
        if not sub.rows:
            sub.rows.append(Row(self.file, case, quantity, np.inf, tolerance, "nothing to compare"))
        worst = max(sub.rows, key=lambda r: np.inf if np.isnan(r.error) else r.error)
        worst.note = f"{len(sub.rows)} tensors, worst {worst.note}" if worst.ok else worst.note
        self.rows.append(worst)


Check = Callable[[Golden, Report], None]


def run(folder: Path, checks: Mapping[str, Check], only: str = "*") -> list[Row]:
    """All rows of the files in ``folder``; a file or an array that no check used is a row that fails.

    ``only``: FILE or FILE/CASE, each a glob or a part of the name.
    """
    rows: list[Row] = []
    of_file, _, of_case = only.partition("/")
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".npz", ".json"):
            continue
        if not _fits(path.stem, of_file):
            continue
        report = Report(path.stem)
        golden = Golden(path)
        check = next((fn for name, fn in checks.items() if fnmatch.fnmatch(path.stem, name)), None)
        if check is None:
            report.rows.append(Row(path.stem, "-", "file", np.inf, 0.0, "no check knows this file"))
        else:
            try:
                check(golden, report)
            except Exception:
                report.rows.append(Row(path.stem, "-", "run", np.inf, 0.0, traceback.format_exc(limit=-3)))
            for name in golden:
                if name not in golden.used:
                    report.rows.append(Row(path.stem, name, "array", np.inf, 0.0, "was not compared"))
        rows += [r for r in report.rows if _fits(r.case, of_case)]
    return rows


def _fits(name: str, pattern: str) -> bool:
    """``pattern`` is a glob or a part of ``name``."""
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"*{pattern}*")
