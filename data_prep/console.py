"""What a person sees: tables and notes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence


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
