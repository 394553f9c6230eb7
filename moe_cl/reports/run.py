"""What an out dir says about its run: the journal as arrays, the config, evaluations, environment and summary."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moe_cl.config import ConfigError, read_yaml
from moe_cl.tracking import redact
from moe_cl.tracking.journal import read


@dataclass
class Series:
    """A key's values over steps: y (n,) numbers, or (n, E) where a line holds a list."""

    x: np.ndarray
    y: np.ndarray


@dataclass
class Run:
    """A run, finished or going on. ``label``: its name on the page."""

    out: Path
    label: str
    lines: list[dict[str, Any]] = field(repr=False)

    @classmethod
    def load(cls, out: str | Path, label: str | None = None) -> Run:
        """Read ``out``. Raises ConfigError if there is no journal."""
        out = Path(out)
        lines = read(out / "journal.jsonl")
        if not lines:
            raise ConfigError(f"{out}: no journal.jsonl there; give the out dir of a run")
        return cls(out, label or out.resolve().name, lines)

    @cached_property
    def series(self) -> dict[str, Series]:
        """Every key of the step lines."""
        found: dict[str, tuple[list[int], list[Any]]] = {}
        for line in self.lines:
            if line["kind"] == "step":
                for key, value in line.get("values", {}).items():
                    if isinstance(value, (int, float, list)):
                        x, y = found.setdefault(key, ([], []))
                        x.append(line["step"])
                        y.append(value)
        out = {}
        for key, (x, y) in found.items():
            width = {len(v) if isinstance(v, list) else None for v in y}
            if len(width) == 1:  # a key that changes its shape cannot be drawn
                out[key] = Series(np.array(x), np.array(y, dtype=float))
        return out

    @cached_property
    def system(self) -> dict[str, Series]:
        """Samples of each node's machine."""
        out: dict[str, Series] = {}
        for path in sorted((self.out / "system").glob("*.jsonl")):
            if path.suffixes == [".jsonl"]:
                out |= Run(self.out, self.label, read(path)).series
        return out

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """``name``, ``step``, ``values`` of each evaluation, the last of each name and step."""
        return list({(e["name"], e["step"]): e for e in self.lines if e["kind"] == "evaluation"}.values())

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What happened once."""
        return [line for line in self.lines if line["kind"] == "event"]

    @property
    def id(self) -> str:
        """The journal's id: another run in the same out dir has another."""
        return next((line.get("id", "") for line in self.lines if line["kind"] == "journal"), "")

    @property
    def status(self) -> str:
        """FINISHED, FAILED, KILLED, or RUNNING (also: ended without a word)."""
        ends = [line["status"] for line in self.lines if line["kind"] == "end"]
        return ends[-1] if ends else "RUNNING"

    @property
    def steps(self) -> int:
        """Steps done."""
        return max((line["step"] for line in self.lines if line["kind"] == "step"), default=0)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config; {} if it was not saved."""
        path = self.out / "config.yaml"
        return redact.value("config", read_yaml(path)) if path.is_file() else {}  # an older run kept all of it

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Machine and versions."""
        return self._json("environment.json")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """``summary.json``."""
        return self._json("summary.json")

    @property
    def mlflow(self) -> dict[str, Any]:
        """Run id and link, if it is tracked."""
        return self._json("mlflow.state.json")

    def _json(self, name: str) -> dict[str, Any]:
        path = self.out / name
        try:
            found = json.loads(path.read_text()) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); mend it, or delete it and ask again") from None
        if not isinstance(found, dict):
            raise ConfigError(f"{path} is not what a run writes there; delete it and ask again")
        return found

    @cached_property
    def seconds(self) -> float:
        """Time between the first and the last step line, pauses of more than 10 minutes (a kill) left out."""
        times = np.array([line["time"] for line in self.lines if line["kind"] == "step"])
        gaps = np.diff(times)
        return float(gaps[gaps < 600].sum())

    def moe_layers(self, what: str = "load") -> dict[str, Series]:
        """``moe/L{l}/what`` by layer name ("L1"), in order."""
        found = {k.split("/")[1]: s for k, s in self.series.items() if k.startswith("moe/L") and k.endswith("/" + what)}
        return dict(sorted(found.items(), key=lambda item: int(item[0][1:])))
