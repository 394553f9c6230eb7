"""What became of every key when a run starts from another's weights: one line with names, and all of them in a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "init_from.json"


@dataclass
class Report:
    """What became of the student's keys, and by ``others`` of the teacher's, the method's (queue, centres) and the
    optimizer's (parameters with their moments).

    extra: the checkpoint's (cursor, step), None from a file of weights. fresh: here alone, as initialised. unused:
    there alone. upcycled: experts were made of dense blocks.
    """

    loaded: list[str]
    fresh: list[str]
    unused: list[str]
    extra: dict[str, Any] | None = None
    upcycled: bool = False
    others: dict[str, Report] = field(default_factory=dict)

    def __str__(self) -> str:
        kind = "continues at its step" if self.extra else "starts at step 0"
        more = "".join(f"; {name}: {part._line()}" for name, part in self.others.items())
        return f"{self._line()}{more}; {kind}"

    def _line(self) -> str:
        made = " (experts from the dense blocks)" if self.upcycled else ""
        return f"{len(self.loaded)} tensors loaded{made}, fresh: {_some(self.fresh)}, unused: {_some(self.unused)}"

    def write(self, out: Path, source: str) -> Path:
        """Every name, in ``OUT/init_from.json``; raises OSError."""
        parts = {"student": self, **self.others}
        keys = {name: {k: getattr(part, k) for k in ("loaded", "fresh", "unused")} for name, part in parts.items()}
        tree = {"from": source, "continues": self.extra is not None, "upcycled": self.upcycled, **keys}
        out.mkdir(parents=True, exist_ok=True)
        hidden = out / f".{NAME}.part"
        hidden.write_text(json.dumps(tree, indent=1) + "\n")
        os.replace(hidden, out / NAME)
        return out / NAME


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"
