"""What a run was made with: tags for MLflow, and the environment that the report shows."""

from __future__ import annotations

import getpass
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from moe_cl.tracking.command import command

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "mlflow", "webdataset", "numpy", "opencv-python-headless")
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "KUBERNETES_JOB", "CI_JOB_ID")


def git(folder: str | Path | None = None) -> tuple[str, bool] | None:
    """(commit, are there uncommitted changes) of the code's checkout; None if it is not one."""
    folder = Path(folder or Path(__file__).resolve().parents[2])

    def ask(*command: str) -> str:
        process = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True
        )
        return process.stdout.strip()

    try:
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def tags(method: str, backbone: str, world: int, ep_size: int, resumed_from: str | None = None) -> dict[str, str]:
    """The tags of a run."""
    out = {
        "method": method,
        "backbone": backbone,
        "world": str(world),
        "ep": str(ep_size),
        "host": socket.gethostname(),
    }
    try:
        out["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        out["mlflow.user"] = str(os.getuid())
    out |= {"mlflow.source.name": "moe_cl pretrain", "mlflow.source.type": "LOCAL"}
    if state := git():
        out |= {"mlflow.source.git.commit": state[0], "git.commit": state[0], "git.dirty": str(state[1]).lower()}
    job = next((os.environ[name] for name in JOB_VARIABLES if name in os.environ), None)
    if job:
        out["job"] = job
    if resumed_from:
        out["resumed_from"] = resumed_from
    return out


def describe(resumed: bool = False) -> dict[str, Any]:
    """Machine, versions and the command of the run (``environment.json``). Does not start an accelerator."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    state = git()
    return {
        "command": command(resumed),
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=True),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerators": _accelerators(),
        "git": {"commit": state[0], "dirty": state[1]} if state else None,
        "packages": versions,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    torch = sys.modules.get("torch")  # imported only if the run has done so
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
