"""Names and shapes of published checkpoints against our networks, and the names they get elsewhere."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from moe_cl.comm import LocalComm
from moe_cl.config import ModelConfig
from moe_cl.interop import detectron2
from moe_cl.interop.export import to_deit
from moe_cl.interop.official import deit_names, detectron2_name, split
from moe_cl.methods import moco, mocov3
from moe_cl.models.build import build_backbone
from moe_cl.models.folder import Settings
from tests.conformance.harness import Check, Golden, Report


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


def _deit_file() -> list[str]:
    """What a file that we export for DeiT holds (of a small network)."""
    settings = Settings(ModelConfig("vit_tiny", {"depth": 1, "img_size": 32}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deit.pth"
        to_deit(settings.backbone(), settings, path)
        return sorted(torch.load(path, weights_only=True))


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
    if "detectron2_toplevel" in z:
        # our lines that load an exported file make the published one's dictionary
        lines = "\n".join(detectron2.usage("weights.npz"))
        said = dict(re.findall(r'"(\w+)": "?(\w+)', lines))
        report.same("detectron2", "file", sorted(said), sorted(z["detectron2_toplevel"]))
        heuristics = str(z["detectron2_toplevel"]["matching_heuristics"])
        report.same("detectron2", "matching_heuristics", said["matching_heuristics"], heuristics)
    for name in z.cases(r"deit_(\w+)"):
        want, source = z[f"deit_{name}"], z[f"mocov3_{name}"]
        keys = want["keys"]
        got = deit_names(source)
        report.same(f"deit_{name}", "names", sorted(got), sorted(keys))
        if isinstance(keys, dict):
            report.same(f"deit_{name}", "shapes", [k for k in keys if got.get(k) != keys[k]], [])
        report.same(f"deit_{name}", "file", _deit_file(), sorted(want["toplevel"]))


CHECKS = {"moco_keymaps": Check(keymaps, (r"^(moco_v\d|mocov3)_",))}
