"""Which ranks stand together: groups of ranks, the nodes they lie on, and what a collective of theirs carries."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Where all groups of one kind stand.

    ranks: of a group. nodes: most that one group stands on. together: most ranks of one group on one node. crossing:
    for each node that differs from the others, how many groups with (ranks on it, nodes in all) reach beyond it.
    """

    ranks: int
    nodes: int
    together: int
    crossing: frozenset[frozenset[tuple[tuple[int, int], int]]]

    def outside(self, each: Callable[[int, int], float]) -> float:
        """Of the busiest node: the sum of ``each(ranks of a group on it, nodes of the group)``."""
        return max((sum(n * each(*group) for group, n in node) for node in self.crossing), default=0.0)


@dataclass(frozen=True)
class Layout:
    """nodes x per_node ranks; experts of one set over ``ep`` of them, consecutive ones or (strided) spread apart."""

    nodes: int
    per_node: int
    ep: int = 1
    strided: bool = False

    @property
    def world(self) -> int:
        """All ranks."""
        return self.nodes * self.per_node

    @property
    def copies(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // self.ep

    def groups(self, kind: str) -> list[range]:
        """The ranks of every group: ``world``, ``expert`` (they share a set of experts) or ``copies`` (of the same)."""
        if kind == "world":
            return [range(self.world)]
        size = {"expert": self.ep, "copies": self.copies}[kind]
        if (kind == "expert") != self.strided:  # neighbours
            return [range(first, first + size) for first in range(0, self.world, size)]
        apart = self.world // size
        return [range(first, self.world, apart) for first in range(apart)]

    def group_of(self, kind: str, rank: int) -> list[int]:
        """The ranks of the group that ``rank`` is in."""
        return next(list(group) for group in self.groups(kind) if rank in group)

    def nodes_of(self, ranks: range | list[int]) -> Counter[int]:
        """Node -> how many of ``ranks`` stand on it."""
        return Counter(rank // self.per_node for rank in ranks)

    def spread(self, kind: str) -> Spread:
        """How the groups of a kind lie on the nodes."""
        return _spread(self, kind)


@functools.lru_cache(maxsize=256)
def _spread(layout: Layout, kind: str) -> Spread:
    groups = layout.groups(kind)
    places = [layout.nodes_of(group) for group in groups]
    crossing: list[Counter[tuple[int, int]]] = [Counter() for _ in range(layout.nodes)]
    for place in places:
        for node, ranks in place.items() if len(place) > 1 else ():
            crossing[node][ranks, len(place)] += 1
    return Spread(
        len(groups[0]), max(map(len, places)), max(max(place.values()) for place in places),
        frozenset(frozenset(node.items()) for node in crossing if node),
    )  # fmt: skip


def carried(kind: str, size: float, spread: Spread) -> tuple[float, float]:
    """Bytes of one collective (``ledger.Message``): what a rank sends, and what leaves the busiest node altogether."""
    ranks = spread.ranks
    if kind == "all_reduce":
        return 2 * size * (ranks - 1) / ranks, spread.outside(lambda here, nodes: 2 * size * (nodes - 1) / nodes)
    if kind == "all_gather":
        return size * (ranks - 1), spread.outside(lambda here, nodes: size * (ranks - here))
    return size * (ranks - 1) / ranks, spread.outside(lambda here, nodes: size * here * (ranks - here) / ranks)
