"""Counter-based numbers: functions of their key alone, and good enough as noise."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_cl import rng


@given(st.integers(0, 2**31), st.integers(0, 2**31), st.permutations(range(7)))
def test_a_sample_keeps_its_numbers_wherever_it_stands(seed, step, order):
    positions = torch.arange(1000, 1007)
    whole = rng.normal(rng.fold(rng.sample_keys(seed, step, positions), 3), (4, 5))
    mixed = rng.normal(rng.fold(rng.sample_keys(seed, step, positions[list(order)]), 3), (4, 5))
    assert torch.equal(whole[list(order)], mixed)


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 2**40), st.integers(0, 12))
def test_view_generator_is_a_function_of_its_key(seed, epoch, position, view):
    a, b = (rng.generator(seed, epoch, position, view).random(4) for _ in range(2))
    other = rng.generator(seed, epoch, position, view + 1).random(4)
    assert np.array_equal(a, b) and not np.array_equal(a, other)


def test_moments_and_independence():
    keys = rng.sample_keys(0, 3, torch.arange(20_000))
    u, n = rng.uniform(keys, (16,), torch.float64), rng.normal(keys, (16,))
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 2e-3 and abs(u.var() - 1 / 12) < 1e-3
    assert abs(n.mean()) < 6e-3 and abs(n.std() - 1) < 5e-3
    for values in (u, n.double()):
        assert (torch.corrcoef(values.T) - torch.eye(16)).abs().max() < 0.04  # between draws of a key
        neighbours = torch.stack([values[:-1, 0], values[1:, 0]])
        assert torch.corrcoef(neighbours)[0, 1].abs() < 0.04
