"""Names in published checkpoints and what they are called here: MoCo v1/v2 and JCL, MoCo v3 and CR-MoE, EsViT and DINO.

Pure renaming of flat state dicts; a distributed wrapper's ``module.`` is dropped. Here a network is ``backbone.*`` and
``heads.NAME.*`` (``moe_cl.methods.base.Encoder``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_cl.config import ConfigError

_EXPERTS = {
    ".mlp.gate.w_gate": ".mlp.router.weight",
    ".mlp.gate.w_noise": ".mlp.router.noise_weight",
    ".mlp.experts.htoh4.weight": ".mlp.experts.w1",  # (E, H, D)
    ".mlp.experts.htoh4.bias": ".mlp.experts.b1",
    ".mlp.experts.h4toh.weight": ".mlp.experts.w2",  # (E, D, H)
    ".mlp.experts.h4toh.bias": ".mlp.experts.b2",
}


@dataclass
class Official:
    """``kind``: moco, mocov3 or esvit. State dicts of student, teacher and method (queue, centres), by our names."""

    kind: str
    student: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)


def split(state: Mapping[str, Any]) -> Official:
    """The parts of a published state dict. Raises ConfigError for one that no reader knows.

    EsViT and DINO keep ``student`` and ``teacher`` in one file as state dicts of their own; give either one (the result
    is in ``student``) or the file's mapping.
    """
    if isinstance(state.get("student"), Mapping):
        teacher = state.get("teacher") or {}
        return Official("esvit", *({_esvit(_bare(k)): v for k, v in s.items()} for s in (state["student"], teacher)))
    state = {_bare(k): v for k, v in state.items()}
    heads = {k.split(".", 1)[0] for k in state}
    if "encoder_q" in heads:
        return _moco(state)
    if "base_encoder" in heads:
        return _mocov3(state)
    if any(".last_layer." in f".{k}" or k.startswith(("backbone.", "head.mlp", "layers.0.")) for k in state):
        return Official("esvit", {_esvit(k): v for k, v in state.items()})
    raise ConfigError(f"no published checkpoint of MoCo, CR-MoE, EsViT or DINO: names start with {sorted(heads)[:4]}")


def _bare(name: str) -> str:
    return name.removeprefix("module.")


def _moco(state: Mapping[str, Any]) -> Official:
    out = Official("moco")
    for name, value in state.items():
        side, _, rest = name.partition(".")
        if side == "encoder_q":
            out.student[_fc(rest)] = value
        elif side == "encoder_k":
            out.teacher[_fc(rest)] = value
        else:
            out.method[name] = value
    return out


def _fc(name: str) -> str:
    if not name.startswith("fc."):
        return f"backbone.{name}"
    part = name.removeprefix("fc.")  # v1: one linear, "weight"; v2: "0.weight" and "2.weight"
    return f"heads.fc.{part}" if part[0].isdigit() else f"heads.fc.0.{part}"


def _mocov3(state: Mapping[str, Any]) -> Official:
    out = Official("mocov3")
    for name, value in state.items():
        side, _, rest = name.partition(".")
        if side == "predictor":
            out.student[f"heads.predictor.{rest}"] = value
        elif side in ("base_encoder", "momentum_encoder"):
            (out.student if side == "base_encoder" else out.teacher)[_projected(rest)] = value
        else:
            out.method[name] = value
    return out


def _projected(name: str) -> str:
    for head in ("fc.", "head."):  # of a ResNet, of a ViT
        if name.startswith(head):
            return f"heads.projector.{name.removeprefix(head)}"
    for theirs, ours in _EXPERTS.items():
        name = name.replace(theirs, ours)
    return f"backbone.{name}"


def _esvit(name: str) -> str:
    for theirs, ours in (("head_dense.", "heads.region."), ("head.", "heads.view.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return f"backbone.{name.removeprefix('backbone.')}"


def detectron2_name(name: str) -> str:
    """Detectron2's name of a MoCo ResNet tensor (``encoder_q.*``, a DDP prefix allowed), as its converter gives it.

    Names without ``layer`` get ``stem.``; layerN -> res(N+1); bnM -> convM.norm; downsample -> shortcut.
    """
    name = name.removeprefix("module.").removeprefix("encoder_q.")
    if "layer" not in name:
        name = f"stem.{name}"
    for n in (1, 2, 3, 4):
        name = name.replace(f"layer{n}", f"res{n + 1}")
    for n in (1, 2, 3):
        name = name.replace(f"bn{n}", f"conv{n}.norm")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def deit_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A MoCo v3 ViT's ``base_encoder.*`` without its head, by DeiT's (timm's) names, for its fine-tuning script."""
    out = {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        if name.startswith("base_encoder.") and not name.startswith("base_encoder.head"):
            out[name.removeprefix("base_encoder.")] = value
    return out
