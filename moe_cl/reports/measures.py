"""Figures of evaluations by their names: the unit they are in, and which end of them is the better one."""

from __future__ import annotations

import re

# The last part of a name (``k10/top1``, ``bbox/AP50``, ``5-shot/ridge``) says what the figure is.
_ACCURACY = re.compile(r"top-?\d+|accuracy|per_class|map11|validation|(knn|linear)_\w+")
_SHOTS = re.compile(r"(^|/)\d+-shot/|^\w+-shot_")
_SHARE = re.compile(r"agreement_\w+|\w*selectivity\w*|keys_for_\d+|data_wait|mfu")
_PERCENT = re.compile(r"AP\d*")
_LOW = re.compile(r"\w*loss|distance|seconds|data_wait")


def share(key: str) -> bool:
    """Is it a share in [0, 1], shown in percent?"""
    last = _last(key)
    return bool(_ACCURACY.fullmatch(last) or _SHARE.fullmatch(last) or _SHOTS.search(key))


def percent(key: str) -> bool:
    """Is it in percent already (COCO's AP)?"""
    return bool(_PERCENT.fullmatch(_last(key)))


def in_percent(key: str, value: float) -> float | None:
    """The figure in percent; None where it is no share."""
    return 100.0 * value if share(key) else value if percent(key) else None


def shown(key: str, value: float) -> str:
    """The figure with its unit, for reading."""
    number = in_percent(key, value)
    return f"{number:.2f}%" if number is not None else f"{value:,.4g}"


def better(key: str) -> int:
    """1: more is better, -1: less is, 0: neither (a scale, a count, an interval of confidence)."""
    last = _last(key)
    if _LOW.fullmatch(last):
        return -1
    accuracy = _ACCURACY.fullmatch(last) or percent(key) or (_SHOTS.search(key) and last != "interval")
    return 1 if accuracy or last == "images_per_second" else 0


def _last(key: str) -> str:
    return key.rsplit("/", 1)[-1]
