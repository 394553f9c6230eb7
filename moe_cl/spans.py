"""Named spans of a step as a Chrome trace (chrome://tracing, ui.perfetto.dev). Off, a span costs a dictionary look-up.

``with span("encode student"): ...`` anywhere in a step; ``start(path)`` before the first profiled step and ``stop()``
after the last. On an accelerator work is queued: a span then shows when Python handed the work over, unless the trace
was started with ``synchronize``.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

_NOTHING = contextlib.nullcontext()
_trace: _Trace | None = None


class _Trace:
    def __init__(self, path: Path, rank: int, synchronize: Callable[[], None] | None):
        self.path, self.rank, self.synchronize = path, rank, synchronize
        self.events: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def span(self, name: str, values: dict[str, Any]) -> Iterator[None]:
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            if self.synchronize is not None:
                self.synchronize()
            event = {"name": name, "ph": "X", "ts": begin / 1000, "dur": (time.perf_counter_ns() - begin) / 1000}
            event |= {"pid": self.rank, "tid": threading.get_native_id()}
            self.events.append(event | ({"args": values} if values else {}))


def span(name: str, **values: Any) -> AbstractContextManager[None]:
    """The time of a block under ``name``; ``values`` are shown beside it. Nothing happens while no trace is on."""
    return _NOTHING if _trace is None else _trace.span(name, values)


def start(path: str | Path, rank: int = 0, synchronize: Callable[[], None] | None = None) -> None:
    """Begin to record. ``synchronize``: called at the end of each span (for example ``torch.cuda.synchronize``)."""
    global _trace
    _trace = _Trace(Path(path), rank, synchronize)


def stop() -> Path | None:
    """Write the trace and switch spans off. Returns its path; None if none was on."""
    global _trace
    trace, _trace = _trace, None
    if trace is None:
        return None
    name = {"name": "process_name", "ph": "M", "pid": trace.rank, "args": {"name": f"rank {trace.rank}"}}
    document = {"traceEvents": [name, *trace.events], "displayTimeUnit": "ms"}
    trace.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = trace.path.with_name(f"{trace.path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(document))
    os.replace(temporary, trace.path)
    return trace.path
