"""One step of data ahead of the training step, so that all ranks learn together that one of them has no more.

A rank whose data fails cannot take part in the next step, and the others must not wait for it there: the failure is
known one step earlier and travels in that step's all-reduce (``Parts.stop``).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_cl.data.faults import DataStop
from moe_cl.data.loader import Loader
from moe_cl.views.spec import Batch


@dataclass
class Fetched:
    """One optimizer step's micro-batches of this rank, the epoch they belong to, and how long they were waited for."""

    batches: list[Batch]
    epoch: int
    seconds: float


class Ahead:
    """``take()`` gives what was fetched before and fetches the next; ``failed`` says why there is no next."""

    def __init__(self, loader: Loader):
        self.loader, self.failed = loader, None
        self._ready: Fetched | None = None
        self._fetch()

    def _fetch(self) -> None:
        self._ready = None
        try:
            batches = next(self.loader)
        except DataStop as reason:
            self.failed: DataStop | None = reason
            return
        self._ready = Fetched(batches, self.loader.epoch, self.loader.wait_seconds)

    def take(self, last: bool = False) -> Fetched:
        """This step's data; the next is fetched unless this is the ``last``. Raises DataStop if there is none."""
        if self._ready is None:
            raise self.failed or DataStop("no data was fetched for this step")
        ready = self._ready
        if not last:
            self._fetch()
            ready.seconds = self.loader.wait_seconds if self.failed is None else ready.seconds
        return ready
