"""Every JSON of ds_configs/ is plain DeepSpeed: read by DeepSpeed's own config class, batch and all."""

import json
from pathlib import Path

import pytest

from moe_cl.config import RunConfig
from moe_cl.engine import checks

FOLDER = Path(__file__).parents[2] / "ds_configs"
EXPECTED = {
    "cpu_zero1": (1, None), "gpu1_bf16": (0, "bf16"), "gpu8_zero1_moe": (1, "bf16"), "multinode_zero2_moe": (2, "bf16"),
    "zero3_dense": (3, "bf16"), "v100_fp16": (1, "fp16"),
}  # fmt: skip


def test_no_json_is_forgotten():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_deepspeed_reads_it(name, monkeypatch):
    from deepspeed.runtime.config import DeepSpeedConfig

    stage, precision = EXPECTED[name]
    plain = json.loads((FOLDER / f"{name}.json").read_text())
    assert plain["gradient_clipping"] == 0.0, "DeepSpeed's default is 1.0; it is always written"
    assert not {"train_batch_size", "train_micro_batch_size_per_gpu", "optimizer"} & set(plain), "the recipe's business"
    cfg = RunConfig()
    cfg.engine.ds_config, cfg.batch.global_batch = name, 96
    filled = checks.ds_config(cfg, 1, on_cpu=True)
    read = DeepSpeedConfig(filled)
    assert read.zero_optimization_stage == stage
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_clipping) == (96, 96, 0.0)
    if precision:
        assert checks.precision_of(filled) == precision
