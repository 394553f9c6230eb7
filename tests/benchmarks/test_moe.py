"""Ratios of sides that take turns come with an interval of their median."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.moe import HEAD, alternate, columns, median_interval


@pytest.mark.parametrize(("rounds", "k"), [(1, 1), (3, 1), (5, 1), (7, 1), (8, 2), (9, 2), (20, 6)])
def test_order_statistics_of_the_sign_test(rounds, k):
    """The k-th smallest and largest for at least 90 %, or all of them."""
    assert median_interval([float(x) for x in reversed(range(1, rounds + 1))]) == [k, rounds + 1 - k]


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=30))
def test_holds_the_median(values):
    low, high = median_interval(values)
    ordered = sorted(values)
    assert low <= ordered[(len(values) - 1) // 2] and ordered[len(values) // 2] <= high


def test_rows_have_what_is_shown():
    rows = alternate({"a": lambda: sum(range(20_000)), "b": lambda: sum(range(40_000))}, 5)
    assert rows["a"]["interval"] == [1.0, 1.0] and rows["a"]["cpu_ratio"] == 1.0
    for clock in ("", "cpu_"):
        low, high = rows["b"][f"{clock}interval"]
        assert low <= rows["b"][f"{clock}ratio"] <= high
    assert len(columns(rows["b"])) == len(HEAD)
