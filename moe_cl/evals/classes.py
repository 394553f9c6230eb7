"""Classes by name: the numbers of two sets are not the same classes because they are the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from moe_cl.config import ConfigError


def class_names(images: Any) -> tuple[str, ...]:
    """Names of the classes of a set (``sets.images_of``) by number; empty where it knows none."""
    if isinstance(images, Subset):
        return class_names(images.dataset)
    if isinstance(images, ConcatDataset):
        return class_names(images.datasets[0])
    known = getattr(images, "class_names", None) or getattr(images, "classes", None) or ()
    return tuple(str(name) for name in known)


def places(train: Sequence[str], test: Sequence[str]) -> list[int] | None:
    """The training set's number of each class of the test set; None where the numbers are the same already, or one
    set knows no names. Raises ConfigError for a test class that the training set does not have."""
    if not train or not test or list(train[: len(test)]) == list(test):
        return None
    if missing := [name for name in test if name not in train]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"the test set's classes {', '.join(map(repr, missing[:3]))}{more} are not in the training set "
            f"({', '.join(map(repr, train[:3]))} ...); give --train and --test of the same classes"
        )
    if twice := [name for name in test if list(train).count(name) > 1]:
        raise ConfigError(f"the training set has two classes {twice[0]!r}; number both sets' classes alike")
    return [list(train).index(name) for name in test]
