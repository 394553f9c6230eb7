"""A small network with experts in a real DeepSpeed engine, on the pool's ranks."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_cl.config import MoEConfig, OptimConfig
from moe_cl.engine import optim
from moe_cl.engine.clip import GradientControl
from moe_cl.engine.flat import FlatView, local
from moe_cl.engine.ranks import leave_out_shm_op
from moe_cl.engine.setup import shard
from moe_cl.engine.teacher import held

BATCH, WIDTH = 8, 16


class Net(nn.Module):
    """Tokens -> linear -> MoE -> norm -> last_layer; a frozen table and a buffer that moves."""

    def __init__(self, moe: MoEConfig | None, parallel: bool):
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Linear(6, WIDTH)
        self.table = nn.Parameter(torch.randn(1, 1, WIDTH), requires_grad=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.ModuleDict({"last_layer": nn.Linear(WIDTH, 5)})
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        if moe is None:
            self.moe = nn.Linear(WIDTH, WIDTH)
        elif parallel:
            from moe_cl.moe.layer import ExpertParallelMoE

            self.moe = ExpertParallelMoE(WIDTH, moe, 0, seed=3)
        else:
            from moe_cl.moe.experts import SparseMLP

            self.moe = SparseMLP(WIDTH, moe, 0, seed=3)

    def forward(self, x):
        y = self.moe(self.norm(self.embed(x) + self.table))
        y = y[0] if isinstance(y, tuple) else y
        return self.head["last_layer"](y)


class Wrapped(nn.Module):
    """As the engine gets it: the student one level down."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(x)


class Memory(nn.Module):
    """A method's state: queue and pointer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(4, 3))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))


@dataclass
class Run:
    """Everything a checkpoint holds, and a step."""

    comm: Any
    engine: Any
    net: Net
    teacher: Net
    method: Memory
    view: FlatView
    control: GradientControl

    def loss(self, step):
        """This rank's mean over its rows of global batch ``step``; the mean over ranks is the batch's."""
        rng = torch.Generator().manual_seed(100 + step)
        x, y = torch.randn(BATCH, 3, 6, generator=rng), torch.randn(BATCH, 3, 5, generator=rng)
        mine = slice(self.comm.rank, None, self.comm.world)
        return (self.engine(x[mine]) - y[mine]).square().mean()

    def step(self, step):
        loss = self.loss(step)
        self.engine.backward(loss)
        metrics = self.control()
        self.engine.step()
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                held(t).lerp_(held(s), 0.1)
            self.method.queue[step % 4] = step
            self.method.pointer += 1
            self.net.seen += 1
        return float(self.comm.all_reduce(loss.detach(), "mean")), float(metrics["grad_norm"])


def same_ids() -> None:
    """ZeRO 3 numbers modules and parameters by counters of the process and compares them over ranks; the pool's ranks
    have not all seen the same tests."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def build(comm, stage=1, ep=1, cfg=None, separate=("last_layer",), persist=20) -> Run:
    """A run of ``comm.world`` ranks at ZeRO ``stage`` with ``ep`` expert-parallel ranks, 0 = a dense network.

    persist: at stage 3, the largest tensor that stays gathered between steps.
    """
    import deepspeed

    from moe_cl.moe import layer

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    cfg = cfg or OptimConfig(name="adamw", base_lr=1e-2, decay="matrices")
    moe = MoEConfig(blocks="odd", experts=4, top_k=2, hidden_ratio=1.0, init="xavier", ep_size=ep) if ep else None
    leave_out_shm_op()
    same_ids()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    net = Net(moe, True)
    groups = optim.param_groups(net, cfg, separate)
    if ep:
        groups = layer.param_groups(groups)
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // comm.world,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": 5000,
            **({"stage3_param_persistence_threshold": persist} if stage == 3 else {}),
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        engine, *_ = deepspeed.initialize(
            model=Wrapped(net), optimizer=optim.build(groups, cfg, cfg.base_lr), config=config
        )
    teacher = layer.place(Net(moe, True)).requires_grad_(False)
    if stage == 3:
        shard(teacher, config)
    view = FlatView(net, engine.optimizer, comm)
    return Run(comm, engine, net, teacher, Memory(), view, GradientControl(view, cfg))


def full_state(run: Run) -> dict[str, torch.Tensor]:
    """Student parameters in full shape (experts of all ranks), for comparison between layouts."""
    out = {}
    for name, p in run.net.named_parameters():
        place = run.view.places[name]
        if hasattr(p, "ds_tensor"):
            start, part = local(p)
            flat = torch.zeros(p.ds_numel)
            flat[start : start + part.numel()] = part
            out[name] = run.comm.all_reduce(flat).view(place.shape)
        elif place.experts and place.experts < place.shape[0]:
            full = torch.zeros(place.shape)
            full[place.first : place.first + place.experts] = p.detach() / place.copies
            out[name] = run.comm.all_reduce(full)
        else:
            out[name] = p.detach().clone()
    return out
