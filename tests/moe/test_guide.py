"""docs/moe.md says what the code does: its lists, its layouts, its picture of a dispatch, its command."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_cl.moe
from moe_cl.comm import SimComm
from moe_cl.config import ConfigError, MoEConfig
from moe_cl.losses import groups
from moe_cl.moe.exchange import pair_up
from moe_cl.moe.experts import SparseMLP
from tests.guide import DOCS
from tests.small import ENV, ROOT

PAGE = (DOCS / "moe.md").read_text()


def between(first, last):
    return PAGE.split(first, 1)[1].split(last, 1)[0]


def test_settings_files_and_parameters_are_all_there():
    settings = set(re.findall(r"`(\w+)`", between("(`moe_cl/config.py`): ", "Router noise")))
    assert settings == {f.name for f in dataclasses.fields(MoEConfig)}
    rows = re.findall(r"^\|([^|]*)\|", between("## Files", "Parameters of"), re.MULTILINE)
    files = re.findall(r"`(\w+\.py)`", "".join(rows))
    assert sorted(files) == sorted(p.name for p in Path(moe_cl.moe.__path__[0]).glob("[a-z]*.py"))
    layer = SparseMLP(6, MoEConfig(experts=4, hidden_ratio=2.0), layer=0)
    sizes = {"D": 6, "E": 4, "H": 12}
    written = re.findall(r"`([\w.]+)` \(([^)]*)\)", between("Parameters of a layer: ", ";"))
    assert {n: [sizes[s] for s in shape.split(", ")] for n, shape in written} == {
        n: list(p.shape) for n, p in layer.named_parameters()
    }


def test_the_picture_of_the_dispatch():
    """Rows and shared pairs as they stand there."""
    lines = re.findall(r"(\w) > (\d),(\d)", between("tokens > experts", "rows for rank 0"))
    mine = [[(t, int(i), int(j)) for t, i, j in lines if (t in "abc") == (rank == 0)] for rank in (0, 1)]

    def rank(comm):
        pairs = pair_up(torch.tensor([[i, j] for _, i, j in mine[comm.rank]]), 2, comm)
        names = [mine[comm.rank][row][0] for row in pairs.token.tolist()]
        first = sum(pairs.send[0])
        shared = {name for name, flag in zip(names, pairs.shared.tolist(), strict=True) if flag}
        return sorted(names[:first]), sorted(names[first:]), shared, pairs.remote

    zero, one = SimComm.run(2, rank)
    letters = lambda text: sorted(re.findall(r"\b[a-e]\b", text))  # noqa: E731
    assert letters(between("rows for rank 0", "rows for rank 1")) == sorted(zero[0] + one[0])
    assert letters(between("rows for rank 1", "c and e: both experts")) == sorted(zero[1] + one[1])
    here = between("rows here", "sorted by expert")
    assert letters(here) == sorted(zero[0] + one[0] + zero[1] + one[1])
    assert {"c", "e"} <= zero[2] | one[2] and (zero[3], one[3]) == (2, 1)
    by_expert = {int(e): set(names.split()) for e, names in re.findall(r"(\d): \[([a-e ]+)\]", PAGE)}
    assert by_expert == {e: {t for t, *chosen in lines for c in chosen if int(c) == e} for e in range(4)}


def test_the_layouts():
    from deepspeed.utils.groups import _get_expert_parallel_ranks

    rows = re.findall(r"^(default|data before expert)\s+((?:\{[\d ]+\} ?)+)\s+((?:\{[\d ]+\} ?)+)$", PAGE, re.MULTILINE)
    assert [name for name, *_ in rows] == ["default", "data before expert"]
    for name, *written in rows:
        made = _get_expert_parallel_ranks(8, 1, 4, 1, name != "default")
        for text, ranks in zip(written, made, strict=True):
            assert [[int(n) for n in group.split()] for group in re.findall(r"\{([\d ]+)\}", text)] == ranks


def test_the_statistics_modes():
    modes = re.findall(r"^\| `([^`]+)` \|", between("## Statistics over ranks", "## Layouts"), re.MULTILINE)
    assert modes == ["global", "group: N", "published"]
    assert [groups.parse(mode.replace("N", "4")) for mode in modes] == ["global", 4, "published"]
    with pytest.raises(ConfigError, match=r"global, published or 'group: N'"):
        groups.parse("mean")


def test_the_command():
    (command,) = re.findall(r"^python -m (.*)$", PAGE, re.MULTILINE)
    parts = set(re.findall(r"`python -m benchmarks.moe --only (\w+)`", PAGE))
    done = subprocess.run(
        [sys.executable, "-m", command, "--help"], cwd=ROOT, env=ENV, capture_output=True, text=True, check=True
    )
    assert parts == {"messages"} and all(part in done.stdout for part in parts)


def test_only_one_file_names_deepspeed():
    """The table says so of layer.py."""
    for path in Path(moe_cl.moe.__path__[0]).glob("[a-z]*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
        assert any(name.startswith("deepspeed") for name in names) == (path.name == "layer.py")
