"""The journal of a run: ``journal.jsonl``, one JSON object a line, appended and flushed.

It is the truth; MLflow and the report are made from it.

Lines (every one has ``kind`` and ``time``, unix seconds)::

    {"kind": "journal", "id": ..., "part": n}                    heads each file
    {"kind": "step", "step": n, "values": {...}, "samples": ...} values: numbers, or lists (one number an expert)
    {"kind": "event", "name": ..., "step": n or null, ...}       faults, saves, resumes, warnings
    {"kind": "evaluation", "name": "knn", "step": n, "values": {...}}
    {"kind": "end", "status": "FINISHED" | "FAILED" | "KILLED"}

``step`` is the number of optimizer steps done. NaN and infinities are the strings "nan", "inf", "-inf" (JSON has none);
``moe_cl.tracking.tail.read`` turns them back. A full file is renamed ``journal.0001.jsonl``, ``.0002`` ...; when there
are more than ``keep`` of them the two oldest become one, with every second of their step lines (all else stays), so a
run of any length has a journal of bounded size.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from moe_cl.tracking import redact
from moe_cl.tracking.tail import header, lines, part_path, parts, read

__all__ = ["Journal", "NullJournal", "read"]

MAX_PENDING = 64 << 20  # bytes kept in memory while the disk refuses them


def _plain(value: Any) -> Any:
    """Numbers, 0-d and 1-d tensors and arrays as JSON values."""
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


class NullJournal:
    """What the ranks other than 0 hold: the same calls, nothing written."""

    id = ""

    def write(self, kind: str, **fields: Any) -> None:
        """A line of any kind."""

    def step(self, step: int, values: dict[str, Any], samples: str = "", **more: Any) -> None:
        """The scalars (and per-expert lists) of an optimizer step, and the digest of its sample ids."""
        self.write("step", step=step, values=values, samples=samples, **more)

    def event(self, name: str, step: int | None = None, **fields: Any) -> None:
        """Something that happened once. Credentials in its fields (of a URL that failed) are left out."""
        self.write("event", name=name, step=step, **redact.value("event", fields))

    def evaluation(self, name: str, step: int, values: dict[str, Any]) -> None:
        """Results of one evaluation."""
        self.write("evaluation", name=name, step=step, values=values)

    def sync(self) -> None:
        """Have the operating system put everything on the disk (a checkpoint calls it)."""

    def close(self, status: str | None = None) -> None:
        """End. ``status`` FINISHED, FAILED or KILLED is the run's; without it the run may go on later."""


class Journal(NullJournal):
    """Rank 0's journal. A call costs tens of microseconds and never raises: lines that the disk refuses are kept in
    memory and written when it takes them again.

    Args:
        path: ``OUT/journal.jsonl``.
        resume_step: continue an earlier journal after this many steps; lines of later steps are cut away, for they will
            be run again. None starts a new journal; one that lies there is kept as ``previous-journal.jsonl``.
        max_bytes: size at which a file is full. keep: full files kept.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None, max_bytes: int = 64 << 20, keep: int = 16):
        self.path, self.max_bytes, self.keep = Path(path), max_bytes, keep
        self._lock, self._pending, self._warned, self._lost = threading.RLock(), bytearray(), False, 0
        self._compaction: threading.Thread | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = parts(self.path)
        if resume_step is None:
            for part in found[:-1]:
                part.unlink()
            if found:
                found[-1].rename(self.path.with_name("previous-" + self.path.name))
            self.id, self._part = uuid.uuid4().hex, 1
        else:
            head = header(found[-1]) if found else {}
            self.id, self._part = head.get("id") or uuid.uuid4().hex, head.get("part", 1)
            if found and found[-1] != self.path:  # killed between two files: the one that is made now is the next
                self._part += 1
            reached = max((_cut(part, resume_step) for part in found), default=0)
        self._open()
        if resume_step is not None:
            # An earlier life came further: its steps are run again, and MLflow keeps the points it has of them.
            self.event("resume", step=resume_step, **({"repeats_to": reached} if reached > resume_step else {}))

    def _open(self) -> None:
        self._file = _appending(self.path)
        self._size = os.fstat(self._file).st_size
        if not self._size:
            self.write("journal", id=self.id, part=self._part)

    def write(self, kind: str, **fields: Any) -> None:
        line = {"kind": kind, "time": round(time.time(), 3), **fields}
        try:
            text = json.dumps(line, allow_nan=False, separators=(",", ":"))
        except (ValueError, TypeError):  # not finite, or a tensor
            text = json.dumps(_plain(line), separators=(",", ":"))
        with self._lock:
            if len(self._pending) > MAX_PENDING:
                self._lost += 1
                return
            self._pending += text.encode() + b"\n"
            self._flush()

    def _flush(self) -> None:
        try:
            while self._pending:
                written = os.write(self._file, self._pending)
                del self._pending[:written]
                self._size += written
            if self._size > self.max_bytes:
                self._rotate()
        except OSError as error:
            if not self._warned:
                print(f"journal: {self.path}: {error}; lines that it does not take wait in memory", file=sys.stderr)
            self._warned = True

    def _rotate(self) -> None:
        self._size = 0  # what fails here is tried again only after another max_bytes
        fresh = self.path.with_name(f".{self.path.name}.next")
        new = _appending(fresh)  # first: if this fails, the full file goes on
        try:
            if self.path.exists():  # else an earlier attempt came as far as here
                os.rename(self.path, part_path(self.path, self._part))
            os.rename(fresh, self.path)
        except OSError:
            os.close(new)
            raise
        old, self._file = self._file, new
        os.close(old)
        self._part += 1
        self.write("journal", id=self.id, part=self._part)
        if self._compaction is None or not self._compaction.is_alive():
            self._compaction = threading.Thread(target=_compact, args=(self.path, self.keep), daemon=True)
            self._compaction.start()

    def sync(self) -> None:
        with self._lock:
            self._flush()
            try:
                os.fsync(self._file)
            except OSError:
                self._warned = True  # the next write says what is wrong

    def close(self, status: str | None = None) -> None:
        if status is not None:
            self.write("end", status=status, lost=self._lost)
        if self._compaction is not None:
            self._compaction.join()
        self.sync()
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1


def _appending(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _cut(path: Path, step: int) -> int:
    """Drop the lines of later steps, the end of an earlier life and a torn last line; the last step there was."""
    data = path.read_bytes()
    kept, reached = bytearray(), 0
    for raw, line in lines(data):
        if line["kind"] == "step":
            reached = max(reached, line["step"])
        if line["kind"] != "end" and (line.get("step") is None or line["step"] <= step):
            kept += raw
    if len(kept) != len(data):
        replace(path, bytes(kept))
    return reached


def _compact(path: Path, keep: int) -> None:
    """While there are too many full files: the two oldest become one, every second step line gone."""
    try:
        while len(full := parts(path)[:-1]) > keep:
            first, second = full[:2]
            out = bytearray()
            heads = [header(first), header(second)]
            replaces = sorted({heads[0]["part"], *heads[0].get("replaces", []), *heads[1].get("replaces", [])})
            out += json.dumps({**heads[1], "replaces": replaces}).encode() + b"\n"
            count = 0
            for part in (first, second):
                for raw, line in lines(part.read_bytes()):
                    count += line["kind"] == "step"
                    if line["kind"] != "journal" and (line["kind"] != "step" or count % 2):
                        out += raw
            replace(second, bytes(out))  # from here on readers leave ``first`` out
            first.unlink()
    except OSError as error:
        print(f"journal: {path}: {error}; old files are not made smaller", file=sys.stderr)


def replace(path: Path, data: bytes) -> None:
    """All of it or nothing of it, also after a power cut. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
