"""Keys and values of a DeepSpeed JSON, held against DeepSpeed's own config models before anything starts.

DeepSpeed ignores a top-level key it does not know, so a misspelt one would change nothing and say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from moe_cl.config import ConfigError
from moe_cl.typed import Count, convert, nearest

# What DeepSpeed 0.19 reads at the top level (deepspeed/runtime/constants.py and runtime/config.py).
TOP = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation "
    "optimizer scheduler zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print "
    "bf16 bfloat16 fp16 torch_autocast gradient_clipping communication_data_type seq_parallel_communication_data_type "
    "prescale_gradients gradient_predivide_factor gradient_allreduce_op disable_allgather dump_state disable_python_gc "
    "wall_clock_breakdown memory_breakdown checkpoint data_types dataloader_drop_last log_level "
    "use_data_before_expert_parallelism activation_checkpointing comms_logger tensorboard wandb csv_monitor comet "
    "flops_profiler autotuning hybrid_engine pipeline data_efficiency aio datastates_ckpt weight_quantization compile "
    "timers tensor_parallel expert_parallel elasticity compression_training".split()
)
AUTOCAST = frozenset({"enabled", "dtype", "lower_precision_safe_modules"})
# DeepSpeed takes these as they are; a wrong one would end the run when it is first used.
SCALARS: dict[str, Any] = {
    "steps_per_print": Count | None,
    "communication_data_type": Literal["fp32", "fp16", "bf16"] | None,
    "gradient_allreduce_op": Literal["mean"],  # a sum would make the gradients depend on the number of ranks
    **dict.fromkeys(
        "prescale_gradients disable_allgather dump_state disable_python_gc wall_clock_breakdown memory_breakdown "
        "zero_force_ds_cpu_optimizer use_data_before_expert_parallelism".split(),
        bool,
    ),
}
# DeepSpeed offloads to its own CPU Adam and refuses other optimizers; those here are the recipes' (engine/optim.py).
OFFLOAD = ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param")


def check(config: Mapping[str, Any], name: str) -> None:
    """Every key known, every value of a kind DeepSpeed takes. Raises ConfigError with the nearest key."""
    for key in config:
        if key not in TOP:
            raise ConfigError(f"{name}: DeepSpeed knows no key {key}{nearest(key, sorted(TOP))}")
    autocast = config.get("torch_autocast")
    if autocast is not None:
        if not isinstance(autocast, dict):
            raise ConfigError(f"{name}: torch_autocast: expected a mapping, found {autocast!r}")
        for key in autocast:
            if key not in AUTOCAST:
                raise ConfigError(
                    f"{name}: DeepSpeed knows no key torch_autocast.{key}{nearest(key, sorted(AUTOCAST))}"
                )
        if autocast.get("enabled") not in (True, False, "auto"):  # left out, DeepSpeed would take it for false
            found = repr(autocast["enabled"]) if "enabled" in autocast else "none"
            raise ConfigError(
                f'{name}: torch_autocast.enabled is true, false or "auto", found {found}; write it, or remove the '
                "section and set engine.precision"
            )
        if autocast.get("dtype", "bfloat16") not in ("bfloat16", "float16"):
            raise ConfigError(f"{name}: torch_autocast.dtype is bfloat16 or float16, found {autocast['dtype']!r}")
    for key, kind in SCALARS.items():
        if key in config:
            convert(kind, config[key], f"{name}: {key}")
    section = config.get("zero_optimization")
    for key in OFFLOAD if isinstance(section, dict) else ():
        value = section.get(key)
        if value and (not isinstance(value, dict) or value.get("device", "none") != "none"):
            raise ConfigError(
                f"{name}: zero_optimization.{key} is not supported: the recipes' optimizers run on the device; remove "
                "it and take more ranks, ZeRO stage 2 (3 without experts) or model.activation_checkpointing"
            )
    for section, model in _models(config).items():
        _check_section(config[section], model, f"{name}: {section}")


def _models(config: Mapping[str, Any]) -> dict[str, type]:
    """The sections that are there and that DeepSpeed has a model for (it is imported only for them)."""
    if not {"zero_optimization", "bf16", "fp16", "tensorboard", "wandb", "csv_monitor", "compile"} & config.keys():
        return {}
    from moe_cl.engine.ranks import quiet

    with quiet():
        from deepspeed.compile.config import CompileConfig
        from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {
        "zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig, "wandb": WandbConfig, "csv_monitor": CSVConfig, "compile": CompileConfig,
    }  # fmt: skip
    return {section: model for section, model in models.items() if section in config}


def _check_section(section: Any, model: type, where: str) -> None:
    from pydantic import ValidationError

    if not isinstance(section, dict):
        raise ConfigError(f"{where}: expected a mapping, found {section!r}")
    try:
        model(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = {field.alias or name for name, field in model.model_fields.items()}
            raise ConfigError(f"{where}: DeepSpeed knows no key {key}{nearest(key, sorted(known))}") from None
        text = " ".join(first["msg"].split())
        raise ConfigError(f"{where}.{key}: {text}, found {first['input']!r}") from None
