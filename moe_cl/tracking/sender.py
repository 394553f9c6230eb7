"""Brings a journal to MLflow, each point once, however often it is interrupted.

What was delivered is kept in ``mlflow.state.json`` beside the journal: the run's id and, for each metric, the highest
step sent. Points cannot be deleted and steps are run again after a resume, so a (key, step) at or below that mark is
never sent. After a request whose fate is unknown (time-out, a server that died) the marks are read back from the server
before anything is sent again; points carry the journal's own times, so a repeated one is the same row.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from moe_cl.config import flatten
from moe_cl.tracking.redact import bare
from moe_cl.tracking.tail import Tail, header, parts

STATE, REQUEST, JOURNAL, SYSTEM = "mlflow.state.json", "track.json", "journal.jsonl", "system"
BATCH_METRICS, BATCH_PARAMS, BATCH_TAGS = 1000, 100, 100  # the server's limits
KEY, PARAM, TAG, DIGEST = 250, 6000, 5000, 36
ARTIFACTS = (
    "config.yaml", "ds_config.json", "environment.json", "summary.json", "report.html", "figures/*.png",
    "comparison.html", "comparison_figures/*.png",
)  # fmt: skip


@dataclass
class State:
    """What the server has. ``journal``: id of the journal that this is about."""

    journal: str = ""
    uri: str = ""
    experiment_id: str = ""
    run_id: str = ""
    link: str = ""
    high_water: dict[str, int] = field(default_factory=dict)
    evaluations: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, list[int]] = field(default_factory=dict)
    described: int = 0  # time_ns of the request whose params and tags were sent
    events: dict[str, str] = field(default_factory=dict)
    status: str = ""  # how the run ended
    ended: str = ""  # the same, once the server knows


def load_state(out: Path) -> State:
    """The state beside the journal; a fresh one if there is none."""
    try:
        raw = json.loads((out / STATE).read_text())
    except (OSError, ValueError):
        return State()
    known = State.__dataclass_fields__
    return State(**{key: value for key, value in raw.items() if key in known})


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def cut(text: str, limit: int) -> str:
    """``text`` in at most ``limit`` characters; a mark says that it was cut."""
    mark = f" ... [cut: {len(text)} characters]"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark


def clean_key(key: str) -> str:
    """A metric, param or tag name in the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /:]", "_", key, flags=re.ASCII)[:KEY].strip("/ ") or "_"


class Deleted(Exception):
    """The run was deleted in MLflow: nothing can be sent to it, and nothing may be taken as sent."""


def _refused(error: Exception) -> bool:
    return isinstance(error, MlflowException) and error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class Sender:
    """One journal's way to one MLflow run. ``pump`` sends what it can and raises when the server does not answer.

    Args:
        out: the run's folder. client: an MlflowClient with short time-outs. live: the run goes on (a run that had ended
            is opened again). artifact_root: where the embedded default keeps artifacts; None = the server's own place.
        new_run: leave a run that was deleted alone: everything goes to another one.
    """

    def __init__(
        self, out: Path, client: MlflowClient, live: bool, artifact_root: str | None = None, new_run: bool = False
    ):
        self.out, self.client, self.live, self.artifact_root = out, client, live, artifact_root
        self.request: dict[str, Any] = json.loads((out / REQUEST).read_text())
        self.state = load_state(out)
        ids = [header(part).get("id", "") for part in parts(out / JOURNAL)]
        journal = next((i for i in ids if i), "")
        if self.state.journal != journal:
            same = self.state.journal == "" or self.request.get("run_id") == self.state.run_id != ""
            self.state = State(journal=journal, run_id=self.state.run_id if same else "")
        self.state.run_id = self.state.run_id or self.request.get("run_id") or ""
        self._replaces_deleted = new_run
        self._main, self._tails = Tail(out / JOURNAL), {}
        self._metrics: list[tuple[str, float, int, int]] = []  # key, value, milliseconds, step
        self._evaluations: list[dict[str, Any]] = []
        self._events: dict[str, list[Any]] = {}
        self._repeated: list[str] = []  # steps that were done twice, after resumes
        self._agreed = False  # the marks are the server's
        self.sent, self._limit = 0, BATCH_METRICS
        if live:
            self.state.status = self.state.ended = ""
            self._opened = False
        else:
            self._opened = True

    # -- one round ---------------------------------------------------------------------------------------------------
    def pump(self) -> bool:
        """Send everything there is. True if all of it, and the run's end if it has ended, is there."""
        try:
            self._connect()
            while self._read():
                self._send_metrics()
                self._send_evaluations()
            self._describe()
            self._end()
            self._send_artifacts()
        except Exception:
            self._agreed, self._limit = False, max(50, self._limit // 2)  # a slow server may manage less at once
            raise
        self._limit = min(BATCH_METRICS, self._limit * 2)
        return bool(self.state.ended)

    def waiting(self) -> int:
        """Points read from the journal and not yet delivered."""
        return sum(1 for key, _, _, step in self._metrics if step > self.state.high_water.get(key, -1))

    def save(self) -> None:
        """Write the state."""
        write_json(self.out / STATE, asdict(self.state))

    # -- the run -----------------------------------------------------------------------------------------------------
    def _connect(self) -> None:
        if self._agreed:
            return
        state, client = self.state, self.client
        if not state.experiment_id and not state.run_id:
            state.experiment_id = self._experiment()
        if not state.run_id:
            state.run_id = self._find({"moe_cl.journal": state.journal}) or self._create()
            self.save()
        try:
            run = client.get_run(state.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return self._start_over()  # another server, or a data base that was deleted
        if self._replaces_deleted and run.info.lifecycle_stage == "deleted":
            return self._start_over()
        self._must_live(run)
        state.experiment_id = run.info.experiment_id
        for metric in run.data._metric_objs:  # the highest step of each key; the public dict has only values
            state.high_water[metric.key] = max(metric.step, state.high_water.get(metric.key, -1))
        if not self._opened:
            if run.info.status != "RUNNING":
                client.update_run(state.run_id, status="RUNNING")
            self._opened = True
        state.uri = self.request.get("uri") or ""
        if state.uri.startswith("http"):
            state.link = f"{bare(state.uri).rstrip('/')}/#/experiments/{state.experiment_id}/runs/{state.run_id}"
        self.save()
        self._agreed = True

    def _start_over(self) -> None:
        """A new run, with everything."""
        self.state = State(journal=self.state.journal, status=self.state.status)
        self._main, self._tails, self._metrics, self._evaluations = Tail(self.out / JOURNAL), {}, [], []
        self._events, self._repeated = {}, []
        self._connect()

    def _must_live(self, run: Any = None) -> None:
        """Raises Deleted."""
        run = run or self.client.get_run(self.state.run_id)
        if run.info.lifecycle_stage == "deleted":
            raise Deleted(
                f"the run {self.state.run_id} was deleted in MLflow: restore it there, or start another with "
                f"`python -m moe_cl track sync {self.out} --new-run`; nothing is lost, the journal has it all"
            )

    def _experiment(self) -> str:
        name = self.request["experiment"]
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifact_location=self.artifact_root)
            except MlflowException:  # another run has just made it
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _find(self, tags: dict[str, str]) -> str:
        """A run with these tags: made by a request whose answer never came."""
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self.client.search_runs([self.state.experiment_id], query, ViewType.ACTIVE_ONLY, max_results=1)
        return found[0].info.run_id if found else ""

    def _create(self) -> str:
        start = int(self.request.get("time", time.time()) * 1000)
        tags = {"moe_cl.journal": self.state.journal}
        run = self.client.create_run(self.state.experiment_id, start, tags, run_name=self.request.get("run_name"))
        return run.info.run_id

    # -- params, tags, data sets -------------------------------------------------------------------------------------
    def _describe(self) -> None:
        state, request = self.state, self.request
        tags = {f"event.{name}": f"{n} times, last at step {step}" for name, (n, step) in self._events.items()}
        if self._repeated:
            tags["event.repeated_steps"] = ", ".join(self._repeated)
        tags = {name: value for name, value in tags.items() if state.events.get(name) != value}
        if state.described != request["written"]:
            run = self.client.get_run(state.run_id)
            wanted = {clean_key(k): cut(str(v), PARAM) for k, v in request.get("params", {}).items()}
            for key, value in wanted.items():
                if run.data.params.get(key, value) != value:
                    tags[f"changed.{key}"] = value
            self._params({k: v for k, v in wanted.items() if k not in run.data.params})
            tags |= request.get("tags", {})
            self._datasets(run)
        items = [RunTag(clean_key(k), cut(str(v), TAG)) for k, v in tags.items()]
        for i in range(0, len(items), BATCH_TAGS):
            self.client.log_batch(state.run_id, tags=items[i : i + BATCH_TAGS])
        if tags or state.described != request["written"]:
            state.events |= {k: v for k, v in tags.items() if k.startswith("event.")}
            state.described = request["written"]
            self.save()

    def _params(self, params: dict[str, str], run_id: str = "") -> None:
        run_id = run_id or self.state.run_id
        items = [Param(k, v) for k, v in params.items()]
        for i in range(0, len(items), BATCH_PARAMS):
            chunk = items[i : i + BATCH_PARAMS]
            try:
                self.client.log_batch(run_id, params=chunk)
            except MlflowException as error:
                if not _refused(error):
                    raise
                self._must_live()
                for param in chunk:  # an older server takes 500 characters
                    short = Param(param.key, cut(param.value, 490))
                    self._or_skip(lambda p=short: self.client.log_batch(run_id, params=[p]), param.key)

    def _datasets(self, run: Any) -> None:
        known = {(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs} if run.inputs else set()
        inputs = []
        for data in self.request.get("datasets", []):
            name, digest = cut(data["name"], 500), str(data["digest"])[:DIGEST]
            if (name, digest) not in known:
                profile = json.dumps(data.get("profile", {}))
                dataset = Dataset(name, digest, "local", json.dumps({"uri": data["source"]}), profile=profile)
                inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", data.get("context", "training"))]))
        if inputs:
            self._or_skip(lambda: self.client.log_inputs(self.state.run_id, inputs), "data sets")

    def _or_skip(self, send: Any, what: str) -> None:
        """Send; what the server calls invalid is reported and left out, for it would be so for ever."""
        try:
            send()
        except MlflowException as error:
            if not _refused(error):
                raise
            print(f"left out {what}: {error}", file=sys.stderr)

    # -- points ------------------------------------------------------------------------------------------------------
    def _read(self) -> bool:
        """Take new lines in; True if there is something to send."""
        if not self._metrics and not self._evaluations:
            for line in self._main.poll():
                kind = line["kind"]
                if kind == "evaluation" and _whole(line):
                    self._evaluations.append(line)
                elif kind == "event":
                    seen = self._events.setdefault(line["name"], [0, None])
                    self._events[line["name"]] = [seen[0] + line.get("count", 1), line.get("step")]
                    if line["name"] == "resume" and line.get("repeats_to"):
                        self._repeated.append(f"{line['step'] + 1}..{line['repeats_to']}")
                elif kind == "end":
                    self.state.status = self.state.status or line["status"]
                self._take(line)
            for path in sorted((self.out / SYSTEM).glob("*.jsonl")):
                if not re.search(r"\.\d{4,}\.jsonl$", path.name):
                    for line in self._tails.setdefault(path, Tail(path)).poll():
                        self._take(line)
        return bool(self._metrics or self._evaluations)

    def _take(self, line: dict[str, Any]) -> None:
        if line["kind"] not in ("step", "evaluation") or not _whole(line):
            return
        prefix = f"eval/{line['name']}/" if line["kind"] == "evaluation" else ""
        for key, value in _scalars(line.get("values", {})):
            self._metrics.append((clean_key(prefix + key), value, int(line["time"] * 1000), int(line["step"])))

    def _send_metrics(self) -> None:
        marks = self.state.high_water
        while self._metrics:
            tentative: dict[str, int] = {}
            batch, used = [], 0
            for key, value, when, step in self._metrics:
                if len(batch) == self._limit:
                    break
                used += 1
                if step > tentative.get(key, marks.get(key, -1)):
                    tentative[key] = step
                    batch.append(Metric(key, value, when, step))
            if batch:
                self._batch(self.state.run_id, batch)
                marks.update(tentative)
                self.sent += len(batch)
            del self._metrics[:used]
            self.save()

    def _batch(self, run_id: str, batch: list[Metric]) -> None:
        try:
            self.client.log_batch(run_id, metrics=batch)
        except MlflowException as error:
            if not _refused(error):
                raise
            self._must_live()
            if len(batch) == 1:
                print(f"left out {batch[0].key} of step {batch[0].step}: {error}", file=sys.stderr)
                return
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self._batch(run_id, half)

    def _send_evaluations(self) -> None:
        """Each evaluation is a child run too, its setting as params, so that they can be compared and sorted."""
        state = self.state
        while self._evaluations:
            line = self._evaluations[0]
            name = f"{line['name']}@{line['step']}"
            if name not in state.evaluations:
                tags = {"moe_cl.journal": state.journal, "moe_cl.evaluation": name.replace("'", "")}
                when = int(line["time"] * 1000)
                run_id = self._find(tags)
                if not run_id:
                    tags["mlflow.parentRunId"] = state.run_id
                    run_id = self.client.create_run(state.experiment_id, when, tags, run_name=name).info.run_id
                metrics = [Metric(clean_key(k), v, when, int(line["step"])) for k, v in _scalars(line["values"])]
                self._batch(run_id, metrics)
                setting = flatten(line["setting"]) if isinstance(line.get("setting"), dict) else {}
                self._params({clean_key(k): cut(str(v), PARAM) for k, v in setting.items()}, run_id)
                self.client.set_terminated(run_id, "FINISHED", when)
                state.evaluations[name] = run_id
                self.save()
            del self._evaluations[0]

    # -- the end -----------------------------------------------------------------------------------------------------
    def _end(self) -> None:
        if self.state.status and self.state.status != self.state.ended:
            self.client.set_terminated(self.state.run_id, self.state.status, int(time.time() * 1000))
            self.state.ended = self.state.status
            self.save()

    def _send_artifacts(self) -> None:
        for pattern in (*ARTIFACTS, *self.request.get("artifacts", [])):
            for path in sorted(self.out.glob(pattern)):
                stat = path.stat()
                name, version = str(path.relative_to(self.out)), [stat.st_mtime_ns, stat.st_size]
                if self.state.artifacts.get(name) != version:
                    folder = str(Path(name).parent)
                    self.client.log_artifact(self.state.run_id, str(path), None if folder == "." else folder)
                    self.state.artifacts[name] = version
                    self.save()


def _whole(line: dict[str, Any]) -> bool:
    """A line that can be sent (a foreign one must not stop those after it)."""
    return isinstance(line.get("step"), int) and isinstance(line.get("values"), dict)


def _scalars(values: dict[str, Any]) -> list[tuple[str, float]]:
    """(key, number) of a line's values; a list of one number an expert gives ``key/00``, ``key/01`` ..."""
    out = []
    for key, value in values.items():
        if isinstance(value, list):
            out += [(f"{key}/{i:02d}", float(v)) for i, v in enumerate(value) if isinstance(v, (int, float))]
        elif isinstance(value, (int, float)):
            out.append((key, float(value)))
    return out
