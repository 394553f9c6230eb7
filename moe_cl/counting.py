"""Long work that counts up: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
PLAIN_SECONDS = 30.0  # between two lines where stderr is no terminal


class Counting:
    """Counts up to ``total`` (None: nobody knows) on stderr: a rich bar on a terminal, else a line every 30 seconds.

    A context manager. Inside another one it is silent: a terminal has room for one bar.
    """

    _shown = 0  # how many are open, one inside the other

    def __init__(self, what: str, total: int | None, unit: str = ""):
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._start = self._said = time.monotonic()
        self._bar = None
        self._silent = Counting._shown > 0
        if sys.stderr.isatty() and not self._silent:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
            rate = TextColumn("{task.fields[rate]}")
            self._bar = Bar(*columns, rate, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(what, total=total, rate="")

    def __enter__(self) -> Counting:
        Counting._shown += 1
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        Counting._shown -= 1
        if self._bar:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """``count`` more are done."""
        self.set(self._done + count)

    def set(self, done: int) -> None:
        """``done`` are done."""
        self._done = done
        now = time.monotonic()
        speed = done / max(now - self._start, 1e-9)
        rate = f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2g}/s"
        if self._bar:
            self._bar.update(self._task, completed=done, rate=rate)
        elif now - self._said >= PLAIN_SECONDS and not self._silent:
            self._said = now
            whole = "" if self._total is None else f" of {self._total:,}"
            print(f"{self._what}: {done:,}{whole} {self._unit} ({rate})", file=sys.stderr, flush=True)


def counted(
    items: Iterable[T], what: str, unit: str, *, total: int | None = None, show: bool = True,
    size: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:  # fmt: skip
    """``items``, counted when the next one is asked for. ``size``: what one of them adds. ``show``: on this rank."""
    if not show:
        yield from items
        return
    with Counting(what, total if total is not None or not hasattr(items, "__len__") else len(items), unit) as bar:
        for item in items:
            yield item
            bar.advance(size(item))
