"""Spans: nothing while off, a Chrome trace while on."""

import json
import time

from moe_cl import spans as trace


def test_spans_nest_in_a_chrome_trace(tmp_path):
    with trace.span("ignored"):
        pass
    trace.start(tmp_path / "trace.json", rank=3)
    with trace.span("step", number=7), trace.span("data"):
        time.sleep(0.002)
    path = trace.stop()
    events = {e["name"]: e for e in json.loads(path.read_text())["traceEvents"]}
    assert set(events) == {"process_name", "step", "data"}
    step, data = events["step"], events["data"]
    assert step["pid"] == 3 and step["args"] == {"number": 7} and data["dur"] >= 2000
    assert step["ts"] <= data["ts"] and data["ts"] + data["dur"] <= step["ts"] + step["dur"]
    assert trace.stop() is None


def test_a_span_that_is_off_costs_next_to_nothing():
    begin = time.perf_counter()
    for _ in range(10_000):
        with trace.span("x"):
            pass
    assert (time.perf_counter() - begin) / 10_000 < 20e-6
