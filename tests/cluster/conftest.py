"""Two real hosts: network namespaces, sshd in each. Root only; as root the Debian packages are installed if missing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.small import ENV, ROOT, make_shards

HERE = Path(__file__).parent
PACKAGES = {"sshd": "openssh-server", "pdsh": "pdsh", "ip": "iproute2"}
HOSTS = ("10.77.0.1", "10.77.0.2")


@dataclass
class Cluster:
    """``env``: for commands that start jobs. ``hostfile``: the two hosts, one slot each."""

    folder: Path
    env: dict[str, str]

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    def run(self, *command: str, timeout: float = 240) -> subprocess.CompletedProcess:
        """A command on the first host (as a user logged in there would give it)."""
        inside = ["ip", "netns", "exec", "h1", *command]
        return subprocess.run(inside, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=timeout)

    def end_ranks(self) -> None:
        """Kill what a job left on the hosts."""
        for host in ("h1", "h2"):
            pids = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()
            for pid in pids:
                command = Path(f"/proc/{pid}/cmdline")
                if command.exists() and b"moe_cl" in command.read_bytes():
                    os.kill(int(pid), signal.SIGKILL)


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


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if why := install(PACKAGES):
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("cluster")
    up = subprocess.run([HERE / "up.sh", folder], capture_output=True, text=True)
    assert up.returncode == 0, up.stderr
    env = {
        **ENV,
        "PATH": f"{folder / 'bin'}{os.pathsep}{ENV['PATH']}{os.pathsep}/usr/sbin",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    # What the DeepSpeed launcher passes on to the ranks of every host.
    passed = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "PATH")
    home = folder / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text("".join(f"{name}={env[name]}\n" for name in passed))
    env["DS_ENV_FILE"] = str(home / ".deepspeed_env")
    yield Cluster(folder, env)
    subprocess.run([HERE / "down.sh", folder])


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("cluster-data"))
