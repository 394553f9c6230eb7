"""kNN inside pretraining with experts over two ranks, one without a test image; and an evaluation under torchrun."""

from __future__ import annotations

import json
import subprocess

import pytest

from moe_cl.cli import main
from moe_cl.tracking.journal import read
from tests.pool import free_port
from tests.small import ENV, ROOT, launch, make_shards, settings

pytestmark = pytest.mark.processes


def values(out, name):
    return json.loads((out / "evals" / f"{name}.json").read_text())["values"]


def test_two_ranks_give_one_processs_figures(tmp_path):
    bank, one = make_shards(tmp_path / "bank", images=97), make_shards(tmp_path / "one", images=1)
    out, sets = tmp_path / "run", [f"eval.bank={bank}", f"eval.test={one}"]
    done = launch(2, *settings(bank, out, "moe.ep_size=2", "eval.knn_every=0.5", "eval.k=5", *sets))
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line for line in read(out / "journal.jsonl") if line["kind"] == "evaluation"]
    assert [line["step"] for line in found] == [3, 6]
    assert main(["eval", "knn", "--checkpoint", str(out), "--k", "5", "--batch", "10"]) == 0
    assert values(out, "knn")["k5/top1"] == pytest.approx(found[-1]["values"]["top1"], abs=1e-9)

    # 97 images in batches of 10 shared by two ranks: whole ones, a smaller last one, not the same number on each.
    command = ["eval", "knn", "--checkpoint", str(out), "--k", "5", "--batch", "10", "--test", str(bank)]
    assert main([*command, "--name", "alone"]) == 0
    launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "moe_cl"]
    done = subprocess.run(
        [*launcher, *command, "--name", "shared"], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert values(out, "shared") == pytest.approx(values(out, "alone"))
