"""Where the figures of an evaluation go: a table on the console, a JSON with the whole setting, the run's journal
(which the report reads), and from there a child run in MLflow."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_cl.config import ConfigError
from moe_cl.tracking import redact
from moe_cl.tracking.progress import table


def record(
    out: Path,
    name: str,
    step: int,
    values: Mapping[str, float],
    setting: Mapping[str, Any],
    *,
    columns: Sequence[str] | None = None,
    rows: Sequence[Sequence[Any]] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write the results of evaluation ``name``; returns the JSON's path (``OUT/evals/NAME.json``).

    Args:
        values: flat figures. setting: what is needed to run it again. columns, rows: the printed table (default: the
            figures). more: what belongs into the JSON alone.
    """
    setting = redact.value("setting", json.loads(json.dumps(dict(setting), default=str)))
    if rows is None:
        columns, rows = ("figure", "value"), [[k, v] for k, v in values.items()]
    table(columns or (), rows, title=f"{name} at step {step}")
    path = out / "evals" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {"evaluation": name, "step": step, "values": dict(values), "setting": setting, **(more or {})}
    write_json(path, body)
    print(f"written {path}")
    journal = out / "journal.jsonl"
    if journal.exists():
        line = {"kind": "evaluation", "time": round(time.time(), 3), "name": name, "step": step, "values": dict(values)}
        line["setting"] = setting
        with open(journal, "a") as f:  # one write of one line
            f.write(json.dumps(line) + "\n")
        _track(out)
    return path


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """Atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(body, indent=1, default=str) + "\n")
    os.replace(part, path)


def _track(out: Path) -> None:
    """Replay the journal into MLflow where the run had it; a tracker that does not answer costs a line, no result."""
    if not (out / "track.json").exists():
        return
    from moe_cl.tracking import mlflow

    try:
        answer = mlflow.sync(out, seconds=30)
        error = answer.get("error") if not answer.get("done") else None
    except ConfigError as problem:
        error = str(problem)
    if error:
        print(f"moe_cl: not in MLflow yet ({error}); later: python -m moe_cl track sync {out}", file=sys.stderr)
