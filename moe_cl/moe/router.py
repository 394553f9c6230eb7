"""The router: which experts a token goes to, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Routing:
    """What one MoE layer decided for one forward: N = V_r*B rows (view-major), T tokens a row, k experts a token.

    indices: (N, T, k) int64 global expert ids, best first. weights: (N, T, k) combine weights, with graph.
    experts: E. probabilities: (N, T, E) softmax over experts, with graph, kept only when asked for.
    load: (N, E) smooth load summed over a row's tokens, with graph; None without noise (then the count is the load).
    """

    indices: Tensor
    weights: Tensor
    experts: int
    probabilities: Tensor | None = None
    load: Tensor | None = None
