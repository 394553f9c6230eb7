"""Fixtures for all tests: one pool of ranks, two threads of torch at most, and the time by marker at the end."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

import pytest

from tests.pool import Pool

BUDGET_MINUTES = {"install": 4, "unit": 7, "processes": 6, "kills": 3, "cluster": 5, "browser": 3}
_seconds: dict[str, float] = defaultdict(float)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=5, help="random kill -9 in tests/kills")


@pytest.fixture(scope="session")
def pool():
    """Up to four gloo ranks, shared by every multi-process test."""
    ranks = Pool(4)
    yield ranks
    ranks.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    start = time.monotonic()
    result = yield
    kind = next((m for m in BUDGET_MINUTES if item.get_closest_marker(m)), "unit")
    _seconds[kind] += time.monotonic() - start
    return result


def pytest_terminal_summary(terminalreporter):
    install = os.environ.get("MOE_CL_INSTALL_SECONDS")
    if install:
        _seconds["install"] = float(install)
    for kind, minutes in BUDGET_MINUTES.items():
        if kind in _seconds:
            terminalreporter.write_line(f"time {kind:10s} {_seconds[kind]:7.1f} s of {minutes * 60} s")
