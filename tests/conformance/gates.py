"""CR-MoE's routing: gates in every mode, their balance, and the MoE layer on one rank and on several."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moe_cl.comm import Comm, LocalComm, SimComm
from moe_cl.config import MoEConfig
from moe_cl.losses.balance import balance, cv2
from moe_cl.methods import routing as losses
from moe_cl.models.build import Encoded
from moe_cl.moe.experts import SparseMLP
from moe_cl.moe.router import Router, Routing
from moe_cl.moe.shazeer import ShazeerRouter
from tests.conformance.given import ranks_of
from tests.conformance.harness import Check, Golden, Report

SURE = 1e-6  # top-k margins below this are ties
GATE, SUMS, LOAD = 5e-6, 2.5e-6, 1.1e-4  # 5 times what the specification observed: weights, sums, load a token
GRADIENT = 5.5e-5  # 5 times that of a whole step's gradients


def routed(router: Router, x: Tensor, noise: Tensor | None, train: bool) -> Routing:
    """Routing of (n, D) rows, each a row of one token, with the file's noise in the place of ours."""
    router.train(train)
    if noise is not None:
        router._noise = lambda *_: noise.view(len(x), 1, -1)
    return router(x[:, None])


def dense(routing: Routing) -> Tensor:
    """Sparse gate vectors (n, E)."""
    n, _, k = routing.weights.shape
    return torch.zeros(n, routing.experts).scatter(1, routing.indices.view(n, k), routing.weights.view(n, k))


def sums_of(routing: Routing) -> Tensor:
    """(1, 1, n, 2, E) importance and load of all rows as one view of one layer."""
    return losses.balance_sums(Encoded(routing.weights, routing=[[routing]]), len(routing.indices))


def balanced(report: Report, case: str, quantity: str, got: Tensor, want: np.ndarray) -> None:
    """A squared coefficient of variation (or a sum of them): the float32 error of the sums, relative. Below a CV of .3
    the variance is a small difference of large sums, and the relative error grows as the CV falls."""
    cv = max(abs(float(want)), 1e-12) ** 0.5
    report.close(case, quantity, got, want, SUMS * max(1.0, 0.3 / cv), floor=1e-6)


def gate(z: Golden, report: Report) -> None:
    """Every case in every mode: choices, weights, gate vectors, balance and its gradient; both forms of the load."""
    for case in z.cases(r"(.+?)_top_k$"):
        x, w, k = z.tensor(f"{case}_x"), z.tensor(f"{case}_w_gate"), int(z[f"{case}_top_k"])
        for mode in z.cases(rf"{case}_(?!shz_)(.+?)_topk_idx$"):
            _gate_mode(z, report, case, mode, x, w, k)
        for mode in z.cases(rf"{case}_shz_(.+?)_topk_idx$"):
            _shazeer(z, report, case, mode, x, w, k)
        for views in map(int, z.cases(rf"{case}_accum(\d+)_aux_loss$")):
            router = vmoe(w, k, 0.0, "published")
            parts = [sums_of(routed(router, part, None, True)) for part in x.chunk(views)]
            total = sum(balance(part, LocalComm())[0] for part in parts)
            balanced(report, case, f"{views} views", total, z[f"{case}_accum{views}_aux_loss"])


def vmoe(w: Tensor, k: int, noise_std: float, load: str) -> Router:
    """A router with the file's weight."""
    router = Router(w.shape[0], MoEConfig(experts=w.shape[1], top_k=k, noise_std=noise_std, load=load))
    router.weight.data.copy_(w)
    return router


def _sigma(router: Router, train: bool) -> float:
    """The noise that ``router`` adds to equal logits when it draws a one for expert 0 and zeros for the others."""
    one = torch.eye(router.experts)[:1]
    p = routed(router, torch.zeros(1, len(router.weight)), one, train).probabilities[0, 0].double()
    return (p[0] / p[-1]).log().item() if router.experts > 1 else 0.0


def _gate_mode(z: Golden, report: Report, case: str, mode: str, x: Tensor, w: Tensor, k: int) -> None:
    at, name = f"{case}_{mode}_", f"{case} {mode}"
    train, std = bool(z[at + "train"]), float(z[at + "noise_std_cfg"])
    noise = z.tensor(at + "noise") if at + "noise" in z else None
    report.close(name, "sigma", _sigma(vmoe(w, k, std, "published"), train), z[at + "noise_stddev"], 1e-6, True)
    router = vmoe(w, k, std, "published")
    routing = routed(router, x, noise, train)
    margin = z[at + "tie_margin"]
    report.same(name, "choices", routing.indices[:, 0].numpy()[margin > SURE], z[at + "topk_idx"][margin > SURE])
    report.close(name, "weights", routing.weights[:, 0], z[at + "topk_w"], GATE, True)
    report.close(name, "gate vectors", dense(routing), z[at + "activation"], GATE, True)
    ours, want = routing.probabilities[:, 0].detach().numpy(), z[at + "softmax_activation"]
    report.close(name, "softmax", ours, want, GATE, True)
    seen = want > 1e-30  # of small probabilities the logarithm: what the noise of an unlikely expert did
    report.close(name, "log softmax", np.log(np.maximum(ours[seen], 1e-37)), np.log(want[seen]), GATE)
    if k < router.experts:
        top = routing.probabilities[:, 0].topk(k + 1).values
        report.close(name, "margins", top[:, k - 1] - top[:, k], margin, GATE, True)
    if not train:
        return
    sums = sums_of(routing)
    loss, parts = balance(sums, LocalComm())
    loss.backward()
    totals = {"importance": sums[0, 0, :, 0].sum(0), "load": sums[0, 0, :, 1].sum(0)}
    for part, value in totals.items():
        report.close(name, part, value, z[at + part], SUMS)
    for part, value in {"cv2_importance": parts[0, 0, 0], "cv2_load": parts[0, 0, 1], "aux_loss": loss}.items():
        balanced(report, name, part, value, z[at + part])
    report.close(name, "gradient", router.weight.grad, z[at + "grad_w_gate_aux"], GRADIENT, floor=1e-9)
    if noise is None:
        return
    if routing.load is not None:
        report.close(name, "load a token", routing.load, z[at + "load_prob"], LOAD, True)
    right = vmoe(w, k, std, "corrected")
    load = routed(right, x, noise, train).load
    if load is not None:
        total = cv2(load.sum(0))
        total.backward()
        report.close(name, "corrected load a token", load, z[at + "fixed_load_prob"], LOAD, True)
        report.close(name, "corrected load", load.sum(0), z[at + "fixed_load"], SUMS)
        balanced(report, name, "corrected cv2", total, z[at + "fixed_cv2_load"])
        want = z[at + "fixed_grad_w_gate_cv2_load"]
        report.close(name, "corrected gradient", right.weight.grad, want, GRADIENT, floor=1e-9)


def _shazeer(z: Golden, report: Report, case: str, mode: str, x: Tensor, w: Tensor, k: int) -> None:
    at, name, train = f"{case}_shz_{mode}_", f"{case} shazeer {mode}", mode.startswith("train")
    # its gate vector is the noisy logits; the router keeps their softmax, and their logsumexp for its z-loss
    router = ShazeerRouter(w.shape[0], MoEConfig(experts=w.shape[1], top_k=k, z_loss=1.0))
    router.weight.data.copy_(w)
    noise = None
    if train:
        router.noise_weight.data.copy_(z.tensor(at + "w_noise"))
        noise = z.tensor(at + "noise")
    routing, logits = routed(router, x, noise, train), torch.from_numpy(z[at + "activation"])
    top = logits.sort(descending=True).values[:, : k + 1]
    sure = ((top[:, :-1] - top[:, 1:]).amin(1) > 10 * SURE).numpy() if top.shape[1] > 1 else slice(None)
    report.same(name, "choices", routing.indices[:, 0].numpy()[sure], z[at + "topk_idx"][sure])
    report.close(name, "weights", routing.weights[:, 0], z[at + "topk_w"], GATE, True)
    report.close(name, "logits", routing.probabilities[:, 0].log(), logits.log_softmax(-1), GATE)
    report.close(name, "logsumexp", routing.z_loss, logits.double().logsumexp(-1).square(), GATE)
    if train:
        balanced(report, name, "balance", balance(sums_of(routing), LocalComm())[0], z[at + "aux_loss"])


def layer(z: Golden, report: Report) -> None:
    """Forward and all gradients of the MoE layer, in every mode, on one rank and with the experts dealt over ranks."""
    experts = len(z["htoh4_weight"])
    modes = z.cases(r"(.+)_y$")

    def off(k: int) -> float:
        return float(np.abs(_layer(z, modes[0], k, LocalComm())[1].detach() - z[f"{modes[0]}_y"]).max())

    if "top_k" in z:
        k = int(z["top_k"])
    else:
        k = report.fit("top_k", sorted(range(1, experts + 1), key=lambda k: k != 2), off, 1e-5)
    ranks = ranks_of(experts)
    for mode in modes:
        run: Callable[[Comm], None] = lambda comm, mode=mode: _compare_layer(z, report, mode, k, comm)  # noqa: E731
        run(LocalComm())
        if ranks > 1:
            SimComm.run(ranks, run)


WEIGHTS = {"w1": "htoh4_weight", "b1": "htoh4_bias", "w2": "h4toh_weight", "b2": "h4toh_bias"}


def _layer(z: Golden, mode: str, k: int, comm: Comm) -> tuple[SparseMLP, Tensor, Routing, Tensor]:
    """The file's layer on ``comm``'s ranks after one forward: layer, output, routing, and the input as a leaf."""
    experts, hidden, dim = z["htoh4_weight"].shape
    train = mode.startswith("train")
    std = float(mode.removeprefix("train") or 0) if train else 0.0
    moe = MoEConfig(experts=experts, top_k=k, hidden_ratio=hidden / dim, noise_std=std, load="published")
    net = SparseMLP(dim, moe, comm=comm).train(train)
    net.router.weight.data.copy_(z.tensor("w_gate"))
    for name, theirs in WEIGHTS.items():
        getattr(net.experts, name).data.copy_(z.tensor(theirs)[_mine(comm, experts)])
    x = z.tensor("x").requires_grad_()
    if f"{mode}_noise" in z:
        net.router._noise = lambda *_: z.tensor(f"{mode}_noise").view(*x.shape[:2], -1)
    return net, *net(x), x


def _mine(comm: Comm, experts: int) -> slice:
    return slice(comm.rank * experts // comm.world, (comm.rank + 1) * experts // comm.world)


def _compare_layer(z: Golden, report: Report, mode: str, k: int, comm: Comm) -> None:
    net, y, routing, x = _layer(z, mode, k, comm)
    (y * z.tensor("r")).sum().backward()
    case = f"{mode}, {comm.world} ranks, rank {comm.rank}"
    report.close(case, "y", y, z[f"{mode}_y"], 3.5e-6, True)
    if f"{mode}_aux_loss" in z:
        # all images as one view: importance and load are sums over their rows
        sums = losses.balance_sums(Encoded(routing.weights, routing=[[routing]]), len(routing.indices))
        balanced(report, case, "balance", balance(sums, LocalComm())[0], z[f"{mode}_aux_loss"])
    report.close(case, "gradient x", x.grad, z[f"{mode}_grad_x"], GRADIENT, floor=1e-9)
    report.close(case, "gradient w_gate", net.router.weight.grad, z[f"{mode}_grad_w_gate"], GRADIENT, floor=1e-9)
    for name, theirs in WEIGHTS.items():
        grad = getattr(net.experts, name).grad / comm.world  # every rank had the same rows
        want = z[f"{mode}_grad_{theirs}"]
        # relative to the whole tensor: a rank's experts alone may have seen hardly a token
        scale = max(float(np.abs(want).max()), 1e-9)
        mine = want[_mine(comm, len(want))]
        report.close(case, f"gradient {theirs}", grad / scale, mine / scale, GRADIENT, True)


CHECKS = {
    "crmoe_gate": Check(gate, (r"_top_k$", r"_topk_idx$")),
    "crmoe_moelayer": Check(layer, (r"^htoh4_weight$", r"_y$")),
}
