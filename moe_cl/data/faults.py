"""What can go wrong with a sample, one name each; who counts it, and when too much of it stops the run.

Lasting faults (the bytes are wrong) fill the slot with a substitute; transient ones (the way to them is disturbed) are
retried until ``retry_seconds`` are over. Neither changes the batch size or any later position.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_cl.data.shard import UNSAFE_MEMBER, ZERO_LENGTH

log = logging.getLogger("moe_cl.data")

CORRUPT_IMAGE = "corrupt_image"
TRUNCATED_TAR = "truncated_tar"
TOO_MANY_PIXELS = "too_many_pixels"
VANISHED_SHARD = "vanished_shard"
STALE_INDEX = "stale_index"  # the tar is not the one that was indexed
MISSING_LABEL = "missing_label"  # replaced where labels are needed; else counted, and the image is used
LASTING = (CORRUPT_IMAGE, TRUNCATED_TAR, ZERO_LENGTH, TOO_MANY_PIXELS, UNSAFE_MEMBER, VANISHED_SHARD, STALE_INDEX)

SERVER_ERROR = "server_error"  # 5xx
TOO_MANY_REQUESTS = "too_many_requests"  # 429
CONNECTION_RESET = "connection_reset"
SHORT_READ = "short_read"
TIMEOUT = "timeout"
IO_ERROR = "io_error"  # a local or network disk that fails for now
TRANSIENT = (SERVER_ERROR, TOO_MANY_REQUESTS, CONNECTION_RESET, SHORT_READ, TIMEOUT, IO_ERROR)

IN_A_ROW = 100  # this many bad samples in a row stop the run
LEAST_SEEN = 1000  # max_bad_fraction is taken of at least this many samples


class SampleFault(Exception):
    """A lasting fault of one sample: ``name`` from LASTING, ``detail`` for the log."""

    def __init__(self, name: str, detail: str):
        super().__init__(f"{name}: {detail}")
        self.name, self.detail = name, detail


class DataStop(RuntimeError):
    """The run must save and stop; the text is the reason, one line (and the list of bad samples)."""


class SourceLost(DataStop):
    """A URL or disk stayed unreachable for ``retry_seconds``."""


class TooManyFaults(DataStop):
    """More bad samples than ``max_bad_fraction``, or ``IN_A_ROW`` in a row."""


def bad_sample(name: str, detail: str, epoch: int, position: int, bad: int, key: str, shard: str) -> dict[str, Any]:
    """The journal event of a lasting fault; ``substitute`` is added when it is known."""
    return {"name": "bad_sample", "fault": name, "epoch": epoch, "position": position, "bad": bad, "key": key,
            "shard": shard, "detail": detail}  # fmt: skip


@dataclass
class Tally:
    """Counts events by fault name on this rank, logs the 1st, 2nd, 4th, 8th ... of each, and says when to stop."""

    max_bad_fraction: float
    counts: Counter[str] = field(default_factory=Counter)
    seen: int = 0
    bad: int = 0
    row: int = 0
    worst: list[str] = field(default_factory=list)

    def add(self, positions: Sequence[int], events: list[dict[str, Any]]) -> None:
        """One micro-batch: its slots in order, and its events. Raises TooManyFaults."""
        bad: Counter[int] = Counter()
        for event in events:
            name, count = event["fault"], event.get("count", 1)
            self.counts[name] += count
            if (self.counts[name] - count).bit_length() != self.counts[name].bit_length():
                log.warning("%s (%s: %d so far)", describe(event), name, self.counts[name])
            if event["name"] == "bad_sample":
                bad[event["position"]] += 1
                self.worst = [*self.worst, describe(event)][-20:]
        for position in positions:
            self.seen += 1
            self.bad += bad[position] > 0
            self.row = self.row + bad[position] if bad[position] else 0
            if self.row >= IN_A_ROW:
                self._stop(f"{self.row} bad samples in a row")
        if self.bad > self.max_bad_fraction * max(self.seen, LEAST_SEEN):
            self._stop(
                f"{self.bad} of {self.seen} samples are bad, more than data.max_bad_fraction = {self.max_bad_fraction}"
            )

    def _stop(self, why: str) -> None:
        raise TooManyFaults(f"{why}; mend the shards (`python -m data_prep lint --fix`); the last ones:\n  " +
                            "\n  ".join(self.worst))  # fmt: skip


class LeftOut:
    """Samples that one pass of an evaluation goes without: named in the log (the 1st, 2nd, 4th, 8th ...) and counted.

    Args:
        samples: how many the pass has. max_bad_fraction: of these (judged over at least ``LEAST_SEEN``).
    """

    def __init__(self, samples: int, max_bad_fraction: float):
        self.samples, self.max_bad_fraction = samples, max_bad_fraction
        self.counts: Counter[str] = Counter()

    def add(self, fault: str, text: str) -> None:
        """One more. Raises TooManyFaults."""
        self.counts[fault] += 1
        bad = self.counts.total()
        if bad & (bad - 1) == 0:
            log.warning("%s; left out of the evaluation", text)
        if bad > self.max_bad_fraction * max(self.samples, LEAST_SEEN):
            raise TooManyFaults(f"{bad} of {self.samples} evaluation samples are bad: {dict(self.counts)}")


def describe(event: dict[str, Any]) -> str:
    """One line of an event."""
    if event["name"] == "bad_sample":
        text = f"{event['fault']}: sample {event['bad']} ({event['key']} in {event['shard']}): {event['detail']}"
        return f"{text}; replaced by {event['substitute']}" if event.get("substitute") is not None else text
    if event["name"] == "missing_label":
        return f"{event['fault']}: sample {event['bad']} has none, others of its shard do; used all the same"
    return f"{event['fault']}: {event['url']}: {event['detail']}; tried again"
