"""MLflow that cannot hurt a run: a child of lowest priority sends the journal (``moe_cl.tracking.sender``).

The training process writes a file (the journal) and nothing else; it talks to no server, and holds only the child's
standard input, through which the child learns of the end, announced or not. ``python -m moe_cl track sync OUT`` is the
same code in the foreground.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_cl.config import ConfigError, TrackConfig, flatten
from moe_cl.tracking import redact
from moe_cl.tracking.address import check, embedded, kept, tracking_uri

__all__ = ["Busy", "Handle", "check", "run_id", "start", "sync", "tracking_uri"]

ARTIFACT_FOLDER, LOCK, LOG = "mlflow-artifacts", "mlflow.lock", "mlflow.log"
POLL, LONGEST_PAUSE = 1.0, 30.0  # seconds between rounds, and after failures at most
# Slurm and DeepSpeed's launcher signal every process of a run: the parent says when to stop, or dies.
NOT_OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOWEST = "19"  # priority: on a busy machine training goes first, and the child catches up at the end
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the child has its own patience, and can be told to stop in between
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "OMP_NUM_THREADS": "1",
}


def _program() -> str:
    """What starts MLflow in a shell that knows nothing of this program's virtual environment."""
    path = Path(sys.prefix) / "bin" / "mlflow"
    if sys.prefix == sys.base_prefix or not path.exists():
        return "mlflow"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


class Handle:
    """The child, as the training process sees it. Nothing here raises or waits, but ``stop`` for the time given."""

    def __init__(self, out: Path, process: subprocess.Popen | None, shown: str, open_with: str):
        self.out, self.process = out, process
        self.shown, self.open_with = shown, open_with  # address without credentials; how to look at it
        self._owner, self._stopped = os.getpid(), False
        if process is not None:
            atexit.register(self._at_exit)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run as soon as the server has given one (a checkpoint keeps it)."""
        return run_id(self.out)

    def stop(self, seconds: float, status: str | None = None) -> bool:
        """Let the child deliver the rest for at most ``seconds``, then end it. True if everything was delivered.

        Args:
            status: FINISHED, FAILED or KILLED; None = what the journal's last line says.
        """
        if self.process is None or self._stopped:
            return self._stopped
        self._stopped = True
        try:
            self.process.stdin.write(f"stop {status or '-'} {seconds}\n".encode())
            self.process.stdin.close()
        except OSError:  # it has died
            return False
        try:
            return self.process.wait(seconds + 1) == 0
        except subprocess.TimeoutExpired:
            self.process.kill()
            try:
                self.process.wait(2)  # so that `track sync` finds the lock free
            except subprocess.TimeoutExpired:
                pass  # held by the kernel (a hung file system); it ends when that lets it go
            return False

    def _at_exit(self) -> None:
        """The interpreter ends and nobody called ``stop``: an error. The child has some seconds of its own."""
        if not self._stopped and os.getpid() == self._owner:
            self._stopped = True
            try:
                self.process.stdin.write(b"stop FAILED 5\n")
                self.process.stdin.close()
            except OSError:
                return


def start(
    out: str | Path,
    track: TrackConfig,
    tags: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    datasets: Sequence[Mapping[str, Any]] = (),
    artifacts: Sequence[str] = (),
    run_id: str | None = None,
) -> Handle:
    """Start the child for the journal in ``out`` (after the Journal was made). Returns at once and never raises.

    Args:
        tags: ``moe_cl.tracking.environment.tags``. config: the resolved tree; its leaves become params.
        datasets: ``name``, ``digest``, ``source`` and, if known, ``profile`` (a dict) and ``context``.
        artifacts: more files to send, as glob patterns relative to ``out``.
        run_id: the run to continue (from the checkpoint) if the out dir does not know it.
    """
    out = Path(out)
    uri = tracking_uri(out, track.uri)
    shown = redact.setting(uri)
    if uri == "none":
        return Handle(out, None, "none", "")
    database = uri.startswith("sqlite:")
    open_with = f"{_program()} ui --backend-store-uri {shown}" if database else shown
    request = {
        "uri": None if uri == embedded(out) else shown,
        "experiment": track.experiment,
        "run_name": track.run_name or out.resolve().name,
        "run_id": run_id,
        "time": time.time(),
        "written": time.time_ns(),
        "tags": {key: redact.value(key, value) for key, value in tags.items()},
        "params": {key: redact.value(key, value) for key, value in flatten(dict(config or {})).items()},
        "datasets": redact.value("datasets", [dict(data) for data in datasets]),
        "artifacts": list(artifacts),
    }
    try:
        _write_request(out, request)
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, **ENVIRONMENT, "MLFLOW_TRACKING_URI": uri}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "moe_cl.tracking.mlflow", str(out.resolve()), str(os.getpid())]
        with open(out / LOG, "ab") as log, _held():
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, bufsize=0,
                start_new_session=True,  # Ctrl-C on the terminal is for the training process
            )  # fmt: skip
    except (OSError, TypeError, ValueError) as error:
        print(f"MLflow is not followed ({error}); `python -m moe_cl track sync {out}` does it later", file=sys.stderr)
        return Handle(out, None, shown, open_with)
    return Handle(out, process, shown, open_with)


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """``NOT_OURS`` wait while this thread is inside, and in a process started here until it lets them through."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_OURS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write_request(out: Path, request: dict[str, Any]) -> None:
    temporary = out / ".track.json.tmp"
    temporary.write_text(json.dumps(request, default=str))
    os.replace(temporary, out / "track.json")


def run_id(out: str | Path) -> str | None:
    """MLflow's id of the run in ``out``; None while no server has given one."""
    try:
        return json.loads((Path(out) / "mlflow.state.json").read_text()).get("run_id") or None
    except (OSError, ValueError):
        return None


class Busy(ConfigError):
    """The run's own tracker is at work."""


def sync(
    out: str | Path, uri: str | None = None, seconds: float = 600.0, status: str | None = None, new_run: bool = False
) -> dict[str, Any]:
    """Send what an ended (or interrupted) run has not delivered yet, in the foreground.

    Args:
        uri: another server than the run's. seconds: give up after. status: how the run ended, if it did not say.
        new_run: if the run was deleted in MLflow, make another, with everything.

    Returns: ``sent`` points, ``waiting`` points, ``done``, ``run_id``, ``uri``, and ``error`` (why not, if not done).
    Raises: ConfigError if there is no run in ``out``, or its server's credentials are not given again; Busy.
    """
    out = Path(out)
    if not (out / "track.json").exists():
        raise ConfigError(f"{out}: no tracked run here (track.json is missing); give a run's out dir")
    with open(out / LOCK, "w") as lock:
        try:
            _take(lock)
        except BlockingIOError:
            raise Busy(f"{out}: the run's own tracker is at work; wait until the run has ended") from None
        os.environ.update({**ENVIRONMENT, "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"})
        uri = uri or kept(out)
        sender = _sender(out, uri, live=False, new_run=new_run)
        if status:
            sender.state.status = status
        deadline, pause, error = time.monotonic() + seconds, 0.5, None
        while True:
            try:
                ended, error = sender.pump(), None
                if ended or time.time() - (out / "journal.jsonl").stat().st_mtime < 600:
                    break
                sender.state.status = "KILLED"  # nobody writes the journal and it has no end
                continue
            except Exception as reason:  # whatever the library or the server throws: try again until the deadline
                error = _words(reason)
                if type(reason).__name__ == "Deleted":  # trying again does not mend that
                    deadline = 0.0
            if time.monotonic() + pause > deadline:
                ended = False
                break
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)
        state = sender.state
        out_values = {"sent": sender.sent, "waiting": sender.waiting(), "done": error is None, "ended": ended}
        return out_values | {"run_id": state.run_id or None, "uri": redact.setting(uri), "error": error}


def _words(error: Exception) -> str:
    kind = type(error).__name__
    return str(error) if kind == "Deleted" else redact.text(f"{kind}: {error}")


def _take(lock: Any) -> None:
    """One sender a run. Raises BlockingIOError while another holds the lock; a file system without locks has none."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        _say(f"{lock.name}: {error}; going on without a lock")


def _sender(out: Path, uri: str, live: bool, new_run: bool = False) -> Any:
    from mlflow.tracking import MlflowClient

    from moe_cl.tracking.sender import Sender

    root = (out.resolve() / ARTIFACT_FOLDER).as_uri() if uri.startswith("sqlite:") else None
    _create(uri)
    return Sender(out, MlflowClient(uri), live, root, new_run)


def _create(uri: str) -> None:
    """A SQLite database with MLflow's tables, whole or not there: a chain of migrations makes them, and one that
    was killed in the middle can never be continued (``_alembic_tmp_experiments already exists``)."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    from mlflow.tracking import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=sys.stderr, flush=True)


class _Parent:
    """The training process, seen from the child: alive, stopping with a word, or gone without one."""

    def __init__(self, pid: int):
        self.pid, self.deadline, self.status = pid, None, None

    def wait(self, seconds: float) -> None:
        """At most ``seconds``, less if it says something."""
        if self.deadline is not None:
            time.sleep(min(seconds, max(0.0, self.deadline - time.monotonic())))
            return
        said = b""
        if select.select([sys.stdin], [], [], seconds)[0]:
            said = os.read(0, 4096)
        elif os.getppid() == self.pid:  # a forked worker may hold the pipe open after the parent's death
            return
        words = said.decode(errors="replace").split()
        if words[:1] == ["stop"]:
            self.status = None if words[1] == "-" else words[1]
            self.deadline = time.monotonic() + float(words[2])
        else:  # died without a word
            self.status, self.deadline = "KILLED", time.monotonic() + 30.0


def follow(out: Path, parent_pid: int) -> int:
    """What the child does until the run has ended. Returns 0 if everything was delivered."""
    parent, pause, sender, problem = _Parent(parent_pid), POLL, None, ""
    with open(out / LOCK, "w") as lock:
        while True:
            done = False
            try:
                _take(lock)
                sender = sender or _sender(out, os.environ["MLFLOW_TRACKING_URI"], live=True)
                if parent.deadline is not None and parent.status not in (None, sender.state.status):
                    sender.state.status = parent.status
                    sender.save()  # the parent may end this process before the server answers
                done = sender.pump()
                if parent.deadline is not None and not done:  # stopped without a word on how it ended
                    sender.state.status = "FINISHED"
                    done = sender.pump()
                pause = POLL
                if problem:
                    _say("delivering again")
                problem = ""
            except Exception as error:  # nothing that a server or a library does may end the child before its parent
                new = _words(error)
                if new != problem:
                    _say(new)
                problem, pause = new, min(LONGEST_PAUSE, pause * 2)
            if parent.deadline is not None:
                if done:
                    return 0
                if time.monotonic() >= parent.deadline:
                    if sender is not None and not sender.state.status:
                        sender.state.status = parent.status or "FINISHED"
                    if sender is not None:
                        sender.save()
                    left = (sender and sender.waiting()) or "some or all"
                    _say(f"ended with {left} points undelivered: track sync {out}")
                    return 3
                parent.wait(min(pause, 2.0))
            else:
                parent.wait(pause)


def main(arguments: Sequence[str]) -> int:
    """The child: ``python -m moe_cl.tracking.mlflow OUT PARENT_PID``."""
    for number in NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_OURS)  # held since before this process was: none came through
    nice = int(os.environ.get("MOE_CL_TRACKER_NICE", LOWEST))
    os.nice(nice)
    if nice == int(LOWEST) and hasattr(os, "SCHED_IDLE"):  # Linux: niced alone, it pushes a computing thread aside
        with contextlib.suppress(OSError):  # some sandboxes have no such class: it stays niced
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    sys.stdout = sys.stderr = redact.Stream(sys.stderr)
    out = Path(arguments[0])
    if (out / LOG).stat().st_size > 1 << 20:
        os.truncate(out / LOG, 0)
    return follow(out, int(arguments[1]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
