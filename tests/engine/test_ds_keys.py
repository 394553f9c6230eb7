"""The lists of keys are the installed DeepSpeed's; our own JSONs pass; what is not supported is one line."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from moe_cl.config import ConfigError
from moe_cl.engine import ds_keys
from tests.small import ROOT

SOURCE = Path(importlib.util.find_spec("deepspeed").origin).parent


def test_every_key_is_read_by_the_installed_deepspeed():
    folders = (
        "runtime",
        "comm",
        "monitor",
        "profiling",
        "autotuning",
        "elasticity",
        "compression",
        "inference",
        "datastates",
    )
    text = "".join(p.read_text(errors="replace") for f in folders for p in (SOURCE / f).rglob("*.py"))
    named = set(re.findall(r"""["']([a-z_0-9]+)["']""", text))
    assert not ds_keys.TOP - named


def test_keys_that_deepspeed_reads_by_constant_are_listed():
    """What ``DeepSpeedConfig`` looks up by a constant of runtime/constants.py."""
    text = (SOURCE / "runtime/constants.py").read_text()
    constants = dict(re.findall(r"""^([A-Z_0-9]+) = ["']([a-z_0-9]+)["']""", text, re.M))
    used = set(re.findall(r"get_scalar_param\(param_dict,\s*([A-Z_0-9]+),", (SOURCE / "runtime/config.py").read_text()))
    assert len(used) > 15 and not {constants[name] for name in used if name in constants} - ds_keys.TOP


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_configs_pass(path):
    plain = json.loads(path.read_text())
    assert ds_keys.check(plain, path.name) == plain


def test_a_section_that_is_no_mapping():
    with pytest.raises(ConfigError, match="bf16: expected a mapping, found True"):
        ds_keys.check({"bf16": True}, "x.json")


def test_every_key_of_zero_is_deepspeeds_own():
    assert not ds_keys.ZERO.keys() - ds_keys._defaults().keys()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"zero_optimization": {"stage": "3"}}, "x.json: zero_optimization.stage: expected int, found '3'"),
        ({"zero_optimization": {"stage": True}}, "stage: expected int, found True"),
        ({"zero_optimization": {"stage": 4}}, "stage 4 lies between 0 and 3"),
        ({"zero_optimization": {"stage": "auto"}}, "stage: expected int, found 'auto'"),
        (
            {"zero_optimization": {"zero_quantized_gradients": True}},
            "zero_quantized_gradients is not supported; remove",
        ),
        ({"data_types": {"grad_accum_dtype": "int7"}}, "data_types is not supported: set engine.precision; remove it"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is not supported: ranks are spread by moe.ep_size"),
        ({"flops_profiler": 3}, "flops_profiler is not supported: set engine.profile; remove it"),
        ({"checkpoint": 4}, "checkpoint is not supported: a run writes its own checkpoints; remove it"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine is not supported"),
        ({"pipeline": {"stages": 2}}, "pipeline is not supported"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel is not supported"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is not supported; remove it"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor is not supported; remove it"),
        ({"activation_checkpointing": {"profile": False, "cpu_checkpointing": True}}, "set model.activation_checkp"),
        ({"torch_autocast": {"enabled": True, "lower_precision_safe_modules": "x"}}, "expected a list, found 'x'"),
        ({"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["x"]}}, "'x' is no class; write it"),
        ({"torch_autocast": {"enabled": 1}}, "found 1; write it"),
        ({"elasticity": {"enabled": True}}, "changes the batch"),
    ],
)
def test_what_is_not_supported_is_one_line(config, says):
    with pytest.raises(ConfigError) as error:
        ds_keys.check(config, "x.json")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_is_switched_off_is_left_out():
    off = {
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "fp16": {"enabled": "auto"},
        "prescale_gradients": False,
        "bf16": None,
        "gradient_predivide_factor": 1.0,
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None, "profile": False},
        "data_types": {"grad_accum_dtype": None},
        "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True},
    }
    zero = {"stage": 2, "reduce_bucket_size": 5e8, "allgather_bucket_size": "auto", "zero_quantized_gradients": False}
    modules = {"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linear"]}
    found = ds_keys.check({**off, "zero_optimization": zero, "torch_autocast": modules}, "x.json")
    assert found == {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500000000}, "torch_autocast": modules}
    assert isinstance(found["zero_optimization"]["reduce_bucket_size"], int)
