"""Evaluations on two ranks give one rank's figures, whole batches or not."""

from __future__ import annotations

import argparse

import pytest

from moe_cl.evals import cli
from moe_cl.evals.context import Context
from tests.evals.run_dir import make_images, make_run


def evaluate(comm, commands):
    import importlib

    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    out = []
    for command in commands:
        args = parser.parse_args(command)
        out.append(importlib.import_module(cli.PROTOCOLS[args.protocol]).run(Context(args, comm)))
    return out


def numbers(result):
    """Every number of nested lists and dicts, in order."""
    if isinstance(result, (dict, list)):
        return [n for v in (result.values() if isinstance(result, dict) else result) for n in numbers(v)]
    return [result] if isinstance(result, (int, float)) else []


@pytest.mark.processes
def test_a_rank_without_an_image(pool, tmp_path):
    """One test image and two ranks: neither waits for the other's figures."""
    out = tmp_path / "out"
    make_run(out, make_images(tmp_path / "images", per_class=2, classes=1))
    commands = [["routing", "--checkpoint", str(out)], ["correspondence", "--checkpoint", str(out)]]
    (alone,) = pool.run(1, evaluate, commands)
    for one, *both in zip(alone, *pool.run(2, evaluate, commands), strict=True):
        assert numbers(both[0]) == numbers(both[1]) == pytest.approx(numbers(one), rel=1e-4, abs=1e-6)


@pytest.mark.processes
def test_two_ranks_give_one_ranks_figures(pool, tmp_path):
    out = tmp_path / "out"
    make_run(out, make_images(tmp_path / "images", per_class=7))
    commands = [
        ["knn", "--k", "3", "--batch", "4"],
        ["linear", "--protocol", "crmoe", "--epochs", "2", "--probe-batch", "8"],
        ["fewshot", "--shots", "2", "--seeds", "3", "--methods", "ridge"],
        ["routing"],
        ["correspondence"],
        ["statistics", "--keys", "2"],
    ]
    commands = [[c[0], "--checkpoint", str(out), *c[1:]] for c in commands]
    (alone,) = pool.run(1, evaluate, commands)
    first, second = pool.run(2, evaluate, commands)
    for one, a, b in zip(alone, first, second, strict=True):
        assert numbers(one) == pytest.approx(numbers(a), rel=1e-4, abs=1e-6)
        assert numbers(a) == numbers(b)
