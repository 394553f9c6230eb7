"""What a checkpoint does with images, as a small file of arrays (``explain.npz``) that the report draws from.

Legend: n evaluation images, m shown images of which there are two views, g patches a side, P = g*g, T tokens (P, with
the class token before them where there is one), k experts a token, h heads.

    features (n, d), labels (n,), thumbnails (n, s, s, 3) uint8, class_names, step
    routing/L0 (n, T, k), experts/L0                     every MoE layer, evaluation images
    views (m, 2, S, S, 3) uint8, view_labels (m,)        two training views of each shown image
    view_routing/L0 (m, 2, T, k), match (m, P) with -1   patch of view 2 at the same place as each patch of view 1
    correspondence (m, P), similarity (m, P)             region of view 2 most like each region of view 1
    attention (m, h, g, g), attention_images (m, S, S, 3) class token of the last block, where the model has one
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

NAME = "explain.npz"


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """All of it or nothing of it."""
    temporary = path.with_name(f".{path.name}.tmp.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(path)


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file; {} if there is none. Nothing in it is unpickled."""
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
