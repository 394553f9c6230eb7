"""Optimizers and groups against the published code's values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moe_cl.config import OptimConfig
from moe_cl.engine import optim
from moe_cl.engine.clip import GradientControl
from moe_cl.engine.flat import FlatView

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("w2", "w4", "bias", "bn", "scalar", "zero_w", "zero_g", "none_g")


class Bag(nn.Module):
    """Parameters by name, dots allowed."""

    def __init__(self, tensors):
        super().__init__()
        for name, value in tensors.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(value))

    def named_parameters(self, *args, **kwargs):
        for name, p in super().named_parameters(*args, **kwargs):
            yield name.replace("/", "."), p


@pytest.mark.parametrize("tag", ["r50", "big", "nowd"])
def test_lars_is_moco_v3s(tag):
    gold = np.load(GOLDEN / "moco_lars.npz")
    cfg = OptimConfig(
        name="lars",
        momentum=float(gold[f"{tag}/momentum"]),
        weight_decay=float(gold[f"{tag}/weight_decay"]),
        trust_coefficient=float(gold[f"{tag}/trust_coefficient"]),
    )
    model = Bag({n: torch.from_numpy(gold[f"{tag}/p0/{n}"]) for n in NAMES})
    lars = optim.build(optim.param_groups(model, cfg), cfg, float(gold[f"{tag}/lr"]))
    for s in range(3):
        for name, p in model.named_parameters():
            key = f"{tag}/g{s}/{name}"
            p.grad = torch.from_numpy(gold[key]) if key in gold else None
        lars.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(
                p.detach(), torch.from_numpy(gold[f"{tag}/p{s + 1}/{name}"]), rtol=1e-9, atol=1e-12
            )
            key = f"{tag}/mu{s + 1}/{name}"
            if key in gold and name != "none_g":
                torch.testing.assert_close(lars.state[p]["mu"], torch.from_numpy(gold[key]), rtol=1e-9, atol=1e-12)


def test_lars_is_esvits():
    gold = np.load(GOLDEN / "esvit_optim.npz")
    lr, decay, momentum, trust = gold["lars__lr_wd_momentum_eta"]
    cfg = OptimConfig(name="lars", weight_decay=decay, momentum=momentum, trust_coefficient=trust)
    model = Bag({f"p{i}": torch.from_numpy(gold[f"lars__p{i}_init"]) for i in range(2)})
    lars = optim.build(optim.param_groups(model, cfg), cfg, lr)
    for s in range(3):
        for i, (_, p) in enumerate(model.named_parameters()):
            p.grad = torch.from_numpy(gold[f"lars__g{i}_step{s}"])
        lars.step()
        for i, (_, p) in enumerate(model.named_parameters()):
            torch.testing.assert_close(p.detach(), torch.from_numpy(gold[f"lars__p{i}_after{s}"]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tag", ["clip0", "clip1"])
def test_per_tensor_clip_is_esvits(tag):
    gold = np.load(GOLDEN / "esvit_optim.npz")
    names = [k.split("__", 2)[2] for k in gold.files if k.startswith(f"{tag}__g__")]
    model = Bag({n: torch.ones_like(torch.from_numpy(gold[f"{tag}__g__{n}"])) for n in names})
    cfg = OptimConfig(clip_per_tensor=float(gold[f"{tag}__clip"]))
    adamw = optim.build(optim.param_groups(model, cfg), cfg, 1e-3)
    for name, p in model.named_parameters():
        p.grad = torch.from_numpy(gold[f"{tag}__g__{name}"])
    metrics = GradientControl(FlatView(model, adamw), cfg)()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, torch.from_numpy(gold[f"{tag}__g_after__{name}"]), rtol=2e-5, atol=1e-7)
    norm = float(np.sqrt((gold[f"{tag}__norms"] ** 2).sum()))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_global_clip_is_torchs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    cfg = OptimConfig(clip_norm=0.3)
    sgd = torch.optim.SGD([{"params": list(model.parameters()), "name": "all"}], lr=0.1)
    model(torch.randn(5, 4)).square().sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    fake = [nn.Parameter(torch.zeros_like(g)) for g in want]
    for p, g in zip(fake, want, strict=True):
        p.grad = g
    norm = torch.nn.utils.clip_grad_norm_(fake, 0.3)
    metrics = GradientControl(FlatView(model, sgd), cfg)()
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-6)
    for p, q in zip(model.parameters(), fake, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-8)


def test_groups_follow_the_papers_and_leave_frozen_parameters_out():
    model = Bag(
        {
            "a.weight": torch.ones(2, 3),
            "a.bias": torch.ones(3),
            "head.last_layer.weight_g": torch.ones(4, 1),
            "mlp.experts.w1": torch.ones(4, 2, 3),
            "mlp.experts.bias1": torch.ones(4, 3),
            "pos": torch.ones(1, 2, 3),
        }
    )
    dict(model.named_parameters())["pos"].requires_grad_(False)
    names = {id(p): n for n, p in model.named_parameters()}

    def table(rule):
        groups = optim.param_groups(model, OptimConfig(decay=rule))
        return {g["name"]: [names[id(p)] for p in g["params"]] for g in groups}

    assert table("matrices") == {
        "decay": ["a.weight", "mlp.experts.w1"],
        "no_decay": ["a.bias", "mlp.experts.bias1"],
        "decay/last_layer": ["head.last_layer.weight_g"],
    }
    assert sorted(sum(table("all").values(), [])) == sorted(set(names.values()) - {"pos"})
    assert all(k.startswith("decay") for k in table("all"))


def test_a_frozen_group_is_skipped_whole():
    model = Bag({"a.weight": torch.ones(2, 2), "last_layer.weight": torch.ones(2, 2)})
    cfg = OptimConfig()
    adamw = optim.build(optim.param_groups(model, cfg), cfg, 0.1)
    optim.freeze(adamw, "last_layer", True)
    for _, p in model.named_parameters():
        p.grad = torch.ones_like(p)
    adamw.step()
    a, last = (p for _, p in model.named_parameters())
    assert (last == 1).all() and last not in adamw.state and (a != 1).all()
    optim.freeze(adamw, "last_layer", False)
    adamw.step()
    assert (last != 1).all() and float(adamw.state[last]["step"]) == 1


def test_an_expert_of_a_stack_has_its_own_norm():
    """LARS and per-tensor clip on a stack of experts equal those on separate tensors."""
    torch.manual_seed(0)
    w, g = torch.randn(3, 4, 5), torch.randn(3, 4, 5) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    for name in ("lars", "sgd"):
        cfg = OptimConfig(name=name, weight_decay=0.01, trust_coefficient=0.02, clip_per_tensor=1.0)
        stack, single = Bag({"experts.w1": w.clone()}), Bag({f"e{i}": w[i].clone() for i in range(3)})
        for model, grads in ((stack, [g.clone()]), (single, list(g.clone()))):
            optimizer = optim.build(optim.param_groups(model, cfg), cfg, 0.5)
            control = GradientControl(FlatView(model, optimizer), cfg)
            for (_, p), grad in zip(model.named_parameters(), grads, strict=True):
                p.grad = grad
            control()
            optimizer.step()
        got = next(p for _, p in stack.named_parameters())
        torch.testing.assert_close(got.detach(), torch.stack([p.detach() for _, p in single.named_parameters()]))
