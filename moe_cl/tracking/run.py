"""One handle on everything a run says: journal, console, MLflow. Rank 0 speaks; on other ranks every call is silent."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moe_cl.config import TrackConfig
from moe_cl.tracking import environment, mlflow, redact
from moe_cl.tracking.journal import Journal, NullJournal, replace
from moe_cl.tracking.progress import Progress, banner, duration
from moe_cl.tracking.system import Monitor

if TYPE_CHECKING:
    from moe_cl.engine.flops import Flops


class Tracking:
    """Context manager of a run; its end state is FINISHED, FAILED (an exception) or KILLED (``killed`` was called).

    Args:
        out: the run's directory. track: settings. config: the resolved tree, written to ``config.yaml`` by the caller.
        rank: this rank; only 0 writes. node: True on one rank of each host, which samples the machine.
        resume_step: steps done before this start. continues: the run of the journal that lies in ``out`` goes on, be it
            from step 0; None: if steps were done. False with steps done: a run that begins at another run's step.
        total: steps of the whole run. tags, datasets, run_id: see ``mlflow.start``. show: rows of the banner.
        flops: of an image, for ``tflops`` and ``mfu`` of each step; None = these are left out.
    """

    def __init__(
        self,
        out: Path,
        track: TrackConfig,
        config: Mapping[str, Any],
        *,
        rank: int,
        node: bool,
        resume_step: int,
        total: int,
        tags: Mapping[str, Any],
        datasets: list[Mapping[str, Any]],
        show: Mapping[str, Any],
        run_id: str | None = None,
        flops: Flops | None = None,
        continues: bool | None = None,
    ):
        self.out, self.track, self.speaks = out, track, rank == 0
        self.status, self.flops, self.first, self.done = "FINISHED", flops, resume_step, resume_step
        self._begin, self._shown = time.monotonic(), {}
        self.journal, self.handle = NullJournal(), None
        begin = resume_step if (bool(resume_step) if continues is None else continues) else None
        if self.speaks:
            self.journal = Journal(out / "journal.jsonl", begin)
            described = environment.describe(resumed=begin is not None)
            replace(out / "environment.json", json.dumps(described, indent=1).encode())
            show = {name: redact.text(str(row)) for name, row in show.items()}
            self.handle = mlflow.start(out, track, tags, config=config, datasets=datasets, run_id=run_id)
            self.journal.event("start", step=resume_step, total=total, **show)
            rows = {**show, "out": out, "MLflow": self.handle.open_with or "off (track.uri=none)"}
            banner(rows, title="moe_cl pretrain")
        self._monitor = Monitor(out, resume_step=begin) if node else None
        self.progress = Progress(total, resume_step, track.plain_seconds, every=track.every, enabled=self.speaks)

    @property
    def run_id(self) -> str | None:
        """MLflow's run id once the server has given one."""
        return self.handle.run_id if self.handle else None

    def step(self, step: int, values: Mapping[str, Any], samples: str, **more: Any) -> None:
        """A step's scalars and per-expert lists, and the digest of its sample ids."""
        if self._monitor is not None:
            self._monitor.step = step
        if not self.speaks:
            return
        if self.flops is not None and "images_per_second" in values:
            values = {**values, **self.flops.rates(float(values["images_per_second"]))}
        self.journal.step(step, values, samples, **more)
        shown = ("loss", "images_per_second", "data_wait")
        self.done, self._shown = step, {name: float(values[name]) for name in shown if name in values}
        if self._monitor is not None and self._monitor.memory is not None:
            self._shown["memory_gib"] = self._monitor.memory
        self.progress.update(step, self._shown)

    def event(self, name: str, step: int | None = None, **fields: Any) -> None:
        """Something that happened once: into the journal."""
        self.journal.event(name, step, **fields)

    def evaluation(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """An evaluation's figures: into the journal and on the console."""
        self.journal.evaluation(name, step, dict(values))
        self.progress.say(f"step {step}  {name}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def evaluation_failed(self, name: str, step: int, reason: str) -> None:
        """An evaluation that could not be made; the run goes on."""
        self.journal.event("evaluation_failed", step, evaluation=name, reason=reason)
        self.progress.say(f"step {step}  {name}  failed: {reason}; the run goes on")

    def killed(self) -> None:
        """The run ends early because it was told to (a signal)."""
        self.status = "KILLED"

    def failed(self, reason: str, step: int) -> None:
        """The run ends early because it cannot go on; ``reason`` is one line."""
        self.status = "FAILED"
        self.journal.event("stopped", step, reason=reason)
        self.progress.close()
        if self.speaks:
            print(f"moe_cl: {redact.text(reason)}", file=sys.stderr, flush=True)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt:
            self.status = "KILLED"
        elif kind is not None and kind is not SystemExit:
            self.status = "FAILED"
            self.journal.event("error", text=f"{kind.__name__}: {error}")
        self.progress.close()
        if self._monitor is not None:
            self._monitor.close()
        self.journal.close(self.status)
        if self.handle is not None and not self.handle.stop(self.track.flush_seconds, self.status):
            if self.handle.process is not None:
                print(f"MLflow has not everything yet: python -m moe_cl track sync {self.out}", file=sys.stderr)
        if self.speaks and self.done > self.first:
            banner(self.summary(), title=f"moe_cl pretrain: {self.status}")

    def summary(self) -> dict[str, str]:
        """What the end shows."""
        seconds = time.monotonic() - self._begin
        rows = {"steps": f"{self.done} of {self.progress.total}, {self.done - self.first} of them in this start"}
        rows["time"] = f"{duration(seconds)} with start and end"
        if "loss" in self._shown:
            rows["loss"] = f"{self._shown['loss']:.4f} in the last step"
        if self.progress.images:
            rows["speed"] = f"{self.progress.images:.0f} images/s, data wait {self.progress.waited:.0%}"
        if self.flops is not None and self.progress.images:
            rates = self.flops.rates(self.progress.images)
            rows["arithmetic"] = f"{rates['tflops']:.3g} TFLOP/s" + (
                f", {rates['mfu']:.1%} MFU" if "mfu" in rates else ""
            )
        rows["out"] = str(self.out)
        if self.status != "FINISHED":
            rows["go on"] = "the same command with --resume"
        return rows
