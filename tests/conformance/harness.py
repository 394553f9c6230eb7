"""What a conformance run is made of: golden files that know which arrays were used, and rows of comparisons."""

from __future__ import annotations

import fnmatch
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
PLAIN = {".md", ".txt"}  # what may lie beside golden files


class Golden(Mapping[str, Any]):
    """Arrays (or JSON values) of one file by name; remembers which were read."""

    def __init__(self, path: Path):
        self.path = path
        if path.suffix == ".json":
            self._arrays: Mapping[str, Any] = json.loads(path.read_text())
        else:
            with np.load(path, allow_pickle=False) as z:
                self._arrays = dict(z)
        self.names, self.used = list(self._arrays), set()

    def __getitem__(self, name: str) -> Any:
        value = self._arrays[name]
        self.used.add(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def under(self, prefix: str) -> Part:
        """The arrays whose name starts with ``prefix``, by the rest of it."""
        return Part(self, prefix)

    def cases(self, pattern: str) -> list[str]:
        """Distinct values of the first group of ``pattern`` over all names, in order."""
        found = (re.match(pattern, name) for name in self)
        return list(dict.fromkeys(m[1] for m in found if m))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """An array as a tensor of its own memory."""
        out = torch.from_numpy(np.array(self[name]))
        return out if dtype is None else out.to(dtype)

    def sibling(self, name: str, end: str) -> Golden:
        """File ``name`` of the same folder: the one with this file's ``end`` if there is one."""
        for path in (self.path.with_name(f"{name}{end}.npz"), self.path.with_name(f"{name}.npz")):
            if path.exists():
                return type(self)(path)
        raise FileNotFoundError(f"{self.path.name} holds results on the arrays of {name}.npz: put that file beside it")


class Part(Mapping[str, Any]):
    """Arrays of a file below a prefix. Only what is read counts as used: an array that nobody asks for is reported."""

    def __init__(self, whole: Golden, prefix: str):
        self._whole, self._prefix = whole, prefix
        self._names = [n.removeprefix(prefix) for n in whole if n.startswith(prefix)]

    def __getitem__(self, name: str) -> Any:
        return self._whole[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._whole


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
    """Rows of one file; ``assumed``: what the file does not say and the specification does."""

    file: str
    rows: list[Row] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def assume(self, z: Mapping[str, Any], name: str, default: T) -> T:
        """The file's ``name``; where it has none the specification's value, and every row of the file says so."""
        if name in z:
            return type(default)(np.asarray(z[name]).item())
        self.suppose(f"{name} {default:g}")
        return default

    def suppose(self, what: str) -> None:
        """Rows of this file carry ``what``: the file does not say it."""
        if what not in self.assumed:
            self.assumed.append(what)

    def fit(self, name: str, candidates: Sequence[T], error: Callable[[T], float], good: float) -> T:
        """What no array says but the arrays decide: the first of ``candidates`` with an error below ``good``, or the
        one with the least. The specification's value comes first."""
        best, least = candidates[0], np.inf
        for candidate in candidates:
            if (off := error(candidate)) < least:
                best, least = candidate, off
            if least < good:
                break
        self.suppose(f"{name} {best:g} fits")
        return best

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


class Check(NamedTuple):
    """``run`` compares one file; ``form``: patterns each of which the name of some array of such a file matches."""

    run: Callable[[Golden, Report], None]
    form: tuple[str, ...]


def find(golden: Golden, checks: Mapping[str, Check]) -> Check | None:
    """The check for a file: by the names of its arrays; failing that by its own name, as far as it is a check's."""
    for check in checks.values():
        if all(any(re.search(pattern, name) for name in golden) for pattern in check.form):
            return check
    names = [name for name in checks if golden.path.stem.startswith(name)]
    return checks[max(names, key=len)] if names else None


def run(folder: Path, checks: Mapping[str, Check], only: str = "*") -> list[Row]:
    """All rows of the files in ``folder`` and below; a file or an array that no check used is a row that fails.

    ``only``: FILE or FILE/CASE, each a glob or a part of the name.
    """
    rows: list[Row] = []
    of_file, _, of_case = only.partition("/")
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        label = path.relative_to(folder).with_suffix("").as_posix()
        if _fits(path.stem, of_file):
            rows += [r for r in rows_of(path, label, checks) if _fits(r.case, of_case)]
    return rows


def rows_of(path: Path, label: str, checks: Mapping[str, Check]) -> list[Row]:
    """The comparisons of one file."""
    if path.suffix in PLAIN:
        return [Row(label, "-", "file", 0.0, 0.0, f"{path.name} is text: nothing to compare")]
    if path.suffix not in (".npz", ".json"):
        return [Row(label, "-", "file", np.inf, 0.0, f"{path.name} is neither .npz nor .json: not compared")]
    report = Report(label)
    try:
        golden = Golden(path)
    except Exception as error:
        return [Row(label, "-", "file", np.inf, 0.0, f"{path.name} cannot be read: {error}")]
    check = find(golden, checks)
    if check is None:
        return [Row(label, "-", "file", np.inf, 0.0, "no check knows this file")]
    try:
        check.run(golden, report)
    except Exception:
        report.rows.append(Row(label, "-", "run", np.inf, 0.0, traceback.format_exc(limit=-3)))
    if report.assumed:
        said = "the file does not say: " + ", ".join(report.assumed)
        for row in report.rows:
            row.note = f"{row.note}; {said}" if row.note else said
    unused = [name for name in golden if name not in golden.used]
    return report.rows + [Row(label, name, "array", np.inf, 0.0, "was not compared") for name in unused]


def whole(value: float) -> int:
    """A count that a file holds as a real number. Raises ValueError for one that is none."""
    if value != round(value):
        raise ValueError(f"{value} is no count")
    return int(value)


def _fits(name: str, pattern: str) -> bool:
    """``pattern`` is a glob or a part of ``name``."""
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"*{pattern}*")
