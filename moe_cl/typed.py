"""Typed values from plain YAML: each field's annotation says its type and, where numbers mean something, their range.

``Annotated[int, Range(1)]`` is an int from 1; the names below are the ranges that settings use. A float is always
finite. What does not fit is a ConfigError of one line that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal


class ConfigError(ValueError):
    """A setting the user can mend; its text is one line that says what to change (exit code 2)."""


class OneRanksError(ConfigError):
    """What one rank alone may see, of itself: it says so, whichever of its host it is."""


@dataclass(frozen=True)
class Range:
    """``low <= value <= high``; ``above``/``below`` are the same without the end; ``length``: of a list, exactly."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    length: int | None = None

    def wrong(self, value: Any) -> str | None:
        """What is asked of ``value``, or None if it is met."""
        if isinstance(value, list):
            return None if len(value) == self.length else f"takes {self.length} numbers, found {len(value)}"
        if self.high is not None and value > self.high and self.low is not None:
            return f"lies between {_text(self.low)} and {_text(self.high)}"
        held = (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        if held:
            return None
        high = self.high if self.high is None or value > self.high or self.high <= GUARD else None
        asked = (("at least", self.low), ("above", self.above), ("at most", high), ("below", self.below))
        return "must be " + " and ".join(f"{word} {_text(end)}" for word, end in asked if end is not None)


GUARD = 1000  # ends above it only keep nonsense out; who is below the other end need not hear of them


def _text(end: float) -> str:
    return str(end) if isinstance(end, int) else f"{end:g}"


Count = Annotated[int, Range(1, 2**31 - 1)]
Natural = Annotated[int, Range(0, 2**31 - 1)]
Few = Annotated[int, Range(1, 4096)]  # layers, heads, threads: what is made one by one
Width = Annotated[int, Range(1, 2**20)]
Ratio = Annotated[float, Range(above=0, high=64)]
Seconds = Annotated[float, Range(0, 1e8)]
Positive = Annotated[float, Range(above=0)]
Amount = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]  # both ends are fine
Rate = Annotated[float, Range(0, below=1)]  # of drops, momenta of an optimizer: 1 would leave nothing
Pixels = Annotated[int, Range(1, 16384)]


def build(kind: type, tree: dict[str, Any], prefix: str = "") -> Any:
    """A dataclass of ``kind`` from a mapping, each value checked and converted. Raises ConfigError."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'recipe'}: expected a mapping, found {tree!r}")
    hints = _hints(kind)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise ConfigError(f"unknown key {prefix}{key}{nearest(key, list(hints))}")
        values[key] = convert(hints[key], value, prefix + key)
    return kind(**values)


@functools.lru_cache(maxsize=64)  # the annotations are text, evaluated anew at each call
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def convert(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the annotation ``kind`` asks for it; ``where`` is the key's name. Raises ConfigError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        value = convert(args[0], value, where)
        if text := args[1].wrong(value):
            raise ConfigError(f"{where} {value} {text}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(args, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}{nearest(value, args)}")
        return value
    if origin in (list, Sequence):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        return [convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, found {value!r}")
        return dict(value)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, where + ".")
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-4 as a string
        except (ValueError, OverflowError):
            raise ConfigError(f"{where}: expected float, found {value!r}") from None
        if not math.isfinite(number):
            raise ConfigError(f"{where} {number} must be a finite number")
        return number
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and isinstance(value, dict) and len(value) == 1:
        (name, rest), *_ = value.items()
        if isinstance(rest, (str, int, float)):
            return f"{name}: {rest}"  # text with a colon, which YAML without quotes takes for a mapping
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {kind.__name__}, found {value!r}")


def _one_of(kinds: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for option in sorted((a for a in kinds if a is not type(None)), key=lambda a: a is str):
        try:
            return convert(option, value, where)
        except ConfigError as error:
            errors.append(error)
    # Of several kinds, the complaint about a range says more than the one about a type.
    raise next((e for e in errors if "expected" not in str(e)), errors[0])


def nearest(name: Any, names: Sequence[Any]) -> str:
    """``; did you mean X?``, or nothing."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
