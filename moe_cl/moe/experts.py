"""The experts of a rank as stacked tensors, and the MoE layer made of router, dispatch and experts.

Legend: E experts, E_local of them here, D width, H hidden width, R rows, k choices a row, M assignments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_cl.comm import Comm, LocalComm
from moe_cl.config import ConfigError, MoEConfig
from moe_cl.moe import grouped, mlp
from moe_cl.moe.dispatch import sort_by_expert
from moe_cl.moe.exchange import route
from moe_cl.moe.router import Router, Routing, init_seed
from moe_cl.moe.shazeer import ShazeerRouter
from moe_cl.spans import span


class Experts(nn.Module):
    """E_local two-layer MLPs with exact GELU: w1 (E_local, H, D), b1 (E_local, H), w2 (E_local, D, H), b2 (E_local, D).

    Weights come from (seed, layer, global expert id), so every layout holds the same model. ``published``:
    U(-1/sqrt(in*out), 1/sqrt(in*out)) as the released CR-MoE code (a branch is nearly 0 at the start); ``xavier``:
    U(-sqrt(6/(in+out)), ...). Biases 0.

    Args:
        first: global id of the first local expert.
        recompute: hidden activations are computed again in the backward instead of kept.
    """

    def __init__(
        self, dim: int, hidden: int, experts: int, first: int, init: str, layer: int, seed: int, recompute: bool = False
    ):
        super().__init__()
        self.first, self.recompute = first, recompute
        bound = 1.0 / math.sqrt(dim * hidden) if init == "published" else math.sqrt(6.0 / (dim + hidden))
        self.w1 = nn.Parameter(torch.empty(experts, hidden, dim))
        self.b1 = nn.Parameter(torch.zeros(experts, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden))
        self.b2 = nn.Parameter(torch.zeros(experts, dim))
        with torch.no_grad():
            for e in range(0 if self.w1.is_meta else experts):  # nothing to draw in a network of shapes alone
                generator = torch.Generator().manual_seed(init_seed(seed, layer, first + e))
                for weight in (self.w1[e], self.w2[e]):
                    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, x_RD: Tensor, ids_Rk: Tensor, weights_Rk: Tensor, complete: bool = True) -> Tensor:
        """Weighted sum over each row's local experts, (R, D) in fp32 (fp64 for fp64). Ids of E_local add nothing."""
        plan = sort_by_expert(ids_Rk, len(self.w1), complete)
        dtype = compute_dtype(x_RD)
        parameters = (self.w1, self.b1, self.w2, self.b2)
        if grouped.available(x_RD, dtype, self.w1.shape[1], len(plan.token)):
            return grouped.forward(x_RD, weights_Rk, *parameters, plan, dtype, self.recompute)
        inputs = (x_RD, weights_Rk, *parameters)
        train = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        return mlp.ExpertMLP.apply(*inputs, ids_Rk, plan, dtype, train, self.recompute)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's type where it is on, the input's own otherwise."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


class SparseMLP(nn.Module):
    """An MoE layer in torch and Comm alone: y = sum over a token's k experts of p_e Expert_e(x), dropless.

    Args:
        dim: D.
        moe: the layer's settings; ``ep_size`` is not read here, the expert group is ``comm``.
        layer: index of this MoE layer (seeds and noise keys).
        comm: the expert group: rank r holds experts [r*E/world, (r+1)*E/world). None = all experts are here.
        seed: of the initial weights.
    """

    def __init__(self, dim: int, moe: MoEConfig, layer: int = 0, comm: Comm | None = None, seed: int = 0):
        nn.Module.__init__(self)  # not super(): in ExpertParallelMoE that is DeepSpeed's MoE, with its own experts
        self.comm: Comm | None = comm or LocalComm()
        self._build(dim, moe, layer, self.comm.rank, self.comm.world, seed)

    def _build(self, dim: int, moe: MoEConfig, layer: int, rank: int, world: int, seed: int) -> None:
        if moe.experts % world:
            raise ConfigError(f"moe.experts={moe.experts}: choose a multiple of the expert-parallel size {world}")
        local = moe.experts // world
        self.router = (ShazeerRouter if moe.gate == "shazeer" else Router)(dim, moe, layer, seed)
        hidden = round(dim * moe.hidden_ratio)
        self.experts = Experts(dim, hidden, local, rank * local, moe.init, layer, seed, moe.recompute)

    def forward(self, x_NTD: Tensor, keys_N: Tensor | None = None) -> tuple[Tensor, Routing]:
        """(N, T, D) tokens and the rows' random keys (N,) -> (N, T, D) in fp32 (fp64 for fp64), and the routing."""
        routing = self.router(x_NTD, keys_N)
        d, k = x_NTD.shape[-1], routing.indices.shape[-1]
        with span("dispatch"):  # to the experts' ranks, the experts, and back
            y, routing.sent = route(
                x_NTD.reshape(-1, d),
                routing.indices.view(-1, k),
                routing.weights.view(-1, k),
                self.experts,
                len(self.experts.w1),
                self.comm,
                compute_dtype(x_NTD),
            )
        return y.view(x_NTD.shape), routing
