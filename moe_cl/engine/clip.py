"""Between backward and optimizer: the global gradient norm, clipping by it or tensor by tensor, LARS's trust factors.

All of them need per-tensor sums of squares over what ZeRO has cut up and spread over ranks: one packed all-reduce gives
them for every tensor, each expert of a stack counted as a tensor of its own, so that no value depends on world, ep_size
or stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_cl.config import OptimConfig
from moe_cl.engine.flat import FlatView, Fragment
from moe_cl.engine.health import NonFiniteLoss
from moe_cl.engine.optim import LARS, trust_factor
from moe_cl.engine.scaler import StepScaler


class GradientControl:
    """``control()`` measures and clips this step's reduced gradients in place; returns metrics for the journal.

    Args:
        view: fragments of the optimizer's parameters.
        optim: ``clip_norm`` (all parameters as one vector) and ``clip_per_tensor`` (EsViT); 0 = off.
        scaler: whose scale the gradients still carry (fp16), or None. With one, a non-finite gradient makes it skip the
            step; without, it raises ``NonFiniteLoss``; on every rank together.
    """

    def __init__(self, view: FlatView, optim: OptimConfig, scaler: StepScaler | None = None):
        self.view, self.optim, self.scaler = view, optim, scaler
        self.slots: list[str] = []
        first: dict[str, int] = {}
        for name, place in view.places.items():
            first[name] = len(self.slots)
            self.slots += [name] if not place.experts else [f"{name}[{e}]" for e in range(place.shape[0])]
        self._parts = [part for fragment in view.fragments for part in _split(fragment, first[fragment.name])]
        assert len({slot for _, slot, _, _ in self._parts}) == len(self._parts), "a tensor in two pieces on one rank"
        self._lars = view.inner if isinstance(view.inner, LARS) else None
        if self._lars is not None and not view.zero:
            self._lars.units = {f.param: f.place.experts for f in view.fragments if f.place.experts}
        matrices = [n for n, p in view.module.named_parameters() if p.requires_grad and len(view.places[n].shape) > 1]
        self._edges = {"grad/first": matrices[:1], "grad/last": matrices[-1:]}

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        """Raises NonFiniteLoss if a gradient is not finite (without a loss scaler)."""
        parts, grads = self._present()
        scale = self.scaler.get_scale() if self.scaler else 1.0
        sums = self._sums(parts, grads, scale)
        norms = sums[:, 0].sqrt()
        total = sums[:, 0].sum().sqrt()
        if self.scaler is not None:
            self.scaler.finite = bool(torch.isfinite(total))
        elif not torch.isfinite(total):
            bad = [slot for slot, norm in zip(self.slots, norms.tolist(), strict=True) if not norm < float("inf")]
            raise NonFiniteLoss(f"the gradient of {', '.join(bad[:3]) or 'all tensors together'} is not finite")
        factors = torch.ones_like(norms)
        if self.optim.clip_per_tensor > 0:
            # EsViT utils.clip_gradients: g *= min(1, c / (||g|| + 1e-6)), every tensor on its own.
            factors = (self.optim.clip_per_tensor / (norms + 1e-6)).clamp(max=1.0)
        if self.optim.clip_norm > 0:
            clipped = (factors * norms).square().sum().sqrt()
            factors = factors * (self.optim.clip_norm / (clipped + 1e-6)).clamp(max=1.0)
        if self.optim.clip_per_tensor > 0 or self.optim.clip_norm > 0:
            for (_, slot, _, _), grad in zip(parts, grads, strict=True):
                grad.mul_(factors[slot])
        if self._lars is not None and self.view.zero:
            self._trust(parts, sums, factors)
        metrics = {"grad_norm": total.float()}
        for key, names in self._edges.items():
            chosen = [i for i, slot in enumerate(self.slots) if names and slot.split("[")[0] == names[0]]
            if chosen:
                metrics[key] = sums[chosen, 0].sum().sqrt().float()
        return metrics

    def _present(self) -> tuple[list[tuple[Fragment, int, int, int]], list[Tensor]]:
        parts, grads = [], []
        for part in self._parts:
            fragment, _, low, high = part
            grad = None if self.view.frozen(fragment) else self.view.gradient(fragment)
            if grad is not None:
                parts.append(part)
                grads.append(grad if high - low == grad.numel() else grad[low:high])
        return parts, grads

    def _sums(self, parts: list[tuple[Fragment, int, int, int]], grads: list[Tensor], scale: float) -> Tensor:
        """(slots, 1 or 3) float64, over ranks: sum g^2, and for LARS on flat partitions sum g p and sum p^2."""
        trust = self._lars is not None and self.view.zero
        device = next(self.view.module.parameters()).device  # also of a rank whose partition is padding alone
        sums = torch.zeros(len(self.slots), 3 if trust else 1, dtype=torch.float64, device=device)
        if grads:
            slots = torch.tensor([slot for _, slot, _, _ in parts], device=device)
            # Whole copies on several ranks (stage 0) count once in the sum over ranks.
            share = torch.tensor(
                [1.0 if self.view.zero else 1.0 / f.place.copies for f, _, _, _ in parts],
                dtype=torch.float64,
                device=device,
            )
            columns = [torch.stack(torch._foreach_norm(grads)).double().square() / scale**2]
            if trust:
                weights = [self.view.master(f)[low:high] for f, _, low, high in parts]
                columns.append(
                    torch.stack([torch.dot(g.view(-1), w) for g, w in zip(grads, weights, strict=True)]) / scale
                )
                columns.append(torch.stack(torch._foreach_norm(weights)).double().square())
            # Each slot once on a rank (asserted above): nothing is added, whose order a GPU would choose.
            sums.index_copy_(0, slots, torch.stack([c.double() * share for c in columns], 1))
        return self.view.comm.all_reduce(sums)

    def _trust(self, parts: list[tuple[Fragment, int, int, int]], sums: Tensor, factors: Tensor) -> None:
        """||c g + wd p||^2 from the three sums, so that one message serves clipping and LARS."""
        pieces: dict[Tensor, list[tuple[int, int, Tensor]]] = {}
        for fragment, slot, low, high in parts:
            group = self.view.settings(fragment)
            if group["adapt"]:
                c, decay = factors[slot], group["weight_decay"]
                square, dot, weight = sums[slot]
                update = (c.square() * square + 2 * decay * c * dot + decay**2 * weight).clamp(min=0)
                factor = trust_factor(weight.sqrt(), update.sqrt(), group["trust"])
                held = pieces.setdefault(self.view.holder(fragment), [])
                held.append((fragment.offset + low, fragment.offset + high, factor))
        self._lars.pieces = pieces


def _split(fragment: Fragment, slot: int) -> list[tuple[Fragment, int, int, int]]:
    """(fragment, slot, low, high): the pieces of a fragment by tensor, bounds relative to the fragment."""
    place = fragment.place
    if not place.experts:
        return [(fragment, slot, 0, fragment.size)]
    each, out = fragment.param.numel() // place.experts, []
    for e in range(place.experts):
        low, high = max(e * each, fragment.start), min((e + 1) * each, fragment.stop)
        if low < high:
            out.append((fragment, slot + place.first + e, low - fragment.start, high - fragment.start))
    return out
