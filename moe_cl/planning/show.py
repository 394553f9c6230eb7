"""A plan, a scaling table and a measured device for a person to read."""

from __future__ import annotations

from typing import Any

from moe_cl.planning.hardware import GIB, Hardware
from moe_cl.tracking.progress import count, duration, table


def plan(found: dict[str, Any]) -> None:
    """Tables of one plan."""
    b = found["batch"]
    print(f"{found['recipe']} ({found['method']}, {found['backbone']}) on {found['nodes']} x {found['gpus_per_node']} "
          f"{found['gpu']} ({found['figures']})")  # fmt: skip
    print(f"batch: {b['global_batch']} = {b['micro_batch']} micro x {b['accumulation']} accumulation x {b['ranks']} "
          f"ranks; {found['precision']}, ZeRO {found['zero_stage']}, experts over {found['ep_size']}")  # fmt: skip
    print(f"parameters: {count(found['parameters'])}, {count(found['active'])} active a token\n")
    rows = [[part, f"{size / GIB:.2f}"] for part, size in found["memory"].items() if size]
    room = f"{found['memory_total'] / GIB:.2f} of {found['memory_room'] / GIB:.1f}"
    table(["memory of a rank", "GiB"], [*rows, ["together", room]])
    print()
    rows = [[part, f"{1e3 * value:.1f}", *_sent(found, part)] for part, value in found["time"].items() if value]
    names = ["an optimizer step", "ms", "MB a rank sends", "MB out of a node"]
    table(names, [*rows, ["together", f"{1e3 * found['step_seconds']:.1f}", "", ""]])
    print(f"\n{found['steps']:,} steps on {found['images']:,} images ({found['data']['source']}): "
          f"{duration(3600 * found['hours'])} (h:mm:ss), {found['gpu_hours']:,.1f} GPU hours")  # fmt: skip
    print(f"images: {found['images_per_second']:,.0f} /s in all, {found['images_per_second_node']:,.0f} /s a node; it "
          f"decodes on {found['loader_cores_node']:.1f} cores, reads {found['disk_mb_s_node']:,.1f} MB/s and sends "
          f"{found['network_mb_s_node']:,.0f} MB/s to others")  # fmt: skip
    for line in found["warnings"]:
        print(f"WARNING  {line}")
    for other in found["alternatives"]:
        fits = "fits" if other["fits"] else "still too much"
        print(f"INSTEAD  {' '.join(other['settings'])}: {other['memory_total'] / GIB:.1f} GiB ({fits}), "
              f"{1e3 * other['step_seconds']:.0f} ms a step; {other['effect']}")  # fmt: skip
        for line in other["warnings"]:
            print(f"         but {line}")
    if "simulation" in found:
        simulation(found["simulation"])


def _sent(found: dict[str, Any], part: str) -> list[str]:
    """Megabytes of a step's messages, empty where a part has none."""
    sent = found["sent"].get(part, {"rank": 0, "node": 0})
    return [f"{sent[who] / 1e6:,.1f}" if sent[who] else "" for who in ("rank", "node")]


def simulation(found: dict[str, Any]) -> None:
    """What ``--simulate`` ran and found."""
    print(f"\nsimulated ranks {', '.join(map(str, found['ranks']))} of {found['world']} in {found['seconds']:.0f} s: "
          f"{len(found['checks'])} checks")  # fmt: skip
    for line in found["checks"]:
        print(f"OK       {line}")
    for line in found["errors"]:
        print(f"ERROR    {line}")


def scaling(rows: list[dict[str, Any]]) -> None:
    """One line a number of nodes."""
    first = rows[0]
    print(f"{first['recipe']} ({first['backbone']}) on {first['gpu']}, {first['gpus_per_node']} a node; "
          f"{first['precision']}, ZeRO {first['zero_stage']}, experts over {first['ep_size']}")  # fmt: skip
    names = ["GPUs", "batch", "GiB a rank", "step, ms", "messages, %", "images/s", "efficiency", "hours", "GPU hours"]
    table(names, [_row(row) for row in rows])
    if "simulation" in rows[-1]:
        simulation(rows[-1]["simulation"])


def _row(row: dict[str, Any]) -> list[str]:
    b, step = row["batch"], row["step_seconds"]
    batch = f"{b['global_batch']} = {b['micro_batch']} x {b['accumulation']} x {b['ranks']}"
    sent = sum(row["time"][k] for k in ("messages of the method", "expert all-to-all", "gradients and weights"))
    memory = f"{row['memory_total'] / GIB:.1f}" + ("" if row["fits"] else " (too much)")
    return [
        str(row["ranks"]), batch, memory, f"{1e3 * step:.0f}", f"{100 * sent / step:.0f}",
        f"{row['images_per_second']:,.0f}", f"{row['efficiency']:.2f}", f"{row['hours']:.1f}",
        f"{row['gpu_hours']:,.0f}",
    ]  # fmt: skip


def device(found: Hardware, path: str) -> str:
    """What was measured, in a few lines."""
    rates = ", ".join(
        f"{kind} {found.full[kind] / 1e9:,.0f} fp32 / {found.low[kind] / 1e9:,.0f} bf16" for kind in found.full
    )
    return (
        f"{found.name}: {found.source}\nGFLOP/s: {rates}\nmemory {found.stream / 1e9:.1f} GB/s"
        f"{f', new large blocks {1e-9 / found.fresh:.1f} GB/s' if found.fresh else ''}, launch "
        f"{1e6 * found.launch:.1f} us, link {found.link / 1e9:.2f} GB/s, {1e6 * found.latency:.0f} us a collective\n"
        f"one core: {1e3 * found.image:.2f} ms an image (decoding and two views)\nwritten to {path}"
    )
