"""The hosts of a hostfile, asked over ssh: each one's facts and clock, a shared out dir, the links between them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_cl.config import ConfigError
from moe_cl.planning import host

ASK_SECONDS = 180  # a first start of torch from a network file system takes a minute by itself
PASSED_ON = ("DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR",
             "MOE_CL_KERNELS")  # fmt: skip
CLOCK = "date '+clock %s.%N'"
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


@dataclass
class Answer:
    """What a host said. ``skew``: its clock minus this one's, seconds. ``slots``: ranks the hostfile gives it.

    ``facts`` with an ``error``: they are whole, and its clock could not be read.
    """

    name: str
    facts: dict[str, Any] | None = None
    skew: float = 0.0
    error: str = ""
    slots: int = 1


def read_hostfile(path: str) -> dict[str, int]:
    """Host names in order, with their slots. Raises ConfigError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"hostfile {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"hostfile {path} is no text file; write lines like 'node1 slots=8'") from None
    if lines and lines[0].startswith("\ufeff"):  # DeepSpeed would take it for a part of the name
        raise ConfigError(f"hostfile {path} begins with a byte-order mark; save it as plain text (UTF-8 without BOM)")
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        # What more Open MPI takes there (max_slots=8) is not for DeepSpeed.
        if not re.fullmatch(r"slots=[1-9][0-9]{0,5}( \w+=\S+)*", " ".join(words[1:])):
            raise ConfigError(f"hostfile {path}, line {number}: write it as 'HOST slots=N', found {line.strip()!r}")
        if words[0] in hosts:
            raise ConfigError(
                f"hostfile {path}, line {number}: {words[0]} stands there twice; give it all slots in one line"
            )
        hosts[words[0]] = int(words[1].removeprefix("slots="))
    if not hosts:
        raise ConfigError(f"hostfile {path} names no host; write lines like 'node1 slots=8'")
    return hosts


def remote(name: str, *arguments: str, **environment: str) -> list[str]:
    """The ssh command that runs ``python -m ARGUMENTS`` in this checkout on host ``name``."""
    passed = {k: os.environ[k] for k in PASSED_ON if k in os.environ} | environment
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    words = ["env", f"PATH={path}", *(f"{k}={v}" for k, v in passed.items()), sys.executable, "-m", *arguments]
    return [*SSH, name, f"cd {shlex.quote(str(host.ROOT))} && {shlex.join(words)}"]


def ask(name: str, arguments: list[str]) -> Answer:
    """One host's facts over ssh.

    The host says its time before anything else, and it is held against ours as the line comes in: neither the login
    nor the start of Python hides a clock that is behind, or one that is ahead.
    """
    *ssh, command = remote(name, "moe_cl", "doctor", "--json", *arguments)
    # Unbuffered: what ``readline`` has not taken is left to ``communicate``.
    asked = subprocess.Popen([*ssh, f"{CLOCK} && {command}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    late = threading.Event()
    limit = threading.Timer(ASK_SECONDS, lambda: (late.set(), asked.kill()))
    limit.start()
    try:
        skew, said_before = _clock(asked)
        out, err = (text.decode(errors="replace") for text in asked.communicate())
    finally:
        limit.cancel()
    if late.is_set():
        return Answer(name, error=f"no answer within {ASK_SECONDS} s: is it up, and does `ssh {name} true` work?")
    said = (err.strip().splitlines() or [""])[-1]
    if asked.returncode == 2 and said.startswith("moe_cl: "):  # it runs there, and refuses a setting
        return Answer(name, error=said.removeprefix("moe_cl: "))
    if asked.returncode == 255:
        reason = said or "no reason given"
        return Answer(name, error=f"ssh cannot reach it ({reason}): check the name, the network and the key")
    try:
        facts = json.loads((said_before + out).strip().splitlines()[-1])
    except (IndexError, ValueError):
        reason = said or f"exit code {asked.returncode}"
        return Answer(
            name, error=f"this checkout does not run there ({reason}): it must lie at {host.ROOT}, with .venv"
        )
    if not host.whole(facts):
        return Answer(name, error="its answer is that of another code: use the same checkout on all hosts")
    if skew is None:
        return Answer(name, facts, error=f"its clock cannot be read: see what `ssh {name} date +%s` says")
    return Answer(name, facts, skew)


def skew_of(name: str) -> float | None:
    """A host's clock minus ours, asked for alone: many answers at once may wait for their turn here."""
    asked = subprocess.Popen([*SSH, name, CLOCK], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
    limit = threading.Timer(60, asked.kill)
    limit.start()
    try:
        return _clock(asked)[0]
    finally:
        limit.cancel()
        asked.communicate()


def _clock(asked: subprocess.Popen[bytes]) -> tuple[float | None, str]:
    """The host's clock minus ours from the first line it says of it (also behind other words, or from a ``date``
    without fractions), and all that was read; without such a line that is all it said."""
    said = b""
    while line := asked.stdout.readline():
        now, said = time.time(), said + line
        if found := re.search(rb"clock (\d{9,})(\.\d+)?\D*$", line):
            return float(found[1] + (found[2] or b".5")) - now, said.decode(errors="replace")
    return None, said.decode(errors="replace")


def not_shared(answers: list[Answer]) -> list[str]:
    """A line for each host that does not see in the out dir (or where it will be) what the first host writes there."""
    good = [a for a in answers if a.facts and "error" not in a.facts["disk"]]
    if len(good) < 2:
        return []
    first, *others = good
    token = f"{first.facts['disk']['folder']}/.doctor-{uuid.uuid4().hex}"
    try:
        if _shell(first.name, "touch", token):
            return []  # its own line says what is wrong
        with ThreadPoolExecutor(len(others)) as pool:
            missing = list(pool.map(lambda a: _shell(a.name, "test", "-e", token) == 1, others))
    finally:
        _shell(first.name, "rm", "-f", token)
    return [
        f"{a.name}: out dir: what {first.name} writes in {Path(token).parent} is not there; choose an --out on a file "
        "system that all hosts share"
        for a, gone in zip(others, missing, strict=True)
        if gone
    ]


def _shell(name: str, *words: str) -> int:
    """The exit code of a short command on a host; 255 where ssh fails or it takes too long."""
    try:
        return subprocess.run([*SSH, name, shlex.join(words)], capture_output=True, timeout=60).returncode
    except subprocess.TimeoutExpired:
        return 255


def links(names: list[str], port: int) -> dict[str, Any]:
    """One rank a host; the figures of ``links.measure``, or ``error``."""
    address = names[0].rsplit("@", 1)[-1]
    world = {"WORLD_SIZE": str(len(names)), "MASTER_ADDR": address, "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    ranks = [
        subprocess.Popen(
            remote(name, "moe_cl.planning.links", **world, RANK=str(rank), LOCAL_WORLD_SIZE="1"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, name in enumerate(names)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=ASK_SECONDS) for rank in ranks]
    except subprocess.TimeoutExpired:
        return {"error": f"the hosts do not reach each other on port {port}: open it, or set GLOO_SOCKET_IFNAME"}
    finally:
        for rank in ranks:
            rank.kill()
    for name, rank, (_, err) in zip(names, ranks, outputs, strict=True):
        if rank.returncode:
            return {"error": f"{name}: {(err.strip().splitlines() or ['no word'])[-1]}"}
    return json.loads(outputs[0][0].strip().splitlines()[-1])
