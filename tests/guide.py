"""Commands of a guide, run in this process: a start of Python with torch costs seconds."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def commands(guide: str) -> list[str]:
    """Every ``python -m ...`` line of an indented block of ``docs/GUIDE.md``, in order."""
    return re.findall(r"^    (python -m .*)$", (DOCS / f"{guide}.md").read_text(), re.MULTILINE)


def run(command: str, more: Sequence[str] = ()) -> None:
    """Run it with ``more`` arguments (sizes cut down); it must end with 0."""
    python, m, module, *argv = shlex.split(command)
    assert (python, m) == ("python", "-m")
    if module == "data_prep":
        from data_prep.cli import main
    else:
        assert module == "moe_cl"
        from moe_cl.cli import main
    assert main([*argv, *more]) == 0, command
