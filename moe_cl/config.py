"""One typed tree for a run: recipe YAML + ``a.b=c`` overrides; an unknown key is an error with the nearest name.

A recipe names its method (``method: crmoe``) and gives the method's own hyper-parameters under ``params``; their type
is the method's ``Params`` dataclass, handed in by the caller (this file imports nothing of ours).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from moe_cl.typed import (
    Amount,
    ConfigError,
    Count,
    Few,
    Natural,
    Pixels,
    Positive,
    Range,
    Rate,
    Ratio,
    Seconds,
    Share,
    build,
    nearest,
)

__all__ = ["RECIPES", "ConfigError", "RunConfig", "build", "flatten", "from_tree", "load", "save", "to_tree"]

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class DataConfig:
    """Where samples come from and how their order is shuffled."""

    train: str = ""  # brace pattern, folder with dataset.json or URL; several joined by "::"
    repeat: list[Few] = field(default_factory=lambda: [1])  # whole passes an epoch of each source
    streams: Count = 64  # C of the order promise: position p belongs to stream p mod C
    window: Count = 4096  # samples of a stream shuffled together
    workers: Annotated[int, Range(0, 1024)] = 1  # decoding processes a rank; 0 = in the training process
    prefetch: Annotated[int, Range(0, 10_000)] = 4  # batches ready ahead
    cache_dir: str | None = None  # remote shards' spans are kept here
    cache_bytes: Annotated[int, Range(1)] = 10_000_000_000
    retry_seconds: Seconds = 300.0  # transient faults are retried this long, then the run saves and stops
    max_bad_fraction: Share = 0.01
    max_pixels: Annotated[int, Range(1)] = 100_000_000  # header gate before decoding
    decoder: Literal["auto", "simplejpeg", "opencv", "torchvision", "pil"] = "auto"
    labels: Literal["optional", "required"] = "optional"  # required: a sample without one is replaced
    log_sample_ids: bool = False


@dataclass
class ViewsConfig:
    """Which views of a sample, see ``moe_cl.views.spec``."""

    spec: str = "mocov3"
    size: Pixels = 224
    crop_min: Annotated[float, Range(above=0, high=1)] | None = None  # smallest area of a global crop; None: the spec's
    local_size: Pixels | list[Pixels] = 96  # a list: several local resolutions
    local_number: Natural | list[Natural] | None = None  # of each local size; None = the spec's own
    keys: Few | None = None  # JCL: key views a sample
    implementation: Literal["fast", "reference", "device"] = "fast"
    normalize: Literal["imagenet", "half"] = "imagenet"
    overrides: dict[str, Any] = field(default_factory=dict)  # fields of every crop's colour pipeline


@dataclass
class ModelConfig:
    """The backbone, by the name that ``moe_cl.models.build_backbone`` knows."""

    backbone: str = "vit_small"
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of that backbone
    drop_path: Rate = 0.0
    activation_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    init_from: str | None = None  # weights to start from: a checkpoint directory or an exported file


@dataclass
class MoEConfig:
    """Sparse experts in the blocks of a ViT (CR-MoE: odd blocks, 16 experts, top-2, hidden 2d, no noise)."""

    blocks: str | list[Natural] = "none"  # none, odd, all, or indices
    experts: Annotated[int, Range(1, 65536)] = 16
    top_k: Count = 2
    hidden_ratio: Ratio = 2.0  # expert hidden width / model width
    gate: Literal["vmoe", "shazeer"] = "vmoe"  # shazeer: learned noise, softmax over the k chosen
    noise_std: Amount = 0.0  # router noise is N(0, (noise_std/experts)^2) in training
    renormalize: bool = False
    load: Literal["corrected", "published"] = "corrected"  # thresholds of the smooth load, where there is noise
    z_loss: Amount = 0.0  # coefficient of log(sum(exp(logits)))^2
    init: Literal["published", "xavier"] = "published"
    ep_size: Count = 1
    recompute: bool = False


@dataclass
class OptimConfig:
    """Optimizer and its decay groups, as each paper has them."""

    name: Literal["sgd", "lars", "adamw"] = "adamw"
    base_lr: Amount = 1.5e-4
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"  # of base_lr: global/256, sqrt(global), 1
    weight_decay: Amount = 0.1
    weight_decay_end: Amount | None = None  # cosine to this value
    decay: Literal["all", "matrices"] = "all"  # which parameters are decayed
    momentum: Rate = 0.9
    betas: Annotated[list[Rate], Range(length=2)] = field(default_factory=lambda: [0.9, 0.999])
    eps: Positive = 1e-8
    trust_coefficient: Positive = 1e-3  # LARS
    clip_per_tensor: Amount = 0.0  # EsViT: each tensor's own norm; 0 = off
    clip_norm: Amount = 0.0  # global norm, experts included; 0 = off


@dataclass
class ScheduleConfig:
    """Length of the run and the learning rate over it."""

    epochs: Positive = 100.0
    max_steps: Count | None = None  # stops earlier; schedules keep the length of ``epochs``
    stop_epochs: Positive | None = None  # the same in epochs: the first phase of a run in two
    warmup_epochs: Amount = 0.0
    kind: Literal["cosine", "step", "constant", "dino"] = "cosine"
    per: Literal["iteration", "epoch"] = "iteration"
    milestones: list[Natural] = field(default_factory=list)
    gamma: Positive = 0.1
    min_lr: Amount = 0.0


@dataclass
class TeacherConfig:
    """EMA of the student."""

    momentum: Share = 0.99
    schedule: Literal["constant", "cosine", "dino"] = "cosine"
    momentum_end: Share = 1.0


@dataclass
class BatchConfig:
    """global = micro x accumulation x data-parallel ranks; one of the first two may be left out."""

    global_batch: Count = 256
    micro_batch: Count | None = None
    accumulation: Count | None = None
    exact_large_batch: bool = False


@dataclass
class EngineConfig:
    """DeepSpeed and precision."""

    ds_config: str = "ds_configs/cpu_zero1.json"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    collective_timeout: Annotated[float, Range(above=0, high=1e8)] = 600.0  # seconds
    statistics: str = "global"  # of balance and consistency: global, published (per rank) or "group: N" images
    profile: Annotated[list[Natural], Range(length=2)] | None = None  # [from, to] steps: Chrome trace
    peak_tflops: Positive | None = None  # of one rank in the run's precision, for the journal's mfu; None = no mfu
    threads: Few | None = None  # torch threads a rank; None = its own cores, or its share of shared ones

    def __post_init__(self) -> None:
        self.statistics = re.sub(r"^group:\s*", "group: ", self.statistics)  # one spelling: runs are compared by it


@dataclass
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: Count | None = None
    every_epochs: Positive = 1.0
    keep_last: Count = 2
    keep_every: Count | None = None  # steps; kept for ever
    keep_best: str | None = None  # metric whose best checkpoint is kept
    asynchronous: bool = True


@dataclass
class EvalConfig:
    """Online kNN during pretraining, of the side that the method's authors evaluate."""

    knn_every: Amount = 0.0  # epochs; 0 = only when asked for
    bank: str = ""  # labelled training shards
    test: str = ""
    k: Count = 20
    temperature: Positive = 0.07
    size: Pixels | None = None  # resize of evaluation images; None = views.size


@dataclass
class TrackConfig:
    """Journal and MLflow."""

    uri: str | None = None  # None = MLFLOW_TRACKING_URI, else SQLite in the out dir; "none" = journal only
    experiment: str = "moe_cl"
    run_name: str | None = None
    plain_seconds: Seconds = 30.0  # between lines on the console when it is no terminal
    every: Natural = 0  # a line there every so many steps too; 0 = by time alone
    flush_seconds: Seconds = 30.0  # at the end, at most


@dataclass
class RunConfig:
    """A whole run. ``params`` is the ``Params`` dataclass of the method named by ``method``."""

    method: str = "crmoe"
    recipe: str = ""
    follows: str = ""  # the recipe whose run this one goes on from (model.init_from): two phases of one training
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    out: str = "runs/default"
    resume: bool = False
    params: Any = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


ParamsOf = Callable[[str], type]


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The YAML of a recipe given by name or by path. Raises ConfigError with the nearest name."""
    for path in (RECIPES / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    raise ConfigError(f"unknown recipe {name!r}{nearest(name, recipe_names())}; `python -m moe_cl recipes` lists them")


def load(recipe: str, overrides: Sequence[str], params_of: ParamsOf) -> RunConfig:
    """A recipe with overrides ``a.b=c`` (values are YAML), typed. Raises ConfigError."""
    path = recipe_path(recipe)
    tree = read_yaml(path)
    for override in overrides:
        _set(tree, override)
    tree.setdefault("recipe", path.stem)
    return from_tree(tree, params_of)


def from_tree(tree: dict[str, Any], params_of: ParamsOf) -> RunConfig:
    """The typed tree of a plain one (as ``to_tree`` gives and ``config.yaml`` holds)."""
    tree = dict(tree)
    params = tree.pop("params", None) or {}
    cfg = build(RunConfig, tree)
    cfg.params = build(params_of(cfg.method), params, "params.")
    return cfg


def validate(cfg: RunConfig) -> None:
    """Every value of a finished config against its type and range, as ``load`` does. Raises ConfigError."""
    tree = to_tree(cfg)
    params = tree.pop("params")
    build(RunConfig, tree)
    if dataclasses.is_dataclass(cfg.params):
        build(type(cfg.params), params, "params.")


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping; ``base: NAME`` inside it is another recipe that this one changes. ``above``: who asked for it."""
    if path.resolve() in above:
        raise ConfigError(f"{path} is its own base; a recipe's `base:` must end at one that has none")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a YAML text file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates and numbers that are none
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, found {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base is the name or path of one recipe, found {base!r}")
    return _merge(read_yaml(recipe_path(base), (*above, path.resolve())), tree)


def to_tree(value: Any) -> Any:
    """Plain dicts and lists of a typed tree."""
    return dataclasses.asdict(value)


def save(cfg: RunConfig | dict[str, Any], path: Path) -> None:
    """Write the resolved config (or its plain tree) as YAML: the whole of it, or what was there before stays.

    Raises OSError.
    """
    part = path.with_name(f".{path.name}.part")
    with open(part, "w") as file:
        file.write(yaml.safe_dump(cfg if isinstance(cfg, dict) else to_tree(cfg), sort_keys=False))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def _set(tree: dict[str, Any], override: str) -> None:
    key, eq, text = override.partition("=")
    if not eq or not key:
        raise ConfigError(f"override {override!r}: write it as key=value, for example schedule.epochs=3")
    try:
        value = yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a group of keys")
    tree[last] = value


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out
