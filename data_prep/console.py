"""What a person sees: a bar on a terminal, a line now and then elsewhere, tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

PLAIN_SECONDS = 30.0  # between two lines where stderr is no terminal


class Progress:
    """Counts up to ``total`` on stderr: a rich bar on a terminal, else a line every 30 seconds. A context manager."""

    def __init__(self, what: str, total: int, unit: str = ""):
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._start = self._said = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
            rate = TextColumn("{task.fields[rate]}")
            self._bar = Bar(*columns, rate, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(what, total=total, rate="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """``count`` more are done."""
        self.set(self._done + count)

    def set(self, done: int) -> None:
        """``done`` are done."""
        self._done = done
        now = time.monotonic()
        rate = f"{done / max(now - self._start, 1e-9):,.0f}/s"
        if self._bar:
            self._bar.update(self._task, completed=done, rate=rate)
        elif now - self._said >= PLAIN_SECONDS:
            self._said = now
            print(f"{self._what}: {done:,} of {self._total:,} {self._unit} ({rate})", file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A table on stdout; numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    out = Table(title=title or None, title_justify="left")
    rows = [[f"{c:,}" if isinstance(c, int) and not isinstance(c, bool) else str(c) for c in row] for row in rows]
    for i, name in enumerate(head):
        digits = bool(rows) and all(row[i][:1].isdigit() for row in rows)
        out.add_column(name, justify="right" if digits else "left", overflow="fold")
    for row in rows:
        out.add_row(*row)
    width = None if sys.stdout.isatty() else 120
    Console(width=width).print(out)


def note(text: str) -> None:
    """One line for the person, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def byte_text(count: int) -> str:
    """``123456789`` -> ``123.5 MB``."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
