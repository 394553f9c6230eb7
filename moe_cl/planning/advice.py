"""What a plan warns of, and what else could be set when it does not fit."""

from __future__ import annotations

import math
import re
from typing import Any

from moe_cl import methods
from moe_cl.config import RunConfig
from moe_cl.engine import checks
from moe_cl.planning.hardware import Hardware

GIB = 2**30
_FIGURES = re.compile(r"\d[\d.,]*")


def warnings(cfg: RunConfig, found: dict[str, Any], device: Hardware) -> list[str]:
    """One line each, most costly first; empty when nothing is wrong."""
    lines, total, step = [], found["memory_total"], found["step_seconds"]
    if not found["fits"]:
        over = (total - found["memory_room"]) / GIB
        lines.append(f"does not fit: a rank needs {total / GIB:.1f} GiB, {over:.1f} GiB more than there is")
    elif total > 0.9 * found["memory_room"]:
        lines.append("fits with less than a tenth to spare: an uneven routing or another library version may not")
    if not multiplies(found, device):
        lines.append(f"{device.name} multiplies no {found['precision']}: {_precision(cfg, device)}")
    if found["ep_nodes"] > 1:
        per_node = found["gpus_per_node"]
        divisors = [d for d in range(1, per_node + 1) if per_node % d == 0 and cfg.moe.experts % d == 0]
        lines.append(
            f"the {cfg.moe.ep_size} ranks that share experts stand on {found['ep_nodes']} nodes, all-to-all takes "
            f"{found['time']['expert all-to-all'] / step:.0%} of a step: moe.ep_size={divisors[-1]} stays inside a node"
            " (with use_data_before_expert_parallelism false)"
        )
    batch = found["batch"]
    if batch["accumulation"] > 1 and methods.get(cfg.method).in_batch_negatives and not cfg.batch.exact_large_batch:
        lines.append(
            f"with accumulation {batch['accumulation']} a sample's negatives come from "
            f"{batch['micro_batch'] * batch['ranks']} samples, not {batch['global_batch']}: "
            "batch.exact_large_batch=true keeps them all"
        )
    buffers = found["memory"]["reduction buffers"]
    if device.gpu and found["zero_stage"] and buffers > 0.25 * total:
        lines.append(
            f"ZeRO's reduction bucket takes {buffers / GIB:.1f} GiB: reduce_bucket_size in the DeepSpeed JSON lowers it"
        )
    lines += _data(found, device)
    streams, ranks = cfg.data.streams, found["ranks"]
    if streams % ranks:
        lines.append(
            f"the {ranks} ranks do not divide the {streams} streams of the order, so ranks share streams and the "
            f"cluster reads the data more than once an epoch: data.streams={math.lcm(64, ranks)} (another order)"
        )
    return lines


def multiplies(found: dict[str, Any], device: Hardware) -> bool:
    """Whether the device has products of the plan's precision."""
    return found["precision"] in ("fp32", *device.types)


def _precision(cfg: RunConfig, device: Hardware) -> str:
    """How to get a precision that the device has: a DeepSpeed JSON that names one goes before the recipe's."""
    section = checks.read_json(cfg.engine.ds_config).get("torch_autocast")
    if section is None or section.get("enabled") == "auto":
        return f"set engine.precision={device.types[0]}"
    named = {"fp16": "float16 (engine.ds_config=v100_fp16)", "bf16": "bfloat16 (engine.ds_config=gpu1_bf16)"}
    return f"take a DeepSpeed JSON whose torch_autocast says {named[device.types[0]]}"


def new(lines: list[str], known: list[str]) -> list[str]:
    """Warnings of another plan that are not about what ``known`` ones say already (figures in them differ)."""
    about = {_FIGURES.sub("", line) for line in known}
    return [line for line in lines if _FIGURES.sub("", line) not in about and not line.startswith("does not fit")]


def _data(found: dict[str, Any], device: Hardware) -> list[str]:
    lines = []
    needed = found["loader_cores_node"] / found["gpus_per_node"]
    if needed > max(1, found["workers"]):
        lines.append(
            f"decoding needs {needed:.1f} cores a rank ({found['loader_cores_node']:.0f} a node), data.workers is "
            f"{found['workers']}: set data.workers={math.ceil(1.2 * needed)}, views.implementation=device, or store "
            "smaller images"
        )
    if found["disk_mb_s_node"] * 1e6 > 0.25 * device.network:
        lines.append(
            f"reading asks {found['disk_mb_s_node']:,.0f} MB/s of a node, a quarter of its network or more: keep the "
            "shards on local disks (data.cache_dir)"
        )
    sent = sum(found["time"][k] for k in ("messages of the method", "expert all-to-all", "gradients and weights"))
    if sent > 0.4 * found["step_seconds"]:
        lines.append(
            f"messages take {sent / found['step_seconds']:.0%} of a step: give each rank more images, or use fewer"
        )
    return lines


def alternatives(cfg: RunConfig, found: dict[str, Any]) -> list[tuple[list[str], str]]:
    """(settings, what they do) that lower the memory, each to be planned in its own right."""
    out: list[tuple[list[str], str]] = []
    micro, ranks, moe = found["batch"]["micro_batch"], found["ranks"], checks.has_moe(cfg)
    resnet = cfg.model.backbone.startswith("resnet")
    checkpointing = ["model.activation_checkpointing=true"]
    if not cfg.model.activation_checkpointing:
        out.append((checkpointing, "blocks are computed again in the backward"))
    exact = methods.get(cfg.method).in_batch_negatives and not resnet
    for parts in (2, 4, 8):
        if micro % parts:
            break
        smaller = [f"batch.micro_batch={micro // parts}", "batch.accumulation=null"]
        if exact:
            smaller.append("batch.exact_large_batch=true")
        out.append((smaller, f"{parts} times as many micro-batches" + ", negatives of the whole batch" * exact))
    if not cfg.model.activation_checkpointing and micro % 4 == 0:
        out.append(([*checkpointing, *out[2][0]], "both"))
    if found["zero_stage"] < 2 and ranks > 1:
        out.append((["engine.ds_config=multinode_zero2_moe"], "ZeRO 2: gradients and optimizer over the ranks"))
    if found["zero_stage"] < 3 and ranks > 1 and not moe:
        out.append((["engine.ds_config=zero3_dense"], "ZeRO 3: weights over the ranks too"))
    if moe:
        inside = [d for d in range(cfg.moe.ep_size + 1, found["gpus_per_node"] + 1)
                  if found["gpus_per_node"] % d == 0 and cfg.moe.experts % d == 0]  # fmt: skip
        if inside:
            out.append(([f"moe.ep_size={inside[-1]}"], "experts over the ranks of a node"))
    return out
