"""What every source of images gives: a listing, which costs no decoding, and one item's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

UNLABELLED = -1


class Item(NamedTuple):
    """One image of a source. ``size`` in bytes plans the shards; ``at`` is whatever the source's reader needs."""

    name: str
    label: int
    size: int
    at: Any


class Sample(NamedTuple):
    """One image's bytes, and what came with it: fields of its json member, further members by extension."""

    image: bytes
    json: dict[str, Any]
    extra: dict[str, bytes]


class Reader:
    """Reads items in a worker process; files it opens are opened there, so that it can be sent."""

    def prepare(self, items: Sequence[Item]) -> None:
        """Told before the items of a shard are read, in the shard's order; a tar's reader asks the kernel ahead."""

    def read(self, item: Item) -> Sample:
        """The item's bytes. Raises OSError if they cannot be read, ``BadImage`` if they are known to be no image."""
        raise NotImplementedError


@dataclass
class Source:
    """A listing in the source's own order, and how to read from it.

    Attributes:
        name: default name of the shards.
        text: the source as the user wrote it, for the record.
        items: one an image.
        class_names: label -> name; empty where nobody knows them.
        reader: goes to each worker process and reads items there.
    """

    name: str
    text: str
    items: Sequence[Item]
    class_names: tuple[str, ...]
    reader: Reader
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SourceOptions:
    """Which part of a source is wanted, and the files that some sources need besides."""

    split: str = "train"
    labels: str | None = None  # ground-truth list of a flat tar or folder
    devkit: str | None = None  # ILSVRC2012 development kit: archive or folder
    root: str | None = None  # folder of the paths in a table, or of torchvision's files
