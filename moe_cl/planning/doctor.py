"""``python -m moe_cl doctor [--hostfile F]``: what would go wrong, found before the job; one line each with what to do.

Every host is asked over ssh for the facts of ``host.py`` about itself, all at once; facts that must be equal are
compared; then it is seen whether they share the out dir, and one rank a host measures the links between them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moe_cl import config
from moe_cl.config import ConfigError
from moe_cl.planning import host
from moe_cl.planning.hosts import Answer, ask, links, not_shared, read_hostfile, skew_of

CLOCK_SKEW, FREE_GIB = 2.0, 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``doctor``."""
    parser.add_argument("--hostfile", help="hosts to ask over ssh (HOST slots=N a line); without it, this machine")
    parser.add_argument("--recipe", help="also check this run's data, out dir, settings and MLflow server")
    parser.add_argument("--out", help="the run's out dir")
    parser.add_argument("--data", help="the run's training shards")
    parser.add_argument(
        "--port", type=port_number, default=29500, help="where the job's first rank listens (default: 29500)"
    )
    parser.add_argument("--json", action="store_true", help="this host's facts as JSON, or with --hostfile all answers")
    parser.add_argument("--no-links", action="store_true", help="leave the bandwidth test out")


def port_number(text: str) -> int:
    """An ``argparse`` type."""
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 1 to 65535, found {text!r}")
    return int(text)


def problems(answers: list[Answer]) -> list[str]:
    """One line for each thing that would break or spoil the job."""
    out = [f"{a.name}: {a.error}" for a in answers if a.error]
    good = [a for a in answers if a.facts]
    for a in good:
        out += [f"{a.name}: {line}" for line in _own(a.facts, a is good[0])]
        if a.facts["devices"] and a.slots > len(a.facts["devices"]):
            out.append(f"{a.name}: {a.slots} slots, but {len(a.facts['devices'])} devices; one rank a device")
        if abs(a.skew) > CLOCK_SKEW:
            out.append(f"{a.name}: its clock is {a.skew:+.0f} s off; start a time service (chrony) on it")
    for what, advice in (
        ("python", "install the same one"),
        ("collectives", "install the same driver and PyTorch"),
        ("kind", "use hosts with the same accelerators, or set DS_ACCELERATOR=cpu on all"),
        ("code", "use the same checkout on all"),
        ("config", "use the same recipe, DeepSpeed JSON and settings on all"),
    ):
        out += _different(good, what, lambda f, what=what: f.get(what), advice)
    cpus = [a for a in good if a.facts["kind"] == "cpu"]
    advice = "other bits and speed: give all the same compiler, or set MOE_CL_KERNELS=0 on all"
    out += _different(cpus, "experts", lambda f: f["experts"], advice)
    whole = [a for a in good if "error" not in a.facts.get("data", {})]  # what is broken has its own line
    out += _different(whole, "data", lambda f: f.get("data", {}).get("digest"), "bring the same shards to all hosts")
    return out


def _own(facts: dict[str, Any], first: bool) -> list[str]:
    out = []
    wrong = [f"{n} {v} (pinned {host.pins()[n]})" for n, v in facts["packages"].items() if v != host.pins().get(n, v)]
    if wrong:
        out.append(f"{', '.join(wrong[:3])}: run launchers/install.sh there")
    if facts["compiler"] == "missing" or not facts["ninja"]:
        out.append("no g++ or ninja, with which DeepSpeed compiles its parts: install g++, run launchers/install.sh")
    for key in ("disk", "data", "tracking"):
        if "error" in facts.get(key, {}):
            out.append(f"{key}: {facts[key]['error']}")
    if facts["disk"].get("free_gib", FREE_GIB) < FREE_GIB:
        out.append(f"only {facts['disk']['free_gib']:.1f} GiB free for the out dir: make room or choose another --out")
    if first and not facts["port_free"]:
        out.append("the port is in use: choose another with --port, and give it to the launcher as MASTER_PORT")
    return out


def _different(answers: list[Answer], what: str, value: Any, advice: str) -> list[str]:
    values = {a.name: value(a.facts) for a in answers}
    if len(set(values.values())) < 2:
        return []
    return [f"{what} differs: {', '.join(f'{name} {v}' for name, v in values.items())}; {advice}"]


def main(args: argparse.Namespace) -> int:
    """Ask, compare, print. 0 = all well, 1 = something to mend."""
    cfg = planned(args)
    hosts = read_hostfile(args.hostfile) if args.hostfile else {}
    if hosts and shutil.which("ssh") is None:
        raise ConfigError("doctor --hostfile asks over ssh, and there is no ssh here: install it (openssh-client)")
    names = list(hosts)
    if not names:
        facts = host.facts(cfg, args.port)
        if args.json:
            print(json.dumps(facts))
            return 0
        answers = [Answer(facts["host"], facts)]
    else:
        passed = [w for k in ("recipe", "out", "data") if getattr(args, k) for w in (f"--{k}", getattr(args, k))]
        with ThreadPoolExecutor(len(names)) as pool:
            rest = [*passed, "--port", str(args.port), *args.overrides]
            answers = list(pool.map(lambda name: ask(name, rest), names))
        for answer in answers:
            answer.slots = hosts[answer.name]
            if abs(answer.skew) > CLOCK_SKEW and (alone := skew_of(answer.name)) is not None:
                answer.skew = min(answer.skew, alone, key=abs)
    found = problems(answers) + (not_shared(answers) if cfg is not None else [])
    speed: dict[str, Any] = {}
    if len(names) > 1 and not args.no_links and not any(a.error for a in answers):
        speed = links(names, args.port)
        found += [f"links: {speed['error']}"] if "error" in speed else []
    if args.json:
        print(json.dumps({"hosts": [vars(a) for a in answers], "links": speed, "problems": found}))
    else:
        show(answers, speed, found)
    return 1 if found else 0


def planned(args: argparse.Namespace) -> config.RunConfig | None:
    """The config of the run that is planned, if a recipe was named."""
    if not args.recipe:
        if args.out or args.data or args.overrides:
            raise ConfigError("doctor: --out, --data and settings belong to a run: name it with --recipe")
        return None
    from moe_cl import methods

    given = (("out", args.out), ("data.train", args.data))
    return config.load(args.recipe, [*args.overrides, *(f"{k}={v}" for k, v in given if v)], methods.params_of)


def show(answers: list[Answer], speed: dict[str, Any], found: list[str]) -> None:
    """The table, the links and the list of problems."""
    from moe_cl.tracking.progress import table

    rows = []
    for a in answers:
        if a.facts is None:
            rows.append([a.name, "no answer", *[""] * 8])
            continue
        f = a.facts
        devices = f["devices"] or [f"{f.get('cores')} cores, {f['memory_gib']:.0f} GiB"]
        addresses = ", ".join(f"{k} {v}" for k, v in f["interfaces"].items())
        disk = f["disk"].get("error") or f"{f['disk']['free_gib']:.0f} GiB free, {f['disk']['write_mb_s']:.0f} MB/s"
        data = f.get("data", {})
        rows.append([
            a.name, f"{f['python']}, torch {f['packages'].get('torch')}, deepspeed {f['packages'].get('deepspeed')}",
            f"{len(f['devices']) or ''} {devices[0]}".strip(), f["experts"], f["collectives"],
            addresses or "none", disk,
            data.get("error") or (f"{data['samples']:,} samples" if data else "not asked"),
            f["tracking"].get("error") or f["tracking"]["state"], "unknown" if a.error else f"{a.skew:+.1f} s",
        ])  # fmt: skip
    table(
        ["host", "software", "devices", "experts", "collectives", "network", "out dir", "data", "MLflow", "clock"], rows
    )
    if speed and "error" not in speed:
        print(f"links: {speed['latency_ms']:.2f} ms, all-reduce {speed['all_reduce_mb_s']:.0f} MB/s, "
              f"all-to-all {speed['all_to_all_mb_s']:.0f} MB/s a rank")  # fmt: skip
    for line in found:
        print(f"PROBLEM  {line}")
    if not found:
        print("all well")
