"""What a save costs the step loop, in steps, and what a load takes: beside torch.save and torch.load of the same state.

    python -m benchmarks.checkpoint [--quick]

CR-MoE on VMoE-S/16 (its teacher and AdamW's moments in the checkpoint), the driver and the checkpointer of a real run
on one rank. Plain steps and steps with a save alternate; what a save costs is the median of (save call + the
steps while it is written) - (as many plain steps), in plain steps. A load ends with the state in the running modules;
ours checks every sha256 on the way. The last lines before the JSON are the section for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
TARGETS = {"stall_call": 1.0, "cost_asynchronous": 2.0}


def build(folder: Path, quick: bool):
    """Parts of a run, and a batch."""
    import torch

    from moe_cl import methods
    from moe_cl.config import BatchConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig, TeacherConfig, build
    from moe_cl.engine import ranks, setup
    from moe_cl.views.spec import Batch

    size, samples = (64, 8) if quick else (224, 8)
    options = {"dim": 192, "depth": 4, "heads": 3, "img_size": size} if quick else {}
    params = build(methods.params_of("crmoe"), {"mlp_dim": 512} if quick else {})
    cfg = RunConfig(method="crmoe", params=params, teacher=TeacherConfig(0.99))
    cfg.model, cfg.moe = ModelConfig("vmoe_small", options), MoEConfig("odd", experts=16)
    cfg.batch, cfg.optim = BatchConfig(samples), OptimConfig("adamw")
    cfg.engine.precision, cfg.engine.ds_config = "fp32", "ds_configs/cpu_zero1.json"
    comm = ranks.init(ranks.from_environment(), 600)
    built = setup.build(cfg, comm)
    boxes = torch.tensor([0.1, 0.1, 0.8, 0.8, 0.0]).expand(2, samples, 5).clone()
    ids = torch.arange(samples)
    return built.parts, Batch([torch.randn(2 * samples, 3, size, size)], boxes, ids, ids, ids)


def measure(quick: bool) -> dict[str, float]:
    """Ratios to a plain step, and the figures behind them."""
    import torch

    from moe_cl.config import CheckpointConfig
    from moe_cl.engine.checkpoint import Checkpointer, latest_complete
    from moe_cl.engine.step import step

    torch.set_num_threads(2)
    folder = Path(tempfile.mkdtemp(prefix="moe_cl-checkpoint-"))
    try:
        parts, batch = build(folder, quick)
        make = lambda name, asynchronous: Checkpointer(  # noqa: E731
            folder / name,
            CheckpointConfig(asynchronous=asynchronous, keep_last=1),
            parts.comm,
            parts.engine,
            parts.student,
            parts.teacher,
            parts.method,
        )
        savers = {"asynchronous": make("a", True), "synchronous": make("s", False)}
        number, plain, calls = 0, [], []
        inner = parts.engine.optimizer.optimizer  # torch's, under ZeRO
        loads: dict[str, list[float]] = {"load": [], "torch_load": []}
        costs: dict[str, list[float]] = {name: [] for name in (*savers, "torch.save")}

        def one() -> float:
            nonlocal number
            begin = time.perf_counter()
            step(parts, [batch], number, 0.99)
            number += 1
            return time.perf_counter() - begin

        for _ in range(3):
            one()
        span = 6 if quick else 4
        for _ in range(3 if quick else 5):
            base = sum(one() for _ in range(span))
            plain.append(base / span)
            for name, saver in savers.items():
                begin = time.perf_counter()
                saver.save(number, {})
                if name == "asynchronous":
                    calls.append(time.perf_counter() - begin)
                for _ in range(span):
                    one()
                saver.wait()
                costs[name].append((time.perf_counter() - begin - base) / (base / span))
            begin = time.perf_counter()
            state = [parts.student.state_dict(), parts.teacher.module.state_dict(), inner.state_dict()]
            with open(folder / "plain.pt", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            costs["torch.save"].append((time.perf_counter() - begin) / (base / span))
            begin = time.perf_counter()
            savers["asynchronous"].load()
            loads["load"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            state = torch.load(folder / "plain.pt", weights_only=True)
            for module, values in zip((parts.student, parts.teacher.module, inner), state, strict=True):
                module.load_state_dict(values)
            loads["torch_load"].append(time.perf_counter() - begin)
        size = sum(p.stat().st_size for p in latest_complete(folder / "a").iterdir())
        median = statistics.median
        return {
            "stall_call": median(calls) / median(plain),
            **{f"cost_{name}": median(values) for name, values in costs.items()},
            "load_ratio": median(a / b for a, b in zip(loads["load"], loads["torch_load"], strict=True)),
            **{f"{name}_ms": 1e3 * median(values) for name, values in loads.items()},
            "step_ms": 1e3 * median(plain),
            "call_ms": 1e3 * median(calls),
            "megabytes": size / 1e6,
            "torch_megabytes": (folder / "plain.pt").stat().st_size / 1e6,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def section(found: dict[str, float], quick: bool) -> str:
    """The table for benchmarks/README.md."""
    command = "python -m benchmarks.checkpoint" + (" --quick" if quick else "")
    target = {name: f"{limit:g}" for name, limit in TARGETS.items()}
    rows = [
        ("stall of the save call (copy to host memory)", "stall_call", f"{found['call_ms']:.0f} ms"),
        ("whole cost of an asynchronous save", "cost_asynchronous", ""),
        ("whole cost of a synchronous save", "cost_synchronous", ""),
        ("`torch.save` of the same state, flushed", "cost_torch.save", ""),
    ]
    return "\n".join(
        [
            "## checkpoint\n",
            f"`{command}`: {found['megabytes']:.0f} MB a checkpoint (`torch.save`: {found['torch_megabytes']:.0f} MB), "
            f"a plain step takes {found['step_ms']:.0f} ms.\n",
            "| | steps | | target |\n|---|---|---|---|",
            *(f"| {text} | {found[name]:.2f} | {more} | {target.get(name, '')} |" for text, name, more in rows),
            "",
            "| | ms | of `torch.load` |\n|---|---|---|",
            f"| load into the run, every sha256 checked | {found['load_ms']:.0f} | {found['load_ratio']:.2f} |",
            f"| `torch.load` and `load_state_dict` | {found['torch_load_ms']:.0f} | 1 |",
        ]
    )


def main() -> int:
    """Print the table; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small network")
    quick = parser.parse_args().quick
    found = measure(quick)
    print(section(found, quick))
    ratios = {name: round(value, 3) for name, value in found.items()}
    met = all(found[name] <= limit for name, limit in TARGETS.items())
    print(json.dumps({"benchmark": "checkpoint", "ratios": ratios, "targets": TARGETS, "met": met}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
