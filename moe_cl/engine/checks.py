"""What can be known to be wrong before any process starts: one ConfigError, one line each."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_cl import config as settings
from moe_cl.config import ConfigError, RunConfig
from moe_cl.engine import ds_keys, regroup
from moe_cl.engine.checkpoint import store
from moe_cl.tracking import redact
from moe_cl.tracking.tail import parts

# What a run is, and of it what may differ from start to start.
SHAPING = ("method", "seed", "params", "model", "moe", "optim", "views", "schedule", "teacher", "batch")
STOPS = ("schedule.max_steps", "schedule.stop_epochs")  # where a run ends, not how it gets there
ORDER = ("data.train", "data.repeat", "data.streams", "data.window")  # with a checkpoint, the loader's
LAYOUT = (
    "moe.ep_size", "moe.recompute", "batch.micro_batch", "batch.accumulation", "batch.exact_large_batch",
    "views.implementation", "model.activation_checkpointing", "model.compile", "model.channels_last",
)  # fmt: skip
FREE = ("model.options", "views.overrides")  # mappings whose keys are the user's: compared as a whole


@dataclass(frozen=True)
class BatchIdentity:
    """global_batch = micro_batch x accumulation x ranks."""

    global_batch: int
    micro_batch: int
    accumulation: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.global_batch} = {self.micro_batch} micro x {self.accumulation} accumulation x {self.ranks} ranks"


def batch_identity(cfg: RunConfig, world: int) -> BatchIdentity:
    """The run's batch on ``world`` ranks; micro batch or accumulation is worked out when left out."""
    total, micro, accumulation = cfg.batch.global_batch, cfg.batch.micro_batch, cfg.batch.accumulation
    if min(total, world, micro or 1, accumulation or 1) < 1:
        raise ConfigError(f"batch: every size must be at least 1, found {cfg.batch}")
    if total % world:
        raise ConfigError(
            f"batch.global_batch {total} does not divide over {world} ranks; "
            f"take {max(1, round(total / world)) * world} or another number of ranks"
        )
    local = total // world
    if micro is None:
        accumulation = accumulation or 1
        if local % accumulation:
            raise ConfigError(f"batch.accumulation {accumulation} does not divide the {local} samples of a rank")
        micro = local // accumulation
    if accumulation is None:
        if local % micro:
            raise ConfigError(f"batch.micro_batch {micro} does not divide the {local} samples of a rank")
        accumulation = local // micro
    if micro * accumulation * world != total:
        raise ConfigError(
            f"batch: micro {micro} x accumulation {accumulation} x {world} ranks = {micro * accumulation * world}, "
            f"but global_batch is {total}; change one of them"
        )
    return BatchIdentity(total, micro, accumulation, world)


def has_moe(cfg: RunConfig) -> bool:
    """True if the backbone gets sparse experts."""
    return cfg.moe.blocks not in ("none", [])


def check_moe(cfg: RunConfig, world: int) -> None:
    """ep_size divides experts and ranks, top-k fits."""
    moe = cfg.moe
    if not has_moe(cfg):
        if moe.ep_size != 1:
            raise ConfigError(f"moe.ep_size {moe.ep_size} without experts: set moe.blocks (odd) or moe.ep_size=1")
        return
    if moe.ep_size < 1 or moe.experts % moe.ep_size:
        raise ConfigError(f"moe.ep_size {moe.ep_size} does not divide the {moe.experts} experts (moe.experts)")
    if world % moe.ep_size:
        raise ConfigError(f"moe.ep_size {moe.ep_size} does not divide the {world} ranks; start more ranks or lower it")
    if not 1 <= moe.top_k <= moe.experts:
        raise ConfigError(f"moe.top_k {moe.top_k} must lie between 1 and moe.experts {moe.experts}")
    if isinstance(moe.blocks, str) and moe.blocks not in ("odd", "all"):
        raise ConfigError(f"moe.blocks {moe.blocks!r}: write none, odd, all or a list of block indices")


def cpu_has_bf16() -> bool:
    """True if this CPU multiplies bf16 natively (avx512_bf16 or amx)."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def read_json(path: str) -> dict[str, Any]:
    """A DeepSpeed JSON by path, or by its name under ds_configs/ of the project: what of it is said and supported."""
    here = Path(__file__).resolve().parents[2]
    for candidate in (Path(path), here / path, here / "ds_configs" / path, here / "ds_configs" / f"{path}.json"):
        if candidate.is_file():
            try:
                tree = json.loads(candidate.read_text(encoding="utf-8"), object_pairs_hook=_once)
            except ConfigError as error:
                raise ConfigError(f"{candidate}: {error}") from None
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                raise ConfigError(f"{candidate}: not valid JSON: {' '.join(str(error).split())}") from None
            if not isinstance(tree, dict) or not isinstance(tree.get("zero_optimization", {}), dict):
                raise ConfigError(f"{candidate}: a DeepSpeed config is a mapping, and so is its zero_optimization")
            return ds_keys.check(tree, path)
    names = ", ".join(sorted(p.stem for p in (here / "ds_configs").glob("*.json")))
    raise ConfigError(f"engine.ds_config {path!r} is no file; ds_configs/ has {names}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of a JSON; of a key that stands there twice JSON would take the last."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ConfigError(f"{next(key for key in keys if keys.count(key) > 1)} stands there twice; remove one of them")
    return tree


def ds_config(cfg: RunConfig, world: int, on_cpu: bool) -> dict[str, Any]:
    """The DeepSpeed JSON with what the recipe decides filled in; saying a thing twice differently is an error."""
    config = read_json(cfg.engine.ds_config)
    name = cfg.engine.ds_config
    batch = batch_identity(cfg, world)

    def fill(key: str, value: Any, source: str) -> None:
        if key in config and config[key] not in ("auto", value):
            raise ConfigError(f"{name} has {key} = {config[key]}, but {source} = {value}; remove one of them")
        config[key] = value

    section = config.get("zero_optimization", {})
    fill("train_batch_size", batch.global_batch, "the recipe's batch.global_batch")
    fill("train_micro_batch_size_per_gpu", batch.micro_batch, "the recipe's micro batch")
    fill("gradient_accumulation_steps", batch.accumulation, "the recipe's accumulation")
    # The engine's own clipping has its norm wrong with experts; the project clips itself (optim.clip_norm).
    fill("gradient_clipping", 0.0, "clipping is the recipe's optim.clip_norm: gradient_clipping")
    stage = section.get("stage", 0)
    if stage == 3 and has_moe(cfg):
        raise ConfigError(f"{name} asks for ZeRO stage 3, which DeepSpeed's MoE does not support: use stage 0, 1 or 2")
    for key in ("contiguous_gradients", "reduce_scatter"):
        if has_moe(cfg) and stage in (1, 2) and not section.get(key, True):
            raise ConfigError(f"{name}: zero_optimization.{key} is false; experts under ZeRO 1 and 2 need it")
    _precision(config, cfg, name, on_cpu)
    # ZeRO knows torch's optimizers by exact class; ours are those, able to skip frozen groups (engine/optim.py).
    fill("zero_allow_untested_optimizer", True, "the project's optimizers need it to be")
    return config


def _precision(config: dict[str, Any], cfg: RunConfig, name: str, on_cpu: bool) -> None:
    asked = cfg.engine.precision
    section = config.get("torch_autocast")
    if section is None or section.get("enabled") == "auto":
        if asked == "auto":
            asked = "bf16" if not on_cpu or cpu_has_bf16() else "fp32"
        dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(asked)
        config["torch_autocast"] = {"enabled": dtype is not None, "dtype": dtype or "bfloat16"}
        if dtype:
            # Empty list = every module: what runs in low precision is torch.autocast's own choice of operations.
            config["torch_autocast"]["lower_precision_safe_modules"] = []
        return
    said = {"bfloat16": "bf16", "float16": "fp16"}[section.get("dtype", "bfloat16")]
    if not section["enabled"]:
        said = "fp32"
    section.setdefault("dtype", "bfloat16")
    if asked not in ("auto", said):
        raise ConfigError(f"{name} has torch_autocast {said}, but engine.precision = {asked}; remove one of them")


def precision_of(config: dict[str, Any]) -> str:
    """fp32, bf16 or fp16, as a filled-in DeepSpeed config has it."""
    section = config["torch_autocast"]
    return {"bfloat16": "bf16", "float16": "fp16"}[section["dtype"]] if section["enabled"] else "fp32"


def check_out(out: str) -> None:
    """The run's directory can be made and written to; nothing of it stays. Raises ConfigError."""
    if not out.strip():
        raise ConfigError("--out is empty; name a directory")
    check_folder("--out", out)


def check_folder(option: str, folder: str) -> None:
    """``folder`` can be made and written to; nothing of it stays. Raises ConfigError that names ``option``."""
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{option} {folder} is a file; name a directory")
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{option} {folder} cannot be written ({place}: it is a file); choose another")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".moe_cl-", dir=place))
    except OSError as error:
        raise ConfigError(f"{option} {folder} cannot be written ({place}: {error.strerror}); choose another") from None


def check_same_run(cfg: RunConfig, total: int, per_epoch: int | None = None) -> None:
    """An out dir holds one run: ConfigError if ``cfg`` would start another one there, go on as another one, or (when
    its ``total`` steps are done) would change it without an effect.

    ``per_epoch``: steps an epoch now. Schedules are functions of step and epoch: all would jump with another.
    """
    out = Path(cfg.out)
    if (last := store.latest_complete(out)) is None:
        if cfg.model.init_from:
            _check_same_start(cfg)
        return
    if not cfg.resume:
        raise ConfigError(f"{out} has checkpoints already: add --resume to continue that run, or choose another --out")
    theirs, mine = _theirs_and_mine(cfg, last)
    other = (*ORDER, *((regroup.PARTS, regroup.STATISTICS) if regroup.saved(out) else ()))  # ``check`` compares these
    if changes := [(key, was, now) for key, was, now in changed(theirs, mine) if key not in other]:
        kind = "a finished" if store.step_of(last) >= total else "an unfinished"
        raise ConfigError(
            f"{out} holds {kind} run with other settings ({listed(changes)}): --resume goes on with those it has; keep "
            "them, or give the new ones a run of their own: another --out, from these weights by model.init_from=FILE "
            f"of `checkpoint convert {out} FILE.safetensors`"
        )
    if per_epoch is not None and (was := steps_per_epoch(last)) not in (None, per_epoch):
        raise ConfigError(
            f"{out} holds a run of {was} steps an epoch, this data set gives {per_epoch} (data.train, data.repeat, "
            "data.streams): its schedule cannot change midway; choose another --out"
        )


def changed(theirs: dict[str, Any], mine: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What shapes a run and differs between two trees of settings: key, value there, value here. A key that one side
    does not have yet (settings of an older version) is no difference."""
    theirs, mine = _flat(theirs), _flat(mine)
    others = (*ORDER, regroup.STATISTICS)
    keys = [k for k in mine if (k.split(".")[0] in SHAPING and k not in (*STOPS, *LAYOUT)) or k in others]
    return [(k, theirs[k], mine[k]) for k in keys if k in theirs and theirs[k] != mine[k]]


def listed(changes: list[tuple[str, Any, Any]], most: int = 12) -> str:
    """``key old -> new`` of each, as part of a line."""
    more = f" and {len(changes) - most} more" if len(changes) > most else ""
    return ", ".join(f"{key} {was} -> {now}" for key, was, now in changes[:most]) + more


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    whole = {f"{a}.{b}": tree[a][b] for a, b in (key.split(".") for key in FREE) if b in (tree.get(a) or {})}
    flat = {k: v for k, v in settings.flatten(tree).items() if not k.startswith(tuple(f"{key}." for key in FREE))}
    if regroup.STATISTICS in flat:
        flat[regroup.STATISTICS] = regroup.spelled(flat[regroup.STATISTICS])
    return flat | whole


def begun(cfg: RunConfig) -> bool:
    """Whether ``cfg`` resumes a run of the same settings that was begun in its out dir, be it without a checkpoint."""
    theirs, mine = _theirs_and_mine(cfg)
    return _journaled(cfg) and bool(theirs) and not changed(theirs, mine)


def _check_same_start(cfg: RunConfig) -> None:
    """A run that goes on from another's step, ended before its first checkpoint: ``--resume`` is of that run, or it is
    a ConfigError. Its steps would stand among those of a run that it is not."""
    if _journaled(cfg) and (other := changed(*_theirs_and_mine(cfg))):
        raise ConfigError(
            f"{cfg.out} holds the beginning of a run with other settings ({listed(other)}): give what it had to go on "
            "with it, leave --resume out to begin anew there, or choose another --out"
        )


def _journaled(cfg: RunConfig) -> bool:
    return cfg.resume and bool(parts(Path(cfg.out) / "journal.jsonl"))


def _theirs_and_mine(cfg: RunConfig, last: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the run in the out dir (or of its checkpoint ``last``; {} if there is none) and ``cfg``'s, both
    without credentials: those are kept nowhere, and may be others at each start."""
    paths = [folder / "config.yaml" for folder in (Path(cfg.out), last) if folder is not None]
    theirs = next((settings.read_yaml(path) for path in paths if path.is_file()), {})
    return redact.value("config", theirs), redact.value("config", settings.to_tree(cfg))


def without_effect(cfg: RunConfig) -> str:
    """What ``cfg`` sets otherwise than the finished run in its out dir, as the end of a line; "" if nothing."""
    theirs, mine = map(_flat, _theirs_and_mine(cfg))
    other = [f"{k}={v} (was {theirs[k]})" for k, v in mine.items() if k in theirs and theirs[k] != v and k != "resume"]
    return f"; set otherwise now, without an effect: {', '.join(other)}" if other else ""


def steps_per_epoch(checkpoint: Path) -> int | None:
    """What the run of a checkpoint had; None where it is not said (or cannot be read: loading says what is wrong)."""
    try:
        return json.loads((checkpoint / "extra.json").read_text())["extra"].get("steps_per_epoch")
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def check_length(cfg: RunConfig) -> None:
    """Steps and epochs that do not follow one another."""
    profile = cfg.engine.profile
    if profile is not None and profile[0] > profile[1]:
        raise ConfigError(f"engine.profile {profile} takes two steps, the first of them first: [from, to]")
    if cfg.schedule.warmup_epochs > cfg.schedule.epochs:
        raise ConfigError(
            f"schedule.warmup_epochs {cfg.schedule.warmup_epochs} is longer than the {cfg.schedule.epochs} epochs; "
            "make it shorter too"
        )


def check(cfg: RunConfig, world: int) -> BatchIdentity:
    """Everything above, and the machine's own tools. Raises ConfigError."""
    on_cpu = os.environ.get("DS_ACCELERATOR", "") == "cpu"
    settings.validate(cfg)
    check_moe(cfg, world)
    batch = batch_identity(cfg, world)
    regroup.check(cfg, world, batch.micro_batch)
    ds_config(cfg, world, on_cpu)
    check_length(cfg)
    if shutil.which("g++") is None and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError(
            "no g++ found: DeepSpeed and torch.compile build their parts with it; install it (apt-get install g++)"
        )
    return batch
