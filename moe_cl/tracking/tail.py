"""Reading a journal: the whole of it, or its new lines again and again while the run writes it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NUMBERS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def part_path(path: Path, number: int) -> Path:
    """Name of the full file ``number`` of the journal ``path``."""
    return path.with_name(f"{path.stem}.{number:04d}{path.suffix}")


def header(path: Path) -> dict[str, Any]:
    """The first line of a journal file; {} if it has none."""
    try:
        with open(path, "rb") as file:
            for _, line in lines(file.readline()):
                return line if line["kind"] == "journal" else {}
    except OSError:
        pass
    return {}


def parts(path: str | Path) -> list[Path]:
    """The files of a journal in order, the one being written last (left out if it is not there)."""
    path = Path(path)
    pattern = re.compile(re.escape(path.stem) + r"\.(\d{4,})" + re.escape(path.suffix))
    full = {}
    if path.parent.is_dir():
        for entry in path.parent.iterdir():
            if match := pattern.fullmatch(entry.name):
                full[int(match[1])] = entry
    gone = {number for part in full.values() for number in header(part).get("replaces", [])}
    out = [full[number] for number in sorted(full) if number not in gone]
    return [*out, path] if path.exists() else out


def lines(data: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(raw line, its object) of each whole line; torn or foreign lines are passed over."""
    for raw in data.splitlines(keepends=True):
        if raw.endswith(b"\n"):
            try:
                line = json.loads(raw)
            except ValueError:
                continue
            if isinstance(line, dict) and "kind" in line:
                yield raw, line


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(v) for v in value]
        return _NUMBERS.get(value, value) if isinstance(value, str) else value

    return {key: one(value) for key, value in values.items()}


def _line(line: dict[str, Any]) -> dict[str, Any]:
    if isinstance(line.get("values"), dict):
        line["values"] = _numbers(line["values"])
    return line


def read(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a journal in order, full files included, also while a run writes it. [] if there is none."""
    return [_line(line) for part in parts(path) for _, line in lines(part.read_bytes())]


class Tail:
    """New lines of a journal, call by call, through its rotations."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: int | None = None
        self._part, self._rest, self._misses = 0, b"", 0

    def poll(self, limit: int = 4 << 20) -> list[dict[str, Any]]:
        """What was written since the last call, about ``limit`` bytes of it at most."""
        out: list[dict[str, Any]] = []
        while not out:
            if self._file is None and not self._next():
                break
            data = os.read(self._file, limit)
            if not data:
                if not self._next():
                    break
                continue
            whole, newline, rest = (self._rest + data).rpartition(b"\n")
            self._rest = rest
            out = [_line(line) for _, line in lines(whole + newline)]
        return out

    def _next(self) -> bool:
        """Open the first file, or the one after the file read to its end. False if there is none yet."""
        for path in parts(self.path):
            head = header(path)
            number = head.get("part", 0)
            if number <= self._part:
                continue
            # A file renamed while the folder was listed is missing from the list: look again rather than pass it over.
            self._misses += 1
            if self._part + 1 in (number, *head.get("replaces", [])) or self._misses > 10:
                return self._open(path, number)
            break
        return False

    def _open(self, path: Path, number: int) -> bool:
        if self._file is not None:
            if os.fstat(self._file).st_size > os.lseek(self._file, 0, os.SEEK_CUR):
                return True  # it grew after the last read and before it was full: read it to its end first
            os.close(self._file)
            self._file = None
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # renamed since it was listed: the next call finds it
            return False
        head = next((line for _, line in lines(os.pread(file, 4096, 0).partition(b"\n")[0] + b"\n")), {})
        if head.get("part") != number:  # another file has taken this name since
            os.close(file)
            return False
        self._file, self._part, self._rest, self._misses = file, number, b"", 0
        return True

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
        self._file = None
