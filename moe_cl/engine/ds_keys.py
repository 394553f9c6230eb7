"""What a DeepSpeed JSON may say here: the keys that this project supports, each of its kind; anything else is one line.

DeepSpeed ignores a top-level key it does not know, and takes many values as they are: a misspelt key would change
nothing and say nothing, a wrong value would end every rank with a traceback, and whole sections (another precision,
another layout, other checkpoints) would work against what a recipe says.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from moe_cl.config import ConfigError
from moe_cl.typed import Count, Range, convert, nearest

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
# Filled in by ``checks.ds_config``, which refuses what the recipe says otherwise.
RECIPES = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
    "zero_allow_untested_optimizer".split()
)
SCALARS: dict[str, Any] = {
    "steps_per_print": Count | None,
    "communication_data_type": Literal["fp32", "fp16", "bf16"] | None,
    "gradient_allreduce_op": Literal["mean"],  # a sum would make the gradients depend on the number of ranks
    **dict.fromkeys(
        "dump_state disable_python_gc wall_clock_breakdown memory_breakdown zero_force_ds_cpu_optimizer "
        "use_data_before_expert_parallelism".split(),
        bool,
    ),
}
_NUMBERS, _SOME = Annotated[int, Range(0, 2**63 - 1)], Annotated[int, Range(1, 2**63 - 1)]
ZERO: dict[str, Any] = {
    "stage": Annotated[int, Range(0, 3)],
    "overlap_comm": bool | None,
    **dict.fromkeys(
        "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions "
        "round_robin_gradients ignore_unused_parameters stage3_gather_16bit_weights_on_model_save".split(),
        bool,
    ),
    **dict.fromkeys("reduce_bucket_size allgather_bucket_size sub_group_size".split(), _SOME),
    **dict.fromkeys(
        "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold "
        "stage3_max_live_parameters stage3_max_reuse_distance".split(),
        _NUMBERS,
    ),
}
AUTOCAST = frozenset({"enabled", "dtype", "lower_precision_safe_modules"})
# DeepSpeed offloads to its own CPU Adam and refuses other optimizers; those here are the recipes' (engine/optim.py).
OFFLOAD = ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param")
REWRITING = ("bfloat16", "elasticity", "compression_training", "autotuning")
_MLFLOW, _RANKS = "a run's figures go to MLflow (track.uri)", "ranks are spread by moe.ep_size and ZeRO"
INSTEAD = {
    "activation_checkpointing": "set model.activation_checkpointing",
    "compile": "set model.compile",
    "flops_profiler": "set engine.profile",
    "checkpoint": "a run writes its own checkpoints",
    "datastates_ckpt": "a run writes its own checkpoints",
    "data_types": "set engine.precision",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _MLFLOW),
    **dict.fromkeys(("tensor_parallel", "expert_parallel", "pipeline", "hybrid_engine"), _RANKS),
}


def check(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``config`` without what it switches off, numbers as numbers. Raises ConfigError on every key that is unknown or
    unsupported, with the nearest key, and on a value of another kind."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key not in TOP:
            raise ConfigError(f"{name}: DeepSpeed knows no key {key}{nearest(key, sorted(TOP))}")
        if key in ("optimizer", "scheduler"):
            raise ConfigError(
                f"{name} has an optimizer or scheduler; these belong to the recipe (optim, schedule): remove them"
            )
        if key in RECIPES:
            out[key] = value
        elif key in SCALARS:
            out[key] = convert(SCALARS[key], value, f"{name}: {key}")
        elif key == "zero_optimization":
            out[key] = _zero(_mapping(value, f"{name}: {key}"), f"{name}: {key}")
        elif key == "torch_autocast":
            if value is not None:
                out[key] = _autocast(_mapping(value, f"{name}: {key}"), name)
        elif not _off(key, value, name):
            _refuse(key, name)
    return out


def _refuse(key: str, name: str) -> None:
    if key in ("bf16", "fp16"):
        raise ConfigError(
            f"{name} has {key}.enabled, which casts batch norm and every parameter; "
            f"set engine.precision={key} instead (torch_autocast, parameters stay fp32)"
        )
    if key in REWRITING:
        raise ConfigError(f"{name} has {key}, which changes the batch, the network or its precision: remove it")
    raise ConfigError(f"{name}: {key} is not supported{f': {INSTEAD[key]}' if key in INSTEAD else ''}; remove it")


def _off(key: str, value: Any, name: str) -> bool:
    """Whether a key that is not supported says nothing: false or none, a section that is not enabled or says
    nothing in any of its keys, a factor of 1."""
    if key in ("bf16", "fp16"):
        return value is None or _mapping(value, f"{name}: {key}").get("enabled", False) in (False, "auto")
    if key == "gradient_predivide_factor":
        return value is None or (type(value) in (int, float) and value == 1)
    if isinstance(value, dict):
        # "aio" is of offloading to disks alone, which is refused where it is asked for (OFFLOAD).
        said = [x for x in value.values() if x is not None and x is not False and x != "auto"]
        return key == "aio" or value.get("enabled") is False or not said
    return value is None or value is False


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a mapping, found {value!r}")
    return value


def _autocast(section: dict[str, Any], name: str) -> dict[str, Any]:
    for key in section:
        if key not in AUTOCAST:
            raise ConfigError(f"{name}: DeepSpeed knows no key torch_autocast.{key}{nearest(key, sorted(AUTOCAST))}")
    enabled = section.get("enabled")  # left out, DeepSpeed would take it for false
    if not isinstance(enabled, bool) and enabled != "auto":
        found = repr(enabled) if "enabled" in section else "none"
        raise ConfigError(
            f'{name}: torch_autocast.enabled is true, false or "auto", found {found}; write it, or remove the '
            "section and set engine.precision"
        )
    if section.get("dtype", "bfloat16") not in ("bfloat16", "float16"):
        raise ConfigError(f"{name}: torch_autocast.dtype is bfloat16 or float16, found {section['dtype']!r}")
    where = f"{name}: torch_autocast.lower_precision_safe_modules"
    for path in convert(list[str], section.get("lower_precision_safe_modules", []), where):
        package, _, kind = path.rpartition(".")
        try:
            found = getattr(importlib.import_module(package), kind, None)
        except (ImportError, ValueError):  # ValueError: an empty or relative name
            found = None
        if not isinstance(found, type):
            raise ConfigError(f"{where}: {path!r} is no class; write it like 'torch.nn.Linear', or [] for all modules")
    return dict(section)


def _zero(section: dict[str, Any], where: str) -> dict[str, Any]:
    out = {}
    for key, value in section.items():
        if key in OFFLOAD:
            if value and (not isinstance(value, dict) or value.get("device", "none") != "none"):
                raise ConfigError(
                    f"{where}.{key} is not supported: the recipes' optimizers run on the device; remove it and take "
                    "more ranks, ZeRO stage 2 (3 without experts) or model.activation_checkpointing"
                )
        elif key in ZERO:
            if value != "auto" or key == "stage":  # "auto" is DeepSpeed's own default
                out[key] = convert(ZERO[key], value, f"{where}.{key}")
        elif key not in (defaults := _defaults()):
            raise ConfigError(f"{where}: DeepSpeed knows no key {key}{nearest(key, sorted(defaults))}")
        elif value != "auto" and value != defaults[key]:
            raise ConfigError(f"{where}.{key} is not supported; remove it")
    return out


def _defaults() -> dict[str, Any]:
    """DeepSpeed's own value of every key of zero_optimization (it is imported only for this)."""
    from moe_cl.engine.ranks import quiet

    with quiet():
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {field.alias or name: field.default for name, field in DeepSpeedZeroConfig.model_fields.items()}
