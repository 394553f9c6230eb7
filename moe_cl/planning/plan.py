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

IMAGENET = 1_281_167
IMAGE_BYTES = 110_000  # of a JPEG: ImageNet-1k's training set is 138 GiB in 1,281,167 files, most kept below 500 px


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``plan``."""
    parser.add_argument("--recipe", help="name (see `recipes`) or path of a YAML")
    parser.add_argument("--nodes", type=whole(1), default=1, help="hosts")
    parser.add_argument("--gpus-per-node", type=whole(1), default=1, help="ranks of a host")
    parser.add_argument("--gpu", default="H100-80G", help="a card by name, or a file that --calibrate wrote")
    parser.add_argument("--network", type=float, metavar="GBIT", help="Gbit/s of a node to others (default: 400)")
    parser.add_argument(
        "--images", type=whole(1), help="training images (default: those of data.train, or ImageNet-1k)"
    )
    parser.add_argument("--image-bytes", type=whole(1), default=IMAGE_BYTES, help="bytes of an image in the shards")
    parser.add_argument("--calibrate", metavar="FILE", help="measure this machine, write FILE, and plan with it")
    parser.add_argument("--scaling", choices=("weak", "strong"), help="a table over 1, 2, 4 ... --nodes hosts: "
                        "weak keeps batch.micro_batch a rank, strong keeps the global batch")  # fmt: skip
    parser.add_argument("--simulate", action="store_true", help="also run the real code as ranks of this layout")
    parser.add_argument("--json", action="store_true", help="the plan as one line of JSON")
    parser.epilog = "Any setting of the recipe can be changed with key=value, as in `pretrain`. Exit code 1: no fit."


def main(args: argparse.Namespace) -> int:
    """Plan and print. 0 = it fits, 1 = it does not, or the simulation found something."""
    from moe_cl import methods
    from moe_cl.planning import hardware, show

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is asked of a device
    if args.calibrate:
        from moe_cl.planning import calibrate

        device = calibrate.measure()
        hardware.write(device, Path(args.calibrate))
        if not args.recipe:
            print(json.dumps(dataclasses.asdict(device)) if args.json else show.device(device, args.calibrate))
            return 0
    elif not args.recipe:
        raise ConfigError("plan needs --recipe NAME (or --calibrate FILE alone); `python -m moe_cl recipes` lists them")
    else:
        device = hardware.find(args.gpu)
    if args.network is not None:
        if not args.network > 0:
            raise ConfigError(f"--network {args.network:g}: Gbit/s above 0 are needed")
        device = dataclasses.replace(device, network=hardware.LINE * args.network * 1e9 / 8)
    cfg = config.load(args.recipe, args.overrides, methods.params_of)
    images = args.images or _images(cfg)
    if args.scaling:
        rows = scaling(cfg, args.nodes, args.gpus_per_node, device, images, args.image_bytes, args.scaling == "weak")
        print(json.dumps(rows)) if args.json else show.scaling(rows)
        return 0 if all(row["fits"] for row in rows) else 1
    found = make(cfg, args.nodes, args.gpus_per_node, device, images, args.image_bytes)
    _advise(found, cfg, args, device, images)
    failed = False
    if args.simulate:
        from moe_cl.planning import simulate

        found["simulation"] = simulate.layout(cfg, args.nodes, args.gpus_per_node)
        failed = bool(found["simulation"]["errors"])
    print(json.dumps(found)) if args.json else show.plan(found)
    return 0 if found["fits"] and not failed else 1


def _images(cfg: RunConfig) -> int:
    """Images of ``data.train``, if it is there; else ImageNet-1k's."""
    from moe_cl.data.index import resolve

    try:
        return len(resolve(cfg.data.train))
    except ConfigError:
        return IMAGENET


def make(
    cfg: RunConfig, nodes: int, per_node: int, device: Any, images: int = IMAGENET, image_bytes: int = IMAGE_BYTES
) -> dict[str, Any]:
    """The plan as plain data (see docs/cluster.md). Raises ConfigError for settings that no run would start with.

    Args:
        device: ``moe_cl.planning.hardware.Hardware``. images: of an epoch. image_bytes: of one in its shard.
    """
    from moe_cl.engine import checks, setup
    from moe_cl.planning import model
    from moe_cl.planning.trace import trace
    from moe_cl.views.spec import build_spec

    world = nodes * per_node
    config.validate(cfg)
    checks.check_moe(cfg, world)
    batch = checks.batch_identity(cfg, world)
    parts = batch.accumulation if cfg.batch.exact_large_batch else 1
    setup.check_model(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, init_from=None)),
                      batch.micro_batch * parts, world)  # fmt: skip
    tree = checks.ds_config(cfg, world, not device.gpu)
    zero, strided = zero_of(tree), bool(tree.get("use_data_before_expert_parallelism", False))
    layout = model.Layout(nodes, per_node, cfg.moe.ep_size, strided)
    precision = checks.precision_of(tree)
    steps_of = batch.micro_batch, batch.accumulation
    traced = trace(cfg, world, *steps_of, precision, device.gpu, zero.gradient_share)
    memory = model.memory(cfg, traced, layout, zero, device.gpu)
    times, outside = model.step_seconds(cfg, traced, layout, device, zero)
    step, total, room = sum(times.values()), sum(memory.values()), device.memory - device.reserve
    steps = min(cfg.schedule.max_steps or 2**62, round(cfg.schedule.epochs * (images // batch.global_batch)))
    dense, here = traced.backbone
    experts, rate = here * cfg.moe.ep_size, batch.global_batch / step
    core = model.image_seconds([(side, n) for side, n in build_spec(cfg.views).resolutions], device)
    return {
        "recipe": cfg.recipe, "method": cfg.method, "backbone": cfg.model.backbone, "gpu": device.name,
        "figures": device.source, "nodes": nodes, "gpus_per_node": per_node, "ranks": world,
        "batch": dataclasses.asdict(batch), "precision": precision, "zero_stage": zero.stage,
        "ep_size": cfg.moe.ep_size, "ep_nodes": layout.spread("expert")[1],
        "parameters": dense + experts, "active": dense + experts * cfg.moe.top_k // max(1, cfg.moe.experts),
        "memory": memory, "memory_total": total, "memory_room": round(room), "fits": total <= room,
        "time": times, "step_seconds": step, "flops": traced.flops, "steps": steps, "images": images,
        "hours": steps * step / 3600, "gpu_hours": steps * step / 3600 * world,
        "images_per_second": rate, "images_per_second_node": rate / nodes,
        "loader_cores_node": rate / nodes * core, "disk_mb_s_node": rate / nodes * image_bytes / 1e6,
        "network_mb_s_node": outside / step / 1e6, "types": device.types, "workers": cfg.data.workers,
    }  # fmt: skip


def zero_of(tree: dict[str, Any]) -> Any:
    """What the DeepSpeed JSON says about ZeRO, as ``model.Zero``."""
    from moe_cl.planning.model import Zero

    section, plain = tree.get("zero_optimization", {}), Zero()
    bucket = section.get("reduce_bucket_size", plain.bucket)
    live = section.get("stage3_max_live_parameters", plain.live)
    return Zero(section.get("stage", 0), int(plain.bucket if bucket == "auto" else bucket), int(live))


def scaling(
    cfg: RunConfig, nodes: int, per_node: int, device: Any, images: int, image_bytes: int, weak: bool
) -> list[dict[str, Any]]:
    """Plans for 1, 2, 4 ... ``nodes`` hosts; ``efficiency``: images/s a rank over the first row's."""
    if weak and cfg.batch.micro_batch is None:
        raise ConfigError("--scaling weak keeps the micro batch of a rank: set batch.micro_batch")
    rows: list[dict[str, Any]] = []
    number = 1
    while number <= nodes:
        if weak:
            one = dataclasses.replace(cfg.batch, global_batch=0)
            one.global_batch = cfg.batch.micro_batch * (cfg.batch.accumulation or 1) * number * per_node
            row = make(dataclasses.replace(cfg, batch=one), number, per_node, device, images, image_bytes)
        else:
            row = make(cfg, number, per_node, device, images, image_bytes)
        rows.append(row)
        row["efficiency"] = row["images_per_second"] / row["ranks"] * rows[0]["ranks"] / rows[0]["images_per_second"]
        number *= 2
    return rows


def _advise(found: dict[str, Any], cfg: RunConfig, args: argparse.Namespace, device: Any, images: int) -> None:
    """Adds ``warnings``, and where it does not fit ``alternatives``: other settings, planned too."""
    from moe_cl import methods
    from moe_cl.planning import advice

    found["warnings"] = advice.warnings(cfg, found, device)
    found["alternatives"] = []
    if found["fits"]:
        return
    for settings, effect in advice.alternatives(cfg, found):
        other = config.load(args.recipe, [*args.overrides, *settings], methods.params_of)
        try:
            plan = make(other, args.nodes, args.gpus_per_node, device, images, args.image_bytes)
        except ConfigError:  # a setting that this run cannot have
            continue
        kept = {key: plan[key] for key in ("memory_total", "fits", "step_seconds")}
        found["alternatives"].append({"settings": settings, "effect": effect, **kept})
    found["alternatives"].sort(key=lambda a: (not a["fits"], a["step_seconds"] if a["fits"] else a["memory_total"]))
