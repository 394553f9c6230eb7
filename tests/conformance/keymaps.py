"""Names and shapes of published checkpoints against our networks, and the names they get elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from moe_cl.comm import LocalComm
from moe_cl.interop.official import deit_names, detectron2_name, split
from moe_cl.methods import moco, mocov3
from moe_cl.models.build import build_backbone
from tests.conformance.harness import Golden, Report


def _networks(name: str, shapes: dict[str, list[int]]) -> tuple[Any, Any, Any]:
    """Method, student and teacher of a published model, sized by its shapes, without memory."""
    state = split(shapes)
    method_name, _, backbone = name.partition("_")
    if method_name == "moco":
        version, _, backbone = backbone.partition("_")
        dim, length = state.method["queue"]
        method: Any = moco.MoCo(moco.Params(0.07, dim, length, "linear" if version == "v1" else "mlp"), LocalComm())
    else:
        backbone = backbone or name.removeprefix("mocov3_")
        out, hidden = state.student["heads.predictor.3.weight"]
        kind = "vit" if "vit" in backbone else "resnet"
        method = mocov3.MoCoV3(mocov3.Params(dim=out, mlp_dim=hidden, head=kind), LocalComm())
    with torch.device("meta"):
        return method, *(b(build_backbone(backbone)) for b in (method.build_student, method.build_teacher))


def keymaps(z: Golden, report: Report) -> None:
    """Each model: every name and shape both ways, what is trained, how many; Detectron2's and DeiT's names."""
    for name in [n for n in z if isinstance(z[n], dict) and n.startswith(("moco_", "mocov3_")) and "nparams" not in n]:
        shapes = z[name]
        state = split(shapes)
        method, student, teacher = _networks(name, shapes)
        for side, module, want in (("student", student, state.student), ("teacher", teacher, state.teacher)):
            got = {k: list(v.shape) for k, v in module.state_dict().items()}
            report.same(name, f"{side} names", sorted(got), sorted(want))
            wrong = [k for k, shape in want.items() if got.get(k) != shape]
            report.same(name, f"{side} shapes", wrong, [])
        report.same(name, "method", sorted(method.state_dict()), sorted(state.method))
        if f"{name}_trainable" in z:
            trained = sorted(n for n, p in student.named_parameters() if p.requires_grad)
            want = split({str(n): 0 for n in z[f"{name}_trainable"]}).student
            report.same(name, "trained", trained, sorted(want))
        if f"{name}_nparams" in z:
            counts = z[f"{name}_nparams"]
            parts = {"base_backbone": student.backbone, "projector": student.heads["projector"],
                     "predictor": student.heads["predictor"]}  # fmt: skip
            fixed = student.backbone.pos_embed.numel()  # a buffer here, a parameter without gradient there
            for part, module in parts.items():
                ours = sum(p.numel() for p in module.parameters()) + (fixed if part == "base_backbone" else 0)
                report.same(name, f"{part} size", ours, int(counts[part]))
    for name in z.cases(r"(detectron2_resnet\d+)"):
        report.same(name, "names", [detectron2_name(k) for k in z[name]], list(z[name].values()))
    report.same("detectron2", "file", z["detectron2_toplevel"]["__author__"], "MOCO")
    for name in z.cases(r"deit_(\w+)"):
        want, source = z[f"deit_{name}"], z[f"mocov3_{name}"]
        keys = want["keys"]
        got = deit_names(source)
        report.same(f"deit_{name}", "names", sorted(got), sorted(keys))
        if isinstance(keys, dict):
            report.same(f"deit_{name}", "shapes", [k for k in keys if got.get(k) != keys[k]], [])
        report.same(f"deit_{name}", "file", want["toplevel"], ["model"])


CHECKS = {"moco_keymaps": keymaps}
