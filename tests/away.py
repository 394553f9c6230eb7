"""An accelerator that is not there: the CPU's numbers under a device's rules.

Tensors of device ``AWAY`` cannot be read as arrays, and an operation that mixes them with the CPU's raises, as on CUDA
(scalars, copies and indices given from the CPU are allowed there too). What a step does with devices is so tested on
machines without one. Autocast, streams and kernels are not imitated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

AWAY = torch.device("maia", 0)  # a name that torch knows and has nothing behind
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default}


class Away(Tensor):
    """A tensor on ``AWAY``; ``inner`` has its numbers."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Away:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    @property
    def device(self) -> torch.device:
        return AWAY

    def __repr__(self) -> str:
        return f"Away({self.inner})"

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise TypeError("an accelerator's tensor is no array: copy it to the host first")

    numpy = __array__

    def cpu(self) -> Tensor:
        return _aten._to_copy(self, device=torch.device("cpu"))

    def tolist(self) -> Any:
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _plain(x: Any) -> Any:
    return x.inner if isinstance(x, Away) else x


def _check(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether the operation runs on ``AWAY``. Raises RuntimeError if it cannot run on any one device."""
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not any(isinstance(x, Away) for x in leaves):
        return False
    if func in _COPIES:
        return isinstance(args[0], Away)
    if func is _aten.index_put.default:  # indexing's backward, whose zeros torch makes below where this can be seen
        return True
    if func in _INDEXED:
        leaves = [x for x in tree_leaves((args[0], args[2:])) if isinstance(x, Tensor)]
    if any(x.dim() and not isinstance(x, Away) for x in leaves):
        raise RuntimeError(f"{func}: tensors on two devices")
    return True


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    away, options = _check(func, args, kwargs), dict(kwargs)
    if options.get("device") is not None:
        away = torch.device(options["device"]).type == AWAY.type
        options["device"] = torch.device("cpu")
    out = func(*tree_map(_plain, args), **tree_map(_plain, options))
    if not away:
        return out
    out = tree_map(lambda x: Away(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


class _BelowDispatch(TorchFunctionMode):
    """What reads a device below where a dispatch mode sees it: tensors from lists, and ``x.to(other)``."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        options = dict(kwargs or {})
        if func is Tensor.new_tensor and isinstance(args[0], Away):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **options}).to(AWAY)
        if func is Tensor.to and len(args) == 2 and isinstance(args[1], Away):
            return args[0].to(AWAY, args[1].dtype, **options)
        where = options.get("device")
        if func is torch.tensor and where is not None and torch.device(where).type == AWAY.type:
            return torch.tensor(*args, **{**options, "device": "cpu"}).to(AWAY)
        return func(*args, **options)


@contextlib.contextmanager
def accelerator() -> Iterator[torch.device]:
    """Inside, ``AWAY`` is a device like any other; modules can be moved there."""
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _BelowDispatch(), _Factories():
            yield AWAY
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
