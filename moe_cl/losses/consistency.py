"""CR-MoE's consistency of routing: a token's gate vector should be that of the patch it overlaps in the other view.

Per MoE layer and direction (query view -> key view), one slot a token position: slot 0 is cls, slot 1+i is patch i of
the query view with the key patch that overlaps it most. Negatives of a slot are the other images' keys at the same
slot, over all ranks (crmoe.md 1.6). S = L*2*(1+P) slots, B images here, M = B*W images, k kept of E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_cl.comm import Comm
from moe_cl.losses import groups
from moe_cl.losses.precision import full_precision, unit, wide

_CHUNK = 1 << 22  # logits held at once


@dataclass
class Match:
    """Patches of view 1 with their best ones of view 2 and back: idx (B, P) int64, valid (B, P) bool."""

    idx1: Tensor
    valid1: Tensor
    idx2: Tensor
    valid2: Tensor

    def valid(self) -> Tensor:
        """(B, 2, P) bool."""
        return torch.stack([self.valid1, self.valid2], 1)

    def counts(self) -> Tensor:
        """(B, 2): each image's patches that have one, in both directions."""
        return self.valid().sum(2, dtype=torch.float32)


class _SlotLogSumExp(torch.autograd.Function):
    """log sum_m exp(q[s, n] . k[s, m] * scale) for every slot and row, in chunks of slots, logits never kept."""

    @staticmethod
    def forward(ctx: Any, q_SBE: Tensor, idx_SMk: Tensor, w_SMk: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.step = scale, max(1, _CHUNK // (q_SBE.shape[1] * idx_SMk.shape[1]))
        out = torch.cat([
            torch.logsumexp(torch.bmm(q, k.mT) * scale, 2) for q, k in _chunks(ctx.step, q_SBE, idx_SMk, w_SMk)
        ])  # fmt: skip
        ctx.save_for_backward(q_SBE, idx_SMk, w_SMk, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        q_SBE, idx, w, lse = ctx.saved_tensors
        grads = []
        pairs = _chunks(ctx.step, q_SBE, idx, w)
        for (q, k), lse_c, grad_c in zip(pairs, lse.split(ctx.step), grad.split(ctx.step), strict=True):
            p = torch.exp(torch.bmm(q, k.mT) * ctx.scale - lse_c[..., None])
            grads.append(torch.bmm(p, k) * (grad_c * ctx.scale)[..., None])
        return torch.cat(grads), None, None, None


def _chunks(step: int, q: Tensor, idx: Tensor, w: Tensor) -> Any:
    for q_c, idx_c, w_c in zip(q.split(step), idx.split(step), w.split(step), strict=True):
        yield q_c, _dense(idx_c, w_c, q.shape[-1])


def _dense(idx: Tensor, w: Tensor, experts: int) -> Tensor:
    return w.new_zeros(*w.shape[:-1], experts).scatter(-1, idx, w)


def _gather_sparse(idx: Tensor, w: Tensor, experts: int, comm: Comm) -> tuple[Tensor, Tensor]:
    """(B, ...) -> (M, ...): values and their expert ids in one message of bytes, one byte an id up to 256 experts."""
    if comm.world == 1:
        return idx, w
    rows, kind = len(idx), torch.uint8 if experts <= 256 else torch.int32
    values = w.contiguous().view(torch.uint8).view(rows, -1)
    ids = idx.to(kind).contiguous().view(torch.uint8).view(rows, -1)
    packed = comm.all_gather(torch.cat([values, ids], 1))
    values, ids = packed.split([values.shape[1], ids.shape[1]], 1)
    shape = (len(packed), *idx.shape[1:])
    return ids.contiguous().view(kind).view(shape).long(), values.contiguous().view(w.dtype).view(shape)


def _slots(x: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
    """(L, 2, B, T, k) keys -> (B, L, 2, 1+P, k): view 2 at ``first`` for direction 0, view 1 at ``second`` for 1.

    Without matches: cls alone.
    """
    out = []
    for view, match in ((1, first), (0, second)):
        keys = x[:, view].movedim(1, 0)  # (B, L, T, k)
        if match is None:
            out.append(keys[:, :, :1])
            continue
        at = torch.cat([torch.zeros_like(match[:, :1]), match + 1], 1)[:, None, :, None]
        out.append(keys.gather(2, at.expand(-1, keys.shape[1], -1, keys.shape[3])))
    return torch.stack(out, 2)


@full_precision
def consistency(
    q_idx: Tensor,
    q_w: Tensor,
    k_idx: Tensor,
    k_w: Tensor,
    experts: int,
    comm: Comm,
    match: Match | None = None,
    temperature: float = 0.2,
    alpha: float = 0.3,
    statistics: str = "global",
    mode: str = "overlap",
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss summed over layers, and its value per layer (L,), this rank's share (ranks are averaged).

    ``overlap``, per layer: (1 - alpha) [ctr(cls) both directions] + alpha [masked ctr(patches) both directions], ctr
    with its 2T. The published code's other forms: ``cls`` alone with weight 1; ``similarity``: minus the cosine in the
    place of ctr, no negatives; ``nearest``: cls + patches matched by their gate vectors; ``pool``: ctr of the mean over
    tokens.

    Args:
        q_idx, q_w: (L, 2, B, T, k) experts and gate values of the student's two views; token 0 is cls.
        k_idx, k_w: the same of the teacher; no gradient goes there.
        match: overlapping patches, for ``overlap`` and ``similarity``; without, they are ``cls``.
        statistics: over which samples valid patches are averaged.
        counts: ``match.counts()`` summed over each group (``balance_and_counts``); None = here, by one all-reduce for
            both directions where groups span ranks.
    """
    k_w = k_w.detach()
    if mode == "pool":
        q_idx, q_w = as_sparse(_dense(q_idx, wide(q_w), experts).mean(3, keepdim=True))
        k_idx, k_w = as_sparse(_dense(k_idx, wide(k_w), experts).mean(3, keepdim=True))
    if mode in ("pool", "cls"):
        match = None
    options = (experts, comm, temperature, statistics)
    if mode == "nearest":
        group = groups.make(statistics, q_w.shape[2], comm, q_w.device)
        patches = (q_w.shape[3] - 1) * q_w.shape[2] * comm.world / group.count  # all of them are valid
        counts = torch.full((group.slots, 2), patches, device=q_w.device)
        layers = [
            _aligned(*one, nearest(*one, experts), counts, (1.0, 1.0), *options)
            for one in zip(*(t.split(1) for t in (q_idx, q_w, k_idx, k_w)), strict=True)
        ]
        per_layer = torch.cat(layers)
    else:
        shares = (1 - alpha, alpha) if match else (1.0, 0.0)
        per_layer = _aligned(q_idx, q_w, k_idx, k_w, match, counts, shares, *options, negatives=mode != "similarity")
    return per_layer.sum(), per_layer.detach()


def _aligned(
    q_idx: Tensor,
    q_w: Tensor,
    k_idx: Tensor,
    k_w: Tensor,
    match: Match | None,
    counts: Tensor | None,
    shares: tuple[float, float],
    experts: int,
    comm: Comm,
    temperature: float,
    statistics: str,
    negatives: bool = True,
) -> Tensor:
    """(L,) loss a layer; ``shares``: weights of cls and of patches."""
    layers, _, batch, _, top_k = q_w.shape
    first, second = (match.idx1, match.idx2) if match else (None, None)
    # keys: normalised over the k kept values, matched, sent once for all layers and both directions
    ki = _slots(k_idx, first, second)
    kw = _slots(unit(k_w), first, second)
    own_idx, own_w = ki.view(batch, -1, top_k), kw.view(batch, -1, top_k)
    tokens = q_w.shape[3] if match else 1
    q = _dense(q_idx[:, :, :, :tokens], unit(q_w[:, :, :, :tokens]), experts)  # (L, 2, B, 1+P, E)
    q_SBE = q.transpose(2, 3).reshape(-1, batch, experts)
    cosine_SB = (q_SBE.gather(2, own_idx.transpose(0, 1)) * own_w.transpose(0, 1)).sum(2)
    if negatives:
        all_idx, all_w = _gather_sparse(own_idx, own_w, experts, comm)
        lse_SB = _SlotLogSumExp.apply(q_SBE, all_idx.transpose(0, 1), all_w.transpose(0, 1), 1 / temperature)
        terms = 2 * temperature * (lse_SB - cosine_SB / temperature)
    else:
        terms = -cosine_SB

    weight = terms.new_full((2, 1, batch), shares[0] / batch)
    if match:
        group = groups.make(statistics, batch, comm, q_w.device)
        if counts is None:
            (counts,) = group.sum(match.counts(), comm=comm)
        patches = group.weights(match.valid(), counts, comm).permute(1, 2, 0).to(terms.dtype)
        weight = torch.cat([weight, shares[1] * patches], 1)
    return (terms.view(layers, 2, tokens, batch) * weight).sum((1, 2, 3))


@torch.no_grad()
def nearest(q_idx: Tensor, q_w: Tensor, k_idx: Tensor, k_w: Tensor, experts: int) -> Match:
    """For each patch the patch of the other view with the most similar gate vector; one layer (1, 2, B, T, k)."""
    q, k = (_dense(i, unit(w), experts)[0, :, :, 1:] for i, w in ((q_idx, q_w), (k_idx, k_w)))  # (2, B, P, E)
    idx1, idx2 = ((q[v] @ k[1 - v].mT).argmax(-1) for v in (0, 1))
    return Match(idx1, torch.ones_like(idx1, dtype=torch.bool), idx2, torch.ones_like(idx2, dtype=torch.bool))


def as_sparse(gates: Tensor) -> tuple[Tensor, Tensor]:
    """Dense gate vectors (..., E) as (indices, values) with k = E (the ``softmax`` activation)."""
    idx = torch.arange(gates.shape[-1], device=gates.device).expand(gates.shape)
    return idx, wide(gates)
