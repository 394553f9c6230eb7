"""``plan --simulate``: the run's own code as single ranks of a large layout, on one machine (up to 1,024 ranks).

A few ranks run one after another in processes of their own, each with torch's fake process group: it has the real
number of ranks, so groups, shapes, counts and configs are those of the cluster, and a collective returns at once with
this rank's own values in the others' place. The network is shrunk in width and image size; depth, experts, methods,
DeepSpeed's config and the driver stay. What no rank alone can know, that all of them make the same collectives in the
same order, is compared afterwards.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moe_cl import config
from moe_cl.config import ConfigError, RunConfig
from moe_cl.engine.checks import read_json
from moe_cl.planning.layout import Layout

MOST, AT_ONCE, PATIENCE = 1024, 2, 900
_WIDTHS = {"dim": 16, "mlp_dim": 32, "hidden": 32, "bottleneck": 16, "out_dim": 64}


def layout(cfg: RunConfig, nodes: int, per_node: int, most: int = 4) -> dict[str, Any]:
    """Simulate the last and first rank, the last one of an expert group on most nodes, and the first of the second
    node; ``most`` of them.

    Returns:
        ranks, world, seconds, checks (what was found to be right), errors (one line each).

    Raises:
        ConfigError: more than 1,024 ranks.
    """
    check_ranks(world := nodes * per_node)
    ep = cfg.moe.ep_size
    begin = time.monotonic()
    border = _border(Layout(nodes, per_node, ep, _strided(cfg)))
    chosen = sorted(list(dict.fromkeys([world - 1, 0, border, per_node % world]))[:most])
    asked = {"world": world, "per_node": per_node, "config": config.to_tree(tiny(cfg, world))}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        facts = dict(zip(chosen, pool.map(lambda rank: _one(rank, asked), chosen), strict=True))
    checks, errors = compare(cfg, nodes, per_node, facts)
    return {"ranks": chosen, "world": world, "seconds": time.monotonic() - begin, "checks": checks, "errors": errors}


def check_ranks(world: int) -> None:
    """Raises ConfigError where so many ranks are too many."""
    if world > MOST:
        raise ConfigError(f"--simulate: {world} ranks are more than {MOST}; plan without it, or for fewer nodes")


def tiny(cfg: RunConfig, world: int) -> RunConfig:
    """The same run with narrow layers, small images and two samples a micro-batch."""
    from moe_cl.models.build import SWINS, VITS

    small = copy.deepcopy(cfg)
    name, options = cfg.model.backbone, dict(cfg.model.options)
    small.views.size, small.views.local_size = 64, 32
    if name in VITS:
        sizes = VITS[name] | options
        patch, heads = sizes.get("patch_size", 16), sizes.get("heads", 12)
        options |= {"dim": math.lcm(8, 2 * heads), "img_size": 2 * patch}
        small.views.size, small.views.local_size = 2 * patch, patch
    elif name in SWINS:
        options["dim"] = 2 * (SWINS[name] | options).get("heads", [3])[0]
    else:
        small.model.backbone = "resnet18_cifar" if name.endswith("_cifar") else "resnet18"
    small.model.options, small.model.compile, small.model.init_from = options, False, None
    if isinstance(cfg.views.local_size, list):
        small.views.local_size = [small.views.local_size]
        small.views.local_number = cfg.views.local_number and [sum(cfg.views.local_number)]
    for field, value in _WIDTHS.items():
        if hasattr(small.params, field):
            setattr(small.params, field, value)
    parts = 2 if (cfg.batch.accumulation or 1) > 1 or cfg.batch.exact_large_batch else 1
    small.batch.micro_batch, small.batch.accumulation, small.batch.global_batch = 2, parts, 2 * parts * world
    if hasattr(small.params, "queue"):
        small.params.queue = 4 * world
    small.engine.statistics = "global" if cfg.engine.statistics.startswith("group") else cfg.engine.statistics
    return small


def _one(rank: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Facts of one rank from a process of its own, or ``error``."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in drop}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moe_cl.planning.one_rank", str(rank)]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=PATIENCE, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"rank {rank}: no end within {PATIENCE} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": f"rank {rank}: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _strided(cfg: RunConfig) -> bool:
    """Whether the DeepSpeed JSON spreads the ranks of an expert group over the world."""
    return bool(read_json(cfg.engine.ds_config).get("use_data_before_expert_parallelism", False))


def _border(layout: Layout) -> int:
    """Last rank of the first expert group, of those that stand on most nodes."""
    most = layout.spread("expert").nodes
    return next(group[-1] for group in layout.groups("expert") if len(layout.nodes_of(group)) == most)


def compare(cfg: RunConfig, nodes: int, per_node: int, facts: dict[int, dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(what is right, what is wrong) over the simulated ranks' facts."""
    world = nodes * per_node
    errors = [fact["error"] for fact in facts.values() if "error" in fact]
    facts = {rank: fact for rank, fact in facts.items() if "error" not in fact}
    checks: list[str] = []

    def check(text: str, good: bool, found: Any = "") -> None:
        (checks if good else errors).append(text if good else f"{text}: not so ({found})")

    micro = (cfg.batch.global_batch // world) // (cfg.batch.accumulation or 1)
    rows = cfg.batch.micro_batch or micro
    if hasattr(cfg.params, "queue"):
        queue = cfg.params.queue
        check(f"the queue of {queue} holds the {rows * world} keys of a step", rows * world <= queue, queue)
    if not facts:
        return checks, errors
    first = next(iter(facts.values()))
    for key, text in (
        ("collectives", "all ranks make the same {n} collectives in the same order"),
        ("shapes", "all ranks hold {n} parameters of the same shapes"),
        ("stage", "all ranks have ZeRO stage {v}"),
    ):
        value = first[key]
        n = len(value) if hasattr(value, "__len__") else 0
        same = all(fact[key] == value for fact in facts.values())
        check(text.format(n=n, v=value), same, {r: str(f[key])[:60] for r, f in facts.items()})
    ep, experts = cfg.moe.ep_size, cfg.moe.experts
    for rank, fact in facts.items():
        b = fact["batch"]
        check(
            f"rank {rank}: the engine's batch is micro x accumulation x {world} ranks",
            b["global"] == b["micro"] * b["accumulation"] * world == fact["asked"], b,
        )  # fmt: skip
        check(
            f"rank {rank}: losses and gradients are finite, weights moved",
            fact["finite"] and fact["moved"],
            fact["loss"],
        )
        check(
            f"rank {rank}: its optimizer holds {fact['owned']:,} numbers, as planned ({fact['planned']:,.0f})",
            fact["planned"] <= fact["owned"] <= fact["planned"] + fact["padding"], fact["owned"],
        )  # fmt: skip
        if fact["expert_group"] is None:
            continue
        group, copies, local = fact["expert_group"], fact["copies"], experts // ep
        place = group.index(rank)
        layout = Layout(nodes, per_node, ep, fact["strided"])
        on = sorted(layout.nodes_of(group))
        where = f"node {on[0]}" if len(on) == 1 else f"nodes {on[0]} to {on[-1]}"
        check(
            f"rank {rank}: its expert group {_ranks(group)} on {where} is that of the layout",
            group == layout.group_of("expert", rank), group,
        )  # fmt: skip
        check(
            f"rank {rank}: holds experts {place * local} to {place * local + local - 1}, as {len(copies)} ranks do",
            fact["first_experts"] == [place * local] * len(fact["first_experts"])
            and copies == layout.group_of("copies", rank) and fact["local_experts"] == local,
            f"{fact['first_experts']}, {copies}",
        )  # fmt: skip
    return checks, errors


def _ranks(group: list[int]) -> str:
    return f"{group[0]}..{group[-1]} ({len(group)})"
