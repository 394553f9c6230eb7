"""The layer that DeepSpeed sees: its own MoE class (groups, parameter marks, engine support) with our inside.

The only file of ``moe_cl/moe`` that imports DeepSpeed; import it where an engine is used, not at the top of a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from deepspeed import comm as ds_comm
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import nn

from moe_cl.comm import DistComm, LocalComm
from moe_cl.config import ConfigError, MoEConfig
from moe_cl.moe.experts import SparseMLP


class ExpertParallelMoE(SparseMLP, MoE):
    """``SparseMLP`` whose expert group is DeepSpeed's, with expert parameters marked for DeepSpeed's engine.

    With ``ep_size`` > 1 the process group must be up (``deepspeed.init_distributed``): the expert group is made here,
    so that each rank initialises the experts it holds. ``data_before_expert`` is the JSON key
    ``use_data_before_expert_parallelism``: False puts an expert group on consecutive ranks (experts inside a node, data
    parallel across nodes), True strides it over the world (experts across nodes).
    """

    def __init__(self, dim: int, moe: MoEConfig, layer: int = 0, seed: int = 0, data_before_expert: bool = False):
        nn.Module.__init__(self)  # not MoE's: it would build DeepSpeed's gate and copies of one expert
        self.use_residual = self.enable_expert_tensor_parallelism = False  # what the engine reads of a MoE
        self.num_experts, self.ep_size = moe.experts, moe.ep_size
        self.num_local_experts = moe.experts // moe.ep_size
        self.expert_group_name = f"ep_size_{moe.ep_size}"
        self.data_before_expert = data_before_expert
        self.comm = LocalComm()
        if moe.ep_size > 1:
            self._join()
        self._build(dim, moe, layer, self.comm.rank, moe.ep_size, seed)
        for parameter in self.experts.parameters():
            parameter.allreduce, parameter.group_name = False, self.expert_group_name

    def _join(self) -> None:
        if not dist.is_initialized():
            raise ConfigError(f"moe.ep_size={self.ep_size} needs that many processes; set moe.ep_size=1 without them")
        world = dist.get_world_size()
        if world % self.ep_size:
            raise ConfigError(f"moe.ep_size={self.ep_size} does not divide the {world} processes; choose a divisor")
        if self.num_experts % self.ep_size:
            raise ConfigError(f"moe.ep_size={self.ep_size} does not divide moe.experts={self.num_experts}")
        self._make_groups()
        self.comm = DistComm(groups._get_expert_parallel_group(self.expert_group_name))

    def _make_groups(self) -> None:
        if not ds_comm.is_initialized():
            ds_comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=self.data_before_expert
            )

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the engine on each MoE layer; makes DeepSpeed's groups where they are not there yet."""
        if self.ep_size > 1 and use_data_before_expert_parallel_ != self.data_before_expert:
            raise ConfigError(
                "use_data_before_expert_parallelism in the DeepSpeed JSON is "
                f"{use_data_before_expert_parallel_}, but the model was built with {self.data_before_expert}"
            )
        self._make_groups()


def factory(moe: MoEConfig, seed: int = 0, data_before_expert: bool = False) -> Callable[..., ExpertParallelMoE]:
    """What ``build_backbone(moe_factory=...)`` takes: ``make(dim=, layer=, moe=)`` -> an ExpertParallelMoE.

    ``data_before_expert``: the DeepSpeed JSON's ``use_data_before_expert_parallelism``.
    """

    def make(dim: int, layer: int, moe: MoEConfig = moe) -> ExpertParallelMoE:
        return ExpertParallelMoE(dim, moe, layer, seed, data_before_expert)

    return make


def place(module: nn.Module) -> nn.Module:
    """Give the MoE layers of a network outside the engine (the teacher) their DeepSpeed groups; returns ``module``."""
    for layer in module.modules():
        if isinstance(layer, ExpertParallelMoE):
            layer.set_deepspeed_parallelism(layer.data_before_expert)
    return module


def param_groups(param_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split named optimizer groups so that expert parameters stand in groups of their own, as ZeRO 1 and 2 need.

    DeepSpeed names every expert group ``ep_size_N``; groups with different settings (weight decay) stay apart. Groups
    left without parameters are dropped.
    """
    split = split_params_into_different_moe_groups_for_optimizer([dict(group) for group in param_groups])
    return [group for group in split if group["params"]]
