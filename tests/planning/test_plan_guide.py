"""Every ``plan`` of docs/cluster.md, on two nodes where it names more; the tables hold what it prints."""

import functools
import re
import shlex

import pytest

from moe_cl import cli
from moe_cl.planning import calibrate
from tests.guide import DOCS

TEXT = (DOCS / "cluster.md").read_text()
PLANS = re.findall(r"^ +python -m moe_cl (plan .*)$", TEXT, re.M)
APART = ("--simulate", "--calibrate", "device.json")  # tested below


def columns(line):
    return re.split(r" {2,}", line.strip())


def test_there_are_some():
    assert len(PLANS) == 7 and sum("--scaling" in words for words in PLANS) == 3
    assert all(sum(word in words for words in PLANS) == n for word, n in zip(APART, (1, 1, 2), strict=True))


@pytest.mark.parametrize("words", [p for p in PLANS if not any(word in p for word in APART)])
def test_plans(words, monkeypatch, capsys):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    argv = shlex.split(words)
    scaling = "--scaling" in argv
    if scaling:
        argv += ["--nodes", "2"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    if scaling:
        rows = [columns(line) for line in said.splitlines() if re.match(r"\s*\d+ ", line)]
        table = [columns(line) for line in TEXT.split(words)[1].splitlines()[:14]]
        assert len(rows) == 2 and all(row in table for row in rows), said
    else:
        assert "WARNING" not in said


@pytest.mark.processes
def test_simulated(monkeypatch, capsys):
    """The guide's command for two nodes and two blocks."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (words,) = [p for p in PLANS if "--simulate" in p]
    small = ["--nodes", "2", "batch.global_batch=1536", "model.options={depth: 2}"]
    assert cli.main([*shlex.split(words), *small]) == 0
    said = capsys.readouterr().out
    assert "of 16 in " in said and "its expert group 8..15 (8) on node 1 is that of the layout" in said


def test_measured_and_planned_with(monkeypatch, capsys, tmp_path):
    """Both commands of the guide, this machine measured for a moment and without the two processes of its links."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate, "measure", functools.partial(calibrate.measure, 0.01, links=False, rounds=1))
    measure, then = [shlex.split(p) for p in PLANS if "device.json" in p]
    assert cli.main(measure) == 0 and "written to device.json" in capsys.readouterr().out
    assert cli.main([*then, "--nodes", "1"]) in (0, 1)  # whether it fits is this machine's
    assert "(measured 20" in capsys.readouterr().out
