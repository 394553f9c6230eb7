"""The command that starts this run again, rebuilt from what its launcher left in the environment."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from moe_cl.tracking import redact

_RANK = re.compile(r"--local[-_]rank(=|$)")  # DeepSpeed's launcher writes it


def command(resumed: bool = False) -> str:
    """One line for a shell, without credentials. It starts as many ranks on as many hosts as this process is one of.

    What only somebody at the other hosts can say stands in capitals, and a comment says what it is.

    Args:
        resumed: the run went on from an earlier one; else ``--resume``, given in case, is left out.
    """
    program, *arguments = sys.argv
    if arguments and _RANK.match(arguments[0]):
        arguments = arguments[1:] if "=" in arguments[0] else arguments[2:]
    if not resumed:
        arguments = [a for a in arguments if a != "--resume" and a.lower() != "resume=true"]
    path = Path(program)
    module = path.parent.name if path.name == "__main__.py" else None
    target, started = _started(module or program, bool(module))
    words = [*target, *(redact.setting(a) for a in arguments)]
    before = f"DS_ACCELERATOR={os.environ['DS_ACCELERATOR']} " if os.environ.get("DS_ACCELERATOR") else ""
    return f"{before}{started[0]}{shlex.join(words)}{started[1]}"


def _started(target: str, is_module: bool) -> tuple[list[str], tuple[str, str]]:
    """Words of the launcher with ``target``; what stands before them, and the comment after them."""
    env, python = os.environ, Path(sys.executable).name
    module = ["-m"] if is_module else []
    alone = [python, *module, target]
    address = f"MASTER_ADDR={env.get('MASTER_ADDR', 'HOST')} MASTER_PORT={env.get('MASTER_PORT', '29500')} "
    if "CROSS_SIZE" in env and "LOCAL_SIZE" in env:  # deepspeed
        nodes, slots = int(env["CROSS_SIZE"]), env["LOCAL_SIZE"]
        words = ["--module", target] if is_module else [target]
        if nodes == 1:
            return ["deepspeed", "--num_accelerators", slots, *words], ("", "")
        return ["deepspeed", "--hostfile", "HOSTFILE", *words], ("", f"  # HOSTFILE: {nodes} hosts, slots={slots} each")
    if "TORCHELASTIC_RUN_ID" in env:
        nodes, each = int(env.get("GROUP_WORLD_SIZE", 1)), env["LOCAL_WORLD_SIZE"]
        if nodes == 1:
            return ["torchrun", "--nproc-per-node", each, *module, target], ("", "")
        words = ["torchrun", "--nnodes", str(nodes), "--node-rank", "NUMBER", "--nproc-per-node", each]
        words += ["--master-addr", env.get("MASTER_ADDR", "HOST"), "--master-port", env.get("MASTER_PORT", "29500")]
        return [*words, *module, target], ("", f"  # on each host, NUMBER from 0 to {nodes - 1}")
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        nodes, tasks = env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES", "1"), env["SLURM_NTASKS"]
        each = str(int(tasks) // int(nodes))
        words = ["srun", "--nodes", nodes, "--ntasks", tasks, "--ntasks-per-node", each, *alone]
        first = 'MASTER_ADDR="$(scontrol show hostnames | head -n 1)" ' if nodes != "1" else ""
        return words, (first, "  # inside an allocation" if first else "")
    if "OMPI_COMM_WORLD_SIZE" in env:
        each = env.get("OMPI_COMM_WORLD_LOCAL_SIZE", env["OMPI_COMM_WORLD_SIZE"])
        words = ["mpirun", "-n", env["OMPI_COMM_WORLD_SIZE"], "--map-by", f"ppr:{each}:node", "--bind-to", "none"]
        return [*words, "-x", "MASTER_ADDR", "-x", "MASTER_PORT", *alone], (address, "")
    if int(env.get("WORLD_SIZE", 1)) > 1:  # started by hand; this starts the same ranks on one host
        return ["torchrun", "--nproc-per-node", env["WORLD_SIZE"], *module, target], ("", "")
    return alone, ("", "")
