"""The methods by name: ``moe_cl/methods/NAME.py`` holds one class, ``METHOD``; only that file is imported."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from moe_cl.config import ConfigError

if TYPE_CHECKING:
    from moe_cl.methods.base import Method

NAMES = ("crmoe", "mocov3", "moco", "simclr", "jcl", "esvit")


def get(name: str) -> type[Method]:
    """The class of a method. Raises ConfigError with the nearest name."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1, 0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"method: {name!r} is none of {', '.join(NAMES)}{hint}")
    return importlib.import_module(f"moe_cl.methods.{name}").METHOD


def params_of(name: str) -> type:
    """The dataclass of a method's own hyper-parameters (``params`` of a recipe)."""
    return get(name).Params
