"""Contrastive and self-distillation pretraining of vision encoders with sparse experts.

The encoder of a run, of one of its checkpoints or of an exported folder, for inference in one process::

    import moe_cl
    encoder = moe_cl.load("runs/quickstart")
    features = encoder([images]).features  # images (N, C, H, W) -> (N, encoder.dim)
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_cl.models.backbone import Backbone

__version__ = "0.1.0"


def load(path: str | PathLike[str], which: str = "auto", device: str = "cpu") -> Backbone:
    """A pretrained encoder in evaluation mode, all experts in this process, no process group.

    Args:
        path: a run's out directory, one of its checkpoints, or a folder that ``export`` or ``import`` wrote.
        which: of a run: ``teacher``, ``student`` or ``auto`` (what the method's authors evaluate: EsViT's teacher, the
            student of the others).
        device: where it goes.

    Raises:
        moe_cl.config.ConfigError: nothing there, damaged, or of another model.
    """
    from pathlib import Path

    from moe_cl.evals import pretrained

    module, _, _ = pretrained.load(Path(path), which)
    return module.requires_grad_(False).eval().to(device)
