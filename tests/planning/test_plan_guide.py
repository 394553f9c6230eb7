"""Every ``plan`` of docs/cluster.md, on two nodes where it names more."""

import re
import shlex

import pytest

from moe_cl import cli
from tests.guide import DOCS

PLANS = re.findall(r"^ +python -m moe_cl (plan .*)$", (DOCS / "cluster.md").read_text(), re.M)


def test_there_are_some():
    assert len(PLANS) >= 5 and sum("--scaling" in words for words in PLANS) == 3


@pytest.mark.parametrize("words", [p for p in PLANS if "--simulate" not in p and "--calibrate" not in p])
def test_plans(words, monkeypatch, capsys):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    argv = shlex.split(words)
    if "--scaling" in argv:
        argv += ["--nodes", "2"]
    if any(word.endswith(".json") for word in argv):
        pytest.skip("needs the file that --calibrate writes (tests/planning/test_hardware.py)")
    assert cli.main(argv) == 0
    assert capsys.readouterr().out
