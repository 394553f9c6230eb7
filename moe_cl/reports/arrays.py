"""What a checkpoint does with images, as a small file of arrays (``explain.npz``) that the report draws from.

Legend: n evaluation images, m shown images of which there are two views, g patches a side, P = g*g, T tokens (P, with
the class token before them where there is one), k experts a token, h heads.

    origin                                               what all of it was made of, JSON (``explain.origin``)
    features (n, d), labels (n,), thumbnails (n, s, s, 3) uint8, class_names
    routing/L0 (n, T, k), experts/L0                     every MoE layer, evaluation images
    views (m, 2, S, S, 3) uint8, view_labels (m,)        two training views of each shown image
    view_routing/L0 (m, 2, T, k), match (m, P) with -1   patch of view 2 at the same place as each patch of view 1
    correspondence (m, P), similarity (m, P)             region of view 2 most like each region of view 1
    attention (m, h, g, g), attention_images (m, S, S, 3) class token of the last block, where the model has one
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def origin(path: Path) -> dict[str, Any]:
    """What the file was made of: journal, step, weights, data, images ...; {} if there is none or it does not say."""
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file["origin"])) if "origin" in file.files else {}


def of_run(out: Path, journal: str) -> dict[str, np.ndarray]:
    """The arrays in ``out`` if they are of the run with that journal; {} if an earlier run there left them."""
    path = out / NAME
    return read(path) if origin(path).get("journal") == journal else {}


def source(arrays: dict[str, np.ndarray]) -> str:
    """Whose weights and which images the arrays show, for a caption; "" where they do not say."""
    found = json.loads(str(arrays["origin"])) if "origin" in arrays else {}
    if not {"weights", "step", "data"} <= found.keys():
        return ""
    return f"{found['weights'].capitalize()} at step {found['step']:,}, {found['data']}."
