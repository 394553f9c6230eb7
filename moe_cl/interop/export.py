"""``python -m moe_cl export FORMAT --checkpoint RUN --out PATH``: an encoder for other libraries and for inference.

====================  ==========================================  ===================================================
format                PATH                                        loads with
====================  ==========================================  ===================================================
safetensors           folder: weights, config.json, model card    ``moe_cl.load``; any network, experts merged
huggingface           folder of timm's hub layout                 ``timm.create_model("local-dir:..."/"hf-hub:...")``
timm                  .safetensors or .pth                        ``timm.create_model(..., checkpoint_path=)``
torchvision           .safetensors or .pth, ResNets               ``torchvision.models.resnet50()``
deit                  .pth, dense ViTs; note on heads beside it   DeiT's ``main.py --resume``
detectron2            .npz or .safetensors; key map beside it     ``DetectionCheckpointer``
====================  ==========================================  ===================================================
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_cl.config import ConfigError, ModelConfig
from moe_cl.interop import deit, detectron2, timm, torchvision
from moe_cl.interop.card import card
from moe_cl.models.folder import Settings, save


def native(module: nn.Module, settings: Settings, out: Path) -> list[str]:
    """A folder of our own names. Returns the Python lines that load it, as every exporter here does."""
    save(out, module.state_dict(), settings, card(module, settings))
    return ["import moe_cl", f"encoder = moe_cl.load({str(out)!r})", "features = encoder([images]).features"]


def to_huggingface(module: nn.Module, settings: Settings, out: Path) -> list[str]:
    """timm's hub layout; a network with experts, which timm has not, keeps our names and loads with ``moe_cl.load``."""
    try:
        timm.dense(module, "timm")
    except ConfigError:
        return native(module, settings, out)
    views = settings.views
    more = timm.hub_config(module, settings.model, views.size, views.normalize)
    if timm.small_stem(module):
        raise ConfigError(f"a hub folder cannot say {settings.model.backbone}'s stem: export timm or safetensors")
    lines = ["import timm", f'net = timm.create_model("local-dir:{out}", pretrained=True{timm.norm(module)})',
             "features = net.eval()(images)"]  # fmt: skip
    save(out, module.state_dict(), settings, card(module, settings, lines), more)  # timm moves EsViT's names itself
    return lines


def to_timm(module: nn.Module, settings: Settings, out: Path) -> list[str]:
    """One file by timm's names."""
    lines = timm.usage(module, settings.model, str(out))
    write(out, timm.state(module))
    return lines


def to_torchvision(module: nn.Module, settings: Settings, out: Path) -> list[str]:
    """One file by torchvision's names."""
    torchvision.check(module, settings.model)
    write(out, module.state_dict())
    return torchvision.usage(module, settings.model, str(out))


def to_deit(module: nn.Module, settings: Settings, out: Path) -> list[str]:
    """``{"model": ...}`` in a .pth, and ``OUT.json`` with the number of heads."""
    note = deit.note(module, settings.model)
    if out.suffix not in (".pth", ".pt"):
        raise ConfigError(f"{out}: DeiT's script reads .pth files; let --out end so")
    write(out, module.state_dict(), wrap="model")
    beside(out, note)
    return [f"# {note['heads']} heads", f"net = {note['build']}",
            f"net.load_state_dict(torch.load({str(out)!r}, weights_only=True)['model'], strict=False)"]  # fmt: skip


def to_detectron2(module: nn.Module, settings: Settings, out: Path) -> list[str]:
    """Arrays by Detectron2's names, and ``OUT.json`` with the key map."""
    names = detectron2.keymap(module, settings.model)
    state = {names[name]: value for name, value in module.state_dict().items()}
    if out.suffix == ".npz":
        _make(out, lambda: detectron2.write_npz(out, state))
    elif out.suffix == ".safetensors":
        write(out, state)
    else:
        raise ConfigError(f"{out}: the detectron2 format is .npz or .safetensors (no pickle); let --out end so")
    beside(out, names)
    return detectron2.usage(str(out))


FORMATS: dict[str, Callable[[nn.Module, Settings, Path], list[str]]] = {
    "safetensors": native,
    "huggingface": to_huggingface,
    "timm": to_timm,
    "torchvision": to_torchvision,
    "deit": to_deit,
    "detectron2": to_detectron2,
}


def write(path: Path, state: dict[str, Tensor], wrap: str | None = None) -> None:
    """A .safetensors or torch file of tensors alone. Raises ConfigError."""
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if path.suffix == ".safetensors":
        _make(path, lambda: save_file(state, path, {"format": "pt"}))
    elif path.suffix in (".pth", ".pt"):
        _make(path, lambda: torch.save({wrap: state} if wrap else state, path))
    else:
        raise ConfigError(f"{path}: let --out end in .safetensors or .pth")


def beside(path: Path, tree: object) -> None:
    """``PATH.json``."""
    note = path.with_name(path.name + ".json")
    _make(note, lambda: note.write_text(json.dumps(tree, indent=1) + "\n"))


def _make(path: Path, action: Callable[[], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        action()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        why = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise ConfigError(f"{path}: cannot be written ({why})") from None


def open_encoder(path: Path, which: str = "auto") -> tuple[nn.Module, Settings]:
    """The encoder of a run, checkpoint or exported folder, with its settings. Raises ConfigError."""
    from moe_cl.evals import pretrained
    from moe_cl.models import folder

    if folder.is_folder(path):
        module, _, _ = pretrained.load(path, which)
        return module, folder.read_settings(path)
    module, cfg, step = pretrained.load(path, which)
    which = pretrained.side(path, which)
    source = {"method": cfg.method, "recipe": cfg.recipe, "step": step, "which": which}
    model = ModelConfig(cfg.model.backbone, dict(cfg.model.options))
    return module, Settings(model, cfg.moe, cfg.views, source)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``export``."""
    parser.add_argument("format", choices=tuple(FORMATS))
    parser.add_argument("--checkpoint", type=Path, required=True, help="run, checkpoint, exported or imported folder")
    parser.add_argument("--out", type=Path, required=True, help="folder (safetensors, huggingface) or file to write")
    whose = "whose encoder; auto: what the method's authors evaluate (EsViT's teacher, else the student)"
    parser.add_argument("--which", choices=("auto", "teacher", "student"), default="auto", help=whose)


def main(args: argparse.Namespace) -> int:
    """Write, and print how to load it. Raises ConfigError."""
    module, settings = open_encoder(args.checkpoint, args.which)
    lines = FORMATS[args.format](module.eval(), settings, args.out)
    print(f"{args.out}: {args.format}, {sum(p.numel() for p in module.parameters()):,} parameters. To load it:\n")
    print("\n".join(f"    {line}" for line in lines))
    return 0
