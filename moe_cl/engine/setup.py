"""From a checked config to the parts a driver drives: student in a DeepSpeed engine, teacher beside it, method."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_cl import methods
from moe_cl.comm import Comm, LocalComm
from moe_cl.config import ConfigError, RunConfig
from moe_cl.engine import checks, large_batch, optim, ranks, schedules
from moe_cl.engine.checkpoint import source, start
from moe_cl.engine.clip import GradientControl
from moe_cl.engine.flat import FlatView
from moe_cl.engine.scaler import install, scaler_of
from moe_cl.engine.step import Parts, Student
from moe_cl.engine.teacher import Teacher
from moe_cl.losses import groups
from moe_cl.methods.base import Encoder, Method
from moe_cl.models.build import from_config
from moe_cl.views.spec import build_spec


@dataclass
class Built:
    """Everything ``pretrain`` needs of the engine."""

    parts: Parts
    precision: str
    peak_lr: float
    device: torch.device

    @property
    def evaluated(self) -> Encoder:
        """What is measured during training: the side that the method's authors measure."""
        return self.parts.teacher.module if self.parts.method.evaluated == "teacher" else self.parts.student

    @property
    def dtype(self) -> torch.dtype | None:
        """What matrix products compute in; None = as the parameters, fp32."""
        return DTYPES[self.precision]


DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def on_cpu() -> bool:
    """True if DeepSpeed's accelerator is the CPU."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() == "cpu"


def build_method(
    cfg: RunConfig, comm: Comm, moe_factory: Callable[..., nn.Module] | None
) -> tuple[Method, Encoder, Encoder | None]:
    """Method, student and teacher modules, without any engine (also what evaluation and tests start from)."""
    method = methods.get(cfg.method)(cfg.params, comm, statistics=cfg.engine.statistics)

    def backbone(teacher: bool) -> nn.Module:
        torch.manual_seed(cfg.seed)  # the same initial weights on every rank, for student and teacher
        moe = cfg.moe if checks.has_moe(cfg) else None
        return from_config(cfg.model, moe, moe_factory=moe_factory, comm=comm, teacher=teacher)

    return method, method.build_student(backbone(False)), method.build_teacher(backbone(True))


def check_model(cfg: RunConfig, images: int, ranks: int) -> dict[str, nn.Module]:
    """Method, backbone and heads built without memory (meta tensors), for what they refuse, and for what
    ``model.init_from`` has for them. Raises ConfigError.

    Args:
        cfg: the run. images: in one loss of a rank, of which there are ``ranks``.

    Returns:
        The modules by what a checkpoint calls them, all experts included.
    """
    groups.check(cfg.engine.statistics, images * ranks)
    there: dict[str, tuple[int, ...]] = {}
    if source.needed(cfg):
        try:
            there = start.check(cfg.model.init_from)
        except ConfigError as error:
            if not cfg.follows:
                raise
            first = f"pretrain --recipe {cfg.follows} --out {cfg.model.init_from}"
            raise ConfigError(
                f"{error}; {cfg.recipe} goes on from the run of {cfg.follows}: start with `{first}`, or take "
                "model.init_from= for one phase from a random start"
            ) from None
    one = copy.deepcopy(cfg)
    one.moe.ep_size, one.model.compile = 1, False
    with torch.device("meta"):
        method, student, teacher = build_method(one, LocalComm(), None)
    method.check(student, images, ranks)
    if there:
        start.check_network(cfg.model.init_from, there, student, cfg.optim.name)
    if (channels := cfg.model.options.get("in_chans", 3)) != 3:
        raise ConfigError(f"model.options.in_chans {channels}: views have 3 channels; leave it out")
    for size, _ in build_spec(cfg.views).resolutions:
        student.backbone.check_image(size, size, "views (views.size, views.local_size)")
    if cfg.eval.knn_every and cfg.eval.size:
        student.backbone.check_image(cfg.eval.size, cfg.eval.size, "evaluation images (eval.size)")
    if cfg.batch.exact_large_batch:
        large_batch.check_backbone(student.backbone)
    modules = {"student": student, "teacher": teacher, "method": method}
    return {kind: module for kind, module in modules.items() if module is not None}


def broadcast_buffers(modules: list[nn.Module], comm: Comm) -> None:
    """Rank 0's buffers (queue, centres, BN statistics) on every rank: the engine broadcasts parameters only."""
    for module in modules:
        for buffer in module.buffers():
            comm.broadcast(buffer)


def build(cfg: RunConfig, comm: Comm) -> Built:
    """Student in its engine, teacher, method, optimizer; all state equal on all ranks but the experts' shards."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # Our own draws have keys or generators of their own; a library's shall follow from the seed too (torch's: below).
    random.seed(cfg.seed), np.random.seed(cfg.seed % 2**32)
    config = checks.ds_config(cfg, comm.world, on_cpu())
    device = torch.device(get_accelerator().current_device_name())
    factory = None
    if checks.has_moe(cfg):
        from moe_cl.moe import layer

        factory = layer.factory(cfg.moe, cfg.seed, config.get("use_data_before_expert_parallelism", False))
    method, student, teacher_module = build_method(cfg, comm, factory)
    student.to(device)
    method.to(device)
    names = [name for name, _ in student.named_parameters()]
    groups = optim.param_groups(student, cfg.optim, fresh=source.fresh_names(cfg, names))
    if factory is not None:
        groups = layer.param_groups(groups)
    peak = schedules.scaled_lr(cfg.optim, cfg.batch.global_batch)
    with ranks.quiet():
        engine, *_ = deepspeed.initialize(
            model=Student(student), optimizer=optim.build(groups, cfg.optim, peak), config=config
        )
    install(engine)
    if engine.zero_optimization_stage() == 3:
        gather_for_backward(student.backbone)
    teacher = None
    if teacher_module is not None:
        teacher_module.to(device)
        if factory is not None:
            layer.place(teacher_module)  # the engine never sees it, so its experts' group must be set here
        if engine.zero_optimization_stage() == 3:
            shard(teacher_module, config)
        teacher = Teacher(teacher_module, student, lambda: autocast(device, config))
        method.bind(student, teacher)
    else:
        method.bind(student, None)
    broadcast_buffers([student, method, *([teacher_module] if teacher_module is not None else [])], comm)
    control = GradientControl(FlatView(student, engine.optimizer, comm), cfg.optim, scaler_of(engine))
    parts = Parts(engine, student, teacher, method, comm, cfg.seed, control)
    return Built(parts, checks.precision_of(config), peak, device)


def shard(module: nn.Module, config: dict[str, Any]) -> None:
    """Cut a network without optimizer as ZeRO 3 cuts the student, gathered layer by layer in its forward."""
    import deepspeed

    plain = {key: value for key, value in config.items() if key != "torch_autocast"}  # the teacher's own context
    # Nothing stays gathered between forwards: after an average of shards it would be stale.
    plain["zero_optimization"] = {**config["zero_optimization"], "stage3_param_persistence_threshold": 0}
    with ranks.quiet():
        deepspeed.initialize(model=module.requires_grad_(False), config=plain)


def gather_for_backward(backbone: nn.Module) -> None:
    """Have a backbone's own parameters (class token, learned positions) there when their gradients come.

    DeepSpeed gathers a module's parameters before its backward by hooks on the tensors it returned; it does not find
    them inside ``Encoded``. Parameters of the modules below are not touched by this.
    """
    own = [p for p in backbone.parameters(recurse=False) if p.requires_grad]

    def gather(grad: torch.Tensor) -> None:
        missing = [p for p in own if p.numel() != p.ds_numel]
        if missing:
            missing[0].all_gather(missing)

    def after(module: nn.Module, args: Any, out: Any) -> None:
        for x in (out.features, *out.regions):
            if x.requires_grad:
                x.register_hook(gather)

    if own:
        backbone.register_forward_hook(after)


def autocast(device: torch.device, config: dict[str, Any]) -> contextlib.AbstractContextManager:
    """The precision context that the engine opens around the student, for the teacher."""
    dtype = DTYPES[checks.precision_of(config)]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
