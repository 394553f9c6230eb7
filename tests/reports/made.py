"""An out dir as a run leaves it, with figures of the kind that training gives (seeded), in a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from moe_cl.tracking import environment
from moe_cl.tracking.journal import Journal


def make_run(out: Path, steps: int = 600, experts: int = 8, seed: int = 0, lr: float = 1e-3, layers: int = 2) -> Path:
    """Journal, config, environment, summary of a CR-MoE run."""
    rng = np.random.default_rng(seed)
    journal = Journal(out / "journal.jsonl")
    journal.event("start", step=0, total=steps)
    logits = rng.normal(0, 1.5, (layers, experts))
    drift = rng.normal(0, 1.0, (layers, experts))
    for step in range(1, steps + 1):
        t = step / steps
        loss = 5.5 * np.exp(-2.5 * t) + 2.6 + rng.normal(0, 0.05)
        values = {
            "loss": loss, "loss/contrastive": loss - 0.1, "loss/balance": 0.08 * np.exp(-5 * t) + 0.02,
            "loss/consistency": 0.03 * (1 - t) + 0.01, "lr": lr * min(1, 10 * t) * (1 + np.cos(np.pi * t)) / 2,
            "weight_decay": 0.1, "teacher_momentum": 1 - 0.01 * (1 + np.cos(np.pi * t)) / 2,
            "health/positive": 0.3 + 0.5 * t, "health/negative": 0.2 - 0.18 * t, "health/feature_std": 0.02 + 0.05 * t,
            "health/effective_rank": 4 + 50 * t + rng.normal(0, 1), "health/match_rate": 0.6 + rng.normal(0, 0.02),
            "grad/first": 1.5 * np.exp(-4 * t) + rng.gamma(2, 0.01), "grad/last": 0.4 * np.exp(-2 * t) + 0.02,
            "images_per_second": 850 + rng.normal(0, 40), "data_wait": abs(rng.normal(0.02, 0.01)),
        }  # fmt: skip
        for layer in range(layers):
            share = np.exp(logits[layer] * np.exp(-4 * t) + 0.4 * drift[layer] * np.sin(3 * t) + rng.normal(0, 0.05))
            values[f"moe/L{layer}/load"] = (share / share.sum()).tolist()
            values[f"moe/L{layer}/entropy"] = float(2.0 - 1.2 * t + rng.normal(0, 0.02))
            values[f"moe/L{layer}/agreement_cls"] = float(0.3 + 0.5 * t + rng.normal(0, 0.02))
            values[f"moe/L{layer}/agreement_patch"] = float(0.25 + 0.4 * t - 0.05 * layer + rng.normal(0, 0.02))
            values[f"health/consistency/L{layer}"] = float(0.5 - 0.3 * t + rng.normal(0, 0.01))
        journal.step(step, values, f"{step:016x}")
        if step % (steps // 6) == 0:
            journal.evaluation("knn", step, {"top1": 0.55 + 0.25 * t, "top5": 0.9 + 0.08 * t})
            journal.event("checkpoint", step=step, seconds=0.4)
    journal.close("FINISHED")
    config = {
        "method": "crmoe", "recipe": "crmoe_vit_micro_fmnist", "seed": seed, "model": {"backbone": "vit"},
        "optim": {"name": "adamw", "base_lr": lr}, "batch": {"global_batch": 256},
        "moe": {"blocks": "odd", "experts": experts, "top_k": 2, "ep_size": 2}, "data": {"train": "shards/train"},
    }  # fmt: skip
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    (out / "environment.json").write_text(json.dumps(environment.describe()))
    summary = {"knn_pixels": 0.82, "knn_untrained": 0.61, "knn_trained": 0.8 + 0.01 * seed, "linear_trained": 0.84}
    (out / "summary.json").write_text(json.dumps(summary))
    return out


if __name__ == "__main__":
    import sys

    make_run(Path(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
