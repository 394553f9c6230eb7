"""``python -m moe_cl plan``: parameters, memory, time and traffic of a run, before anything starts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from moe_cl import config
from moe_cl.arguments import whole
from moe_cl.config import ConfigError, RunConfig
from moe_cl.planning.images import Images, find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``plan``."""
    parser.add_argument("--recipe", help="name (see `recipes`) or path of a YAML")
    parser.add_argument("--nodes", type=whole(1), default=1, help="hosts")
    parser.add_argument("--gpus-per-node", type=whole(1), default=1, help="ranks of a host")
    parser.add_argument("--gpu", default="H100-80G", help="a card by name, or a file that --calibrate wrote")
    parser.add_argument("--data", help="training shards, same as data.train=PATTERN")
    parser.add_argument("--network", type=float, metavar="GBIT", help="Gbit/s of a node to others (default: 400)")
    parser.add_argument(
        "--images", type=whole(1), help="images of an epoch (default: those of data.train, or ImageNet-1k's)"
    )
    parser.add_argument(
        "--image-bytes", type=whole(1), help="of one in the shards (default: data.train's mean, or 110,000)"
    )
    parser.add_argument("--calibrate", metavar="FILE", help="measure this machine, write FILE, and plan with it")
    parser.add_argument("--scaling", choices=("weak", "strong"), help="a table over 1, 2, 4 ... and --nodes hosts: "
                        "weak keeps batch.micro_batch a rank, strong keeps the global batch")  # fmt: skip
    parser.add_argument("--simulate", action="store_true", help="also run the real code as ranks of this layout")
    parser.add_argument("--json", action="store_true", help="the plan as one line of JSON")
    parser.epilog = "Any setting of the recipe can be changed with key=value, as in `pretrain`. Exit code 1: no fit."


def main(args: argparse.Namespace) -> int:
    """Plan and print. 0 = it fits, 1 = it does not, or the simulation found something."""
    from moe_cl import methods
    from moe_cl.planning import show, simulate

    if args.simulate:
        simulate.check_ranks(args.nodes * args.gpus_per_node)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is asked of a device
    device = _device(args)
    if not args.recipe:
        print(json.dumps(dataclasses.asdict(device)) if args.json else show.device(device, args.calibrate))
        return 0
    if args.data:
        args.overrides = [*args.overrides, f"data.train={args.data}"]
    cfg = config.load(args.recipe, args.overrides, methods.params_of)
    given = any(word.startswith("data.train=") for word in args.overrides)
    images = find(cfg, given, args.images, args.image_bytes)
    if args.scaling:
        rows, cfg = scaling(cfg, args.nodes, args.gpus_per_node, device, images, args.scaling == "weak")
    else:
        rows = [make(cfg, args.nodes, args.gpus_per_node, device, images)]
        _advise(rows[0], cfg, args, device, images)
    failed = False
    if args.simulate:
        rows[-1]["simulation"] = simulate.layout(cfg, args.nodes, args.gpus_per_node)
        failed = bool(rows[-1]["simulation"]["errors"])
    if args.json:
        print(json.dumps(rows if args.scaling else rows[0]))
    else:
        show.scaling(rows) if args.scaling else show.plan(rows[0])
    return 0 if all(row["fits"] for row in rows) and not failed else 1


def _device(args: argparse.Namespace) -> Any:
    """The card named, or this machine, measured; its network as told. Raises ConfigError."""
    from moe_cl.planning import hardware

    if args.network is not None and not 0 < args.network < float("inf"):
        raise ConfigError(f"--network {args.network:g}: Gbit/s above 0 are needed")
    if args.calibrate:
        from moe_cl.planning import calibrate

        device = calibrate.measure()
        hardware.write(device, Path(args.calibrate))
    elif not args.recipe:
        raise ConfigError("plan needs --recipe NAME (or --calibrate FILE alone); `python -m moe_cl recipes` lists them")
    else:
        device = hardware.find(args.gpu)
    if args.network is not None:
        device = dataclasses.replace(device, network=hardware.LINE * args.network * 1e9 / 8)
    return device


def make(cfg: RunConfig, nodes: int, per_node: int, device: Any, images: Images | None = None) -> dict[str, Any]:
    """The plan as plain data (see docs/cluster.md). Raises ConfigError for settings that no run would start with.

    Args:
        device: ``moe_cl.planning.hardware.Hardware``. images: ImageNet-1k's where nothing is given.
    """
    from moe_cl.engine import checks, schedules, setup
    from moe_cl.planning import model
    from moe_cl.planning.layout import Layout
    from moe_cl.planning.trace import trace
    from moe_cl.views.spec import build_spec

    world, images = nodes * per_node, images or Images()
    config.validate(cfg)
    checks.check_moe(cfg, world)
    checks.check_length(cfg)
    batch = checks.batch_identity(cfg, world)
    parts = batch.accumulation if cfg.batch.exact_large_batch else 1
    setup.check_model(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, init_from=None)),
                      batch.micro_batch * parts, world)  # fmt: skip
    tree = checks.ds_config(cfg, world, not device.gpu)
    zero, strided = zero_of(tree), bool(tree.get("use_data_before_expert_parallelism", False))
    layout = Layout(nodes, per_node, cfg.moe.ep_size, strided)
    precision = checks.precision_of(tree)
    steps_of = batch.micro_batch, batch.accumulation
    traced = trace(cfg, world, *steps_of, precision, device.gpu, zero.gradient_share)
    memory = model.memory(cfg, traced, layout, zero, device.gpu)
    times, sent = model.step_seconds(cfg, traced, layout, device, zero)
    step, total, room = sum(times.values()), sum(memory.values()), device.memory - device.reserve
    steps = schedules.total_steps(cfg.schedule, images.steps_per_epoch(cfg, batch.global_batch))
    dense, here = traced.backbone
    experts, rate = here * cfg.moe.ep_size, batch.global_batch / step
    core = model.image_seconds([(side, n) for side, n in build_spec(cfg.views).resolutions], device, images.pixels)
    return {
        "recipe": cfg.recipe, "method": cfg.method, "backbone": cfg.model.backbone, "gpu": device.name,
        "figures": device.source, "nodes": nodes, "gpus_per_node": per_node, "ranks": world,
        "batch": dataclasses.asdict(batch), "precision": precision, "zero_stage": zero.stage,
        "ep_size": cfg.moe.ep_size, "ep_nodes": layout.spread("expert").nodes,
        "parameters": dense + experts, "active": dense + experts * cfg.moe.top_k // max(1, cfg.moe.experts),
        "memory": memory, "memory_total": total, "memory_room": round(room), "fits": total <= room,
        "time": times, "step_seconds": step, "flops": traced.flops, "steps": steps, "images": images.number,
        "data": dataclasses.asdict(images),
        "sent": {name: {"rank": traffic.sent, "node": traffic.outside} for name, traffic in sent.items()},
        "hours": steps * step / 3600, "gpu_hours": steps * step / 3600 * world,
        "images_per_second": rate, "images_per_second_node": rate / nodes,
        "loader_cores_node": rate / nodes * core, "disk_mb_s_node": rate / nodes * images.bytes / 1e6,
        "network_mb_s_node": sum(traffic.outside for traffic in sent.values()) / step / 1e6,
        "types": device.types, "workers": cfg.data.workers,
    }  # fmt: skip


def zero_of(tree: dict[str, Any]) -> Any:
    """What the DeepSpeed JSON says about ZeRO, as ``model.Zero``."""
    from moe_cl.planning.model import Zero

    section, plain = tree.get("zero_optimization", {}), Zero()
    bucket = section.get("reduce_bucket_size", plain.bucket)
    live = section.get("stage3_max_live_parameters", plain.live)
    return Zero(section.get("stage", 0), int(plain.bucket if bucket == "auto" else bucket), int(live))


def scaling(
    cfg: RunConfig, nodes: int, per_node: int, device: Any, images: Images, weak: bool
) -> tuple[list[dict[str, Any]], RunConfig]:
    """Plans for 1, 2, 4 ... and ``nodes`` hosts, and the settings of the last one.

    ``efficiency``: images/s a rank over the first row's.
    """
    if weak and cfg.batch.micro_batch is None:
        raise ConfigError("--scaling weak keeps the micro batch of a rank: set batch.micro_batch")
    rows: list[dict[str, Any]] = []
    for number in [*(2**n for n in range(nodes.bit_length()) if 2**n < nodes), nodes]:
        if weak:
            total = cfg.batch.micro_batch * (cfg.batch.accumulation or 1) * number * per_node
            cfg = dataclasses.replace(cfg, batch=dataclasses.replace(cfg.batch, global_batch=total))
        row = make(cfg, number, per_node, device, images)
        rows.append(row)
        row["efficiency"] = row["images_per_second"] / row["ranks"] * rows[0]["ranks"] / rows[0]["images_per_second"]
    return rows, cfg


def _advise(found: dict[str, Any], cfg: RunConfig, args: argparse.Namespace, device: Any, images: Images) -> None:
    """Adds ``warnings``, and where it does not fit ``alternatives``: other settings that need less, planned too."""
    from moe_cl import methods
    from moe_cl.planning import advice

    found["warnings"] = advice.warnings(cfg, found, device)
    found["alternatives"] = []
    if found["fits"]:
        return
    for settings, effect in advice.alternatives(cfg, found):
        other = config.load(args.recipe, [*args.overrides, *settings], methods.params_of)
        try:
            plan = make(other, args.nodes, args.gpus_per_node, device, images)
        except ConfigError:  # a setting that this run cannot have
            continue
        if not advice.multiplies(plan, device) or plan["memory_total"] >= found["memory_total"]:
            continue
        kept = {key: plan[key] for key in ("memory_total", "fits", "step_seconds")}
        kept["warnings"] = advice.new(advice.warnings(other, plan, device), found["warnings"])
        found["alternatives"].append({"settings": settings, "effect": effect, **kept})
    found["alternatives"].sort(key=lambda a: (not a["fits"], a["step_seconds"] if a["fits"] else a["memory_total"]))
