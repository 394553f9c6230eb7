"""What a person sees while it runs: a rich bar on a terminal, plain lines in a log file; banner and tables.

Rank 0 alone makes one; the others use ``enabled=False``.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import psutil
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

DATA_WAIT = 0.2  # share of the time above which the user is told what to do
WINDOW = 20  # steps over which it is judged: one slow read says nothing
START = 5  # first steps, which always wait, left out
ADVICE = (
    "{share:.0%} of the time goes to waiting for data: raise data.workers (while processors are free), "
    "data.prefetch, or store smaller images; `python -m moe_cl doctor` measures the reader"
)


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"; 125 -> "2:05"."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def count(number: float) -> str:
    """12345678 -> "12.3M"."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def memory_gib() -> float:
    """Resident memory of this process and its workers, GiB (pages that they share are counted once a process)."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.Error:  # ended since it was listed
            continue
    return total / 2**30


class Progress:
    """Progress over ``total`` steps.

    Args:
        total: steps of the whole run. start: steps done before this start (resume); they do not count for the ETA.
        plain_seconds: without a terminal, one line every so many seconds. every: and every so many steps; 0 = not.
        what: shown in front. unit: what is counted. stream: default stdout. enabled: False prints nothing.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        plain_seconds: float = 30.0,
        *,
        every: int = 0,
        what: str = "pretrain",
        unit: str = "step",
        stream: TextIO | None = None,
        enabled: bool = True,
    ):
        self.total, self.start, self.what, self.unit = total, start, what, unit
        self.plain_seconds, self.every, self.enabled = plain_seconds, every, enabled
        self._waits: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # (share, seconds of the step) of each step
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # (seconds an image, share) for the line
        self._stream = stream or sys.stdout
        self._begin = self._last = time.monotonic()
        self._memory, self._memory_time, self._advised, self._bar = 0.0, 0.0, False, None
        self._step, self._values = start, {}
        self._count, self._time, self._waiting = 0, 0.0, 0.0  # steps, their seconds and waits in units of a batch
        if enabled and self._stream.isatty():
            # On a narrow terminal the bar gives way, not the numbers.
            text = TextColumn("[bold]{task.description}[/] {task.completed:.0f}/{task.total:.0f}  {task.fields[line]}")
            columns = (SpinnerColumn(), text, BarColumn(bar_width=None, table_column=Column(ratio=1)))
            self._bar = Bar(*columns, console=Console(file=self._stream), refresh_per_second=4, expand=True)
            self._task = self._bar.add_task(what, total=total, completed=start, line="")
            self._bar.start()

    def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
        """``step`` steps are done. ``values``, each if known: ``loss``, ``images_per_second``, ``data_wait`` (share of
        the time, 0 to 1), ``memory_gib`` (else this machine's own), and others, printed as they are."""
        if not self.enabled:
            return
        values = dict(values or {})
        self._step, self._values = step, values
        self._weigh(values)
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=self.line(now))
        elif now - self._last >= self.plain_seconds or step == self.total or (self.every and step % self.every == 0):
            self._last = now
            self.say(f"{self.what} {self.unit} {step}/{self.total} ({step / max(1, self.total):.1%})  {self.line(now)}")
        if "data_wait" in values and step - self.start > START:
            self._waits.append((values["data_wait"], 1.0 / max(values.get("images_per_second", 1.0), 1e-9)))
            share = self.data_wait()
            if len(self._waits) == WINDOW and share > DATA_WAIT and not self._advised:
                self._advised = True
                self.say("data wait: " + ADVICE.format(share=share))

    def _weigh(self, values: Mapping[str, Any]) -> None:
        """One step more for ``images`` and ``waited``: means over the time, not over the steps."""
        if (rate := values.get("images_per_second", 0.0)) > 0:
            self._recent.append((1 / rate, values.get("data_wait", 0.0)))
            self._count += 1
            self._time += 1 / rate
            self._waiting += values.get("data_wait", 0.0) / rate

    @property
    def images(self) -> float:
        """Images a second over all steps of this start, pauses between steps left out; 0 before the first."""
        return self._count / self._time if self._count else 0.0

    @property
    def waited(self) -> float:
        """Share of that time that waited for data."""
        return self._waiting / self._time if self._count else 0.0

    def data_wait(self) -> float:
        """Share of the time of the last ``WINDOW`` steps that waited for data."""
        seconds = sum(s for _, s in self._waits)
        return sum(share * s for share, s in self._waits) / seconds if seconds else 0.0

    def eta(self, now: float | None = None) -> float | None:
        """Seconds left at the mean speed of this start; None before the first step."""
        done = self._step - self.start
        elapsed = (now or time.monotonic()) - self._begin
        return None if done <= 0 else elapsed / done * max(0, self.total - self._step)

    def line(self, now: float | None = None) -> str:
        """The values in one line."""
        now = now or time.monotonic()
        values, out = dict(self._values), []
        if "memory_gib" not in values and now - self._memory_time > 10:  # a walk over all processes: not every step
            self._memory, self._memory_time = memory_gib(), now
        if self._recent and "images_per_second" in values:  # a single step's rate jumps
            time_taken = sum(t for t, _ in self._recent)
            values["images_per_second"] = len(self._recent) / time_taken
            if "data_wait" in values:
                values["data_wait"] = sum(t * share for t, share in self._recent) / time_taken
        names = {"loss": "loss {:.4f}", "images_per_second": "{:.0f} images/s", "data_wait": "data wait {:.0%}"}
        for name, form in names.items():
            if name in values:
                out.append(form.format(float(values.pop(name))))
        out.append(f"memory {values.pop('memory_gib', self._memory):.1f} GiB")
        out += [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        ]
        eta = self.eta(now)
        out.append(f"ETA {duration(eta)}" if eta is not None else "ETA -")
        return "  ".join(out)

    def say(self, text: str) -> None:
        """A line that stays, above the bar if there is one."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(Text(text))
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Take the bar away (its last state stays)."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def banner(rows: Mapping[str, Any], title: str = "moe_cl", stream: TextIO | None = None) -> None:
    """What matters about a run, at its start."""
    stream = stream or sys.stdout
    if not stream.isatty():
        width = max((len(name) for name in rows), default=0)
        print(f"== {title} ==", *(f"{name:<{width}}  {value}" for name, value in rows.items()), sep="\n", file=stream)
        stream.flush()
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(name, Text(str(value)))
    Console(file=stream).print(Panel(grid, title=title, title_align="left", expand=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "", stream: TextIO | None = None) -> None:
    """A table of results; numbers are set right, floats with 4 digits."""
    stream = stream or sys.stdout
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    if stream.isatty():
        out = Table(title=title or None, title_justify="left")
        for name, right in zip(columns, numeric, strict=True):
            out.add_column(name, justify="right" if right else "left")
        for row in cells:
            out.add_row(*row)
        Console(file=stream).print(out)
        return
    widths = [max(len(str(cell)) for cell in column) for column in zip(columns, *cells, strict=True)]
    if title:
        print(title, file=stream)
    for row in (columns, ["-" * width for width in widths], *cells):
        text = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        print("  ".join(text).rstrip(), file=stream)
    stream.flush()
