"""The model card of an exported encoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moe_cl.models.folder import Settings

_SOURCE = ("method", "recipe", "step", "which", "file", "kind")


def card(module: nn.Module, settings: Settings, usage: Sequence[str] = ()) -> str:
    """Markdown: what it is, where it is from, what images it takes, how to load it (``usage``: lines of another
    library)."""
    options = ", ".join(f"{k}={v}" for k, v in settings.model.options.items())
    values = sum(p.numel() for p in module.parameters())
    rows = [("network", settings.model.backbone + (f" ({options})" if options else ""))]
    rows += [("features", str(module.dim)), ("parameters", f"{values:,}")]
    if settings.moe.blocks not in ("none", []):
        moe = settings.moe
        rows.append(("experts", f"{moe.experts}, {moe.top_k} a token, in blocks {moe.blocks}; merged, for any ep"))
    rows += [("images", f"{settings.views.size} px, normalisation {settings.views.normalize}")]
    rows += [(key, str(settings.source[key])) for key in _SOURCE if settings.source.get(key) not in (None, "")]
    own = ["import moe_cl", 'encoder = moe_cl.load("THIS FOLDER")', "features = encoder([images]).features  # (N, dim)"]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    text = (
        f"---\nlibrary_name: {'timm' if usage else 'moe_cl'}\ntags: [image-feature-extraction, self-supervised]\n---\n"
        f"# A pretrained vision encoder\n\n| | |\n|---|---|\n{table}\n\n"
        "Self-supervised features; no classifier. No figure of merit is stated here: measure it on your data with "
        "`python -m moe_cl eval`.\n"
    )
    for lines in (own, list(usage)):
        if lines:
            text += "\n```python\n" + "\n".join(lines) + "\n```\n"
    return text
