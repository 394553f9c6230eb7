"""Two real hosts: network namespaces, sshd in each. Root only; as root the Debian packages are installed if missing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_cl.tracking.journal import read
from tests.small import ENV, ROOT, make_shards

HERE = Path(__file__).parent
PACKAGES = {"sshd": "openssh-server", "pdsh": "pdsh", "ip": "iproute2", "nsenter": "util-linux"}


@dataclass
class Cluster:
    """``env``: for commands that start jobs. ``hostfile``: h1 and h2, one slot each."""

    folder: Path
    env: dict[str, str]

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    def on(self, host: int, *command: str) -> list[str]:
        """``command`` as a user logged in on host 1 or 2 would give it."""
        return [str(self.folder / "bin" / "on"), str(host), *command]

    def run(self, *command: str, timeout: float = 400, **environment: str) -> subprocess.CompletedProcess:
        """A command on the first host, to its end."""
        env = {**self.env, **environment}
        return subprocess.run(self.on(1, *command), cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)

    def start(self, host: int, log: Path, *command: str, **environment: str) -> subprocess.Popen:
        """A command on a host, its output in ``log``."""
        with open(log, "ab") as file:
            return subprocess.Popen(
                self.on(host, *command), cwd=ROOT, env={**self.env, **environment}, stdout=file, stderr=file
            )

    def ranks(self, host: int) -> list[int]:
        """Process ids of the ranks on a host."""
        pids = subprocess.run(["ip", "netns", "pids", f"h{host}"], capture_output=True, text=True).stdout.split()
        found = []
        for pid in map(Path("/proc").joinpath, pids):
            with contextlib.suppress(OSError):
                words, names = (pid / "cmdline").read_bytes().split(b"\0"), (pid / "environ").read_bytes()
                if (
                    b"moe_cl" in words
                    and b"pretrain" in words
                    and (b"RANK=" in names or b"SLURM_STEP_ID=" in names)
                    and not {b"--module", b"--check"} & set(words)
                ):
                    found.append(int(pid.name))
        return found

    def end_ranks(self) -> None:
        """Kill what a failed test left on the hosts."""
        for pid in self.ranks(1) + self.ranks(2):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def mounted(self, host: int, target: Path, *source: str) -> Iterator[None]:
        """``target`` shows something else on this host alone: ``mount SOURCE... target``."""
        subprocess.run(self.on(host, "mount", *source, str(target)), check=True)
        try:
            yield
        finally:
            subprocess.run(self.on(host, "umount", str(target)), check=True)

    @contextlib.contextmanager
    def login_environment(self, host: int, **variables: str) -> Iterator[None]:
        """What this host's sshd gives to everybody who logs in."""
        conf = self.folder / f"sshd{host}.conf"
        before = conf.read_text()
        words = " ".join(f'"{name}={value}"' for name, value in variables.items())
        conf.write_text(f"{before}SetEnv {words}\n")
        self._reload(host)
        try:
            yield
        finally:
            conf.write_text(before)
            self._reload(host)

    def _reload(self, host: int) -> None:
        os.kill(int((self.folder / f"sshd{host}.pid").read_text()), signal.SIGHUP)
        ssh = [str(self.folder / "bin" / "ssh"), "-o", "ConnectTimeout=2", f"10.77.0.{host}", "true"]
        until(lambda: not subprocess.run(ssh, capture_output=True).returncode, 20, "sshd back")


def until(condition: Callable[[], object], seconds: float, what: str, log: Path | None = None, process=None) -> None:
    """Waits for ``condition()``, no longer than ``seconds`` nor than ``process`` lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        over = time.monotonic() > deadline
        if over or (process is not None and process.poll() is not None):
            said = log.read_text()[-3000:] if log is not None and log.exists() else "(no log)"
            raise AssertionError(f"{what}: not within {seconds} s, or its process ended; its log:\n{said}")
        time.sleep(0.1)


def steps(out: Path) -> list[dict]:
    """The journal's lines of steps."""
    path = out / "journal.jsonl"
    return [line for line in read(path) if line["kind"] == "step"] if path.exists() else []


def install(programs: dict[str, str]) -> str | None:
    """None if all of ``programs`` (name -> Debian package) are there, installed now where needed; else why not."""
    if os.geteuid() != 0:
        return "two hosts on one machine need root (network namespaces)"
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [package for program, package in programs.items() if shutil.which(program, path=path) is None]
    if missing and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        done = subprocess.run(["apt-get", "install", "-y", "-qq", *missing], capture_output=True, text=True)
        return f"apt-get install {' '.join(missing)} failed: {done.stderr[-200:]}" if done.returncode else None
    return f"not installed: {', '.join(missing)}" if missing else None


def need(programs: dict[str, str]) -> None:
    """``programs`` (name -> Debian package) are there, installed now where needed; else the test is skipped.

    In CI it fails: a green CI says that two hosts were there.
    """
    if why := install(programs):
        if os.environ.get("CI") or os.environ.get("MOE_CL_CI"):
            pytest.fail(f"{why} (this is CI)")
        pytest.skip(why)


@contextlib.contextmanager
def alone(seconds: float = 1800) -> Iterator[None]:
    """One cluster on this machine at a time: names and addresses of hosts are fixed, a second up.sh ends the first."""
    with open(Path(tempfile.gettempdir()) / "moe_cl-cluster.lock", "w") as file:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by what is started here
                break
            except OSError:
                if time.monotonic() > deadline:
                    pytest.fail(f"another test run has the hosts h1 and h2 since {seconds:.0f} s")
                time.sleep(1)
        yield


@pytest.fixture(scope="package")
def cluster(tmp_path_factory):
    need(PACKAGES)
    folder = tmp_path_factory.mktemp("cluster")
    with alone():
        up = subprocess.run([HERE / "up.sh", folder], capture_output=True, text=True)
        assert up.returncode == 0, up.stderr
        path = os.pathsep.join([str(folder / "bin"), ENV["PATH"], "/usr/sbin"])
        yield Cluster(folder, {**ENV, "PATH": path, "GLOO_SOCKET_IFNAME": "eth0"})
        subprocess.run([HERE / "down.sh", folder])


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("cluster-data"))
