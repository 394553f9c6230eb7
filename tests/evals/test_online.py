"""kNN inside pretraining over ranks: one without a test image, its own batch norm, lost data; and under torchrun."""

from __future__ import annotations

import json
import subprocess
import types

import pytest
import torch

from moe_cl.cli import main
from moe_cl.comm import LocalComm, SimComm
from moe_cl.config import CheckpointConfig, ConfigError, EvalConfig, RunConfig
from moe_cl.engine.checkpoint import store
from moe_cl.engine.checkpoint.format import read_manifest
from moe_cl.evals.online import check_best, knn_steps, online_knn
from moe_cl.models.norm import BatchNorm
from moe_cl.tracking.journal import read
from tests.pool import free_port
from tests.small import ENV, ROOT, launch, make_shards, settings

pytestmark = pytest.mark.processes


def values(out, name):
    return json.loads((out / "evals" / f"{name}.json").read_text())["values"]


def test_two_ranks_give_one_processs_figures(tmp_path):
    bank, one = make_shards(tmp_path / "bank", images=97), make_shards(tmp_path / "one", images=1)
    out, sets = tmp_path / "run", [f"eval.bank={bank}", f"eval.test={one}"]
    keep = ["checkpoint.keep_best=knn/top1", "checkpoint.keep_last=9"]
    done = launch(2, *settings(bank, out, "moe.ep_size=2", "eval.knn_every=0.5", "eval.k=5", *sets, *keep))
    assert done.returncode == 0, done.stderr[-2000:]
    # An evaluation's figures belong to the checkpoint of its own step, which therefore exists, and to no other.
    measured = {store.step_of(path): set(read_manifest(path).metrics) for path in store.complete(out)}
    assert measured == {2: set(), 3: {"knn/top1", "knn/top5"}, 4: set(), 6: {"knn/top1", "knn/top5"}}
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


@pytest.mark.parametrize(
    ("best", "every", "says"),
    [
        (None, 0, None),
        ("-knn/top5", 1, None),
        ("knn/typo", 1, "take knn/top1 or knn/top5"),
        ("knn/top1", 0, "never measured: set eval.knn_every"),
    ],
)
def test_what_is_kept_as_the_best_is_measured(best, every, says):
    cfg = RunConfig(checkpoint=CheckpointConfig(keep_best=best), eval=EvalConfig(knn_every=every))
    if says is None:
        return check_best(cfg)
    with pytest.raises(ConfigError, match=says):
        check_best(cfg)


def test_what_is_asked_for_is_measured():
    """Rounded to no step at all, nothing would be, and ``keep_best`` would keep nothing."""
    cfg = RunConfig()
    assert knn_steps(cfg, 3) == 0
    for epochs, steps in ((0.1, 1), (0.5, 2), (1, 3), (2, 6)):
        cfg.eval.knn_every = epochs
        assert knn_steps(cfg, 3) == steps


class Brightness(torch.nn.Module):
    """A backbone of one batch norm: the mean of each channel, then normalised."""

    def __init__(self, mean):
        super().__init__()
        self.norm = BatchNorm(3, affine=False)
        self.norm.running_mean.fill_(mean)

    def forward(self, views):
        return types.SimpleNamespace(features=self.norm(views[0].mean((2, 3))))


def test_every_rank_measures_with_the_batch_norm_of_the_checkpoint(tmp_path):
    """MoCo's running statistics are each rank's own; rank 0's are those that a checkpoint holds."""
    data = make_shards(tmp_path, images=60)
    cfg = RunConfig()
    cfg.eval.bank = cfg.eval.test = str(data)
    cfg.eval.k, cfg.views.size = 3, 16

    def measured(comm):
        module = torch.nn.Module()
        module.backbone = Brightness(1e6 * comm.rank).train()
        found = online_knn(cfg, module, comm, torch.device("cpu"), None)
        return found, module.backbone.training, module.backbone.norm.running_mean.tolist()

    alone = measured(LocalComm())
    assert alone[0]["top1"] > 0.9
    assert SimComm.run(3, measured) == [alone] * 3


def test_an_evaluation_without_its_data_is_said_and_the_run_goes_on(tmp_path):
    data, bank, out = make_shards(tmp_path / "data"), make_shards(tmp_path / "bank"), tmp_path / "run"
    for tar in sorted(bank.glob("*.tar")):
        tar.write_bytes(b"\0" * tar.stat().st_size)  # the index stays, so the check before the start is content
    sets = [f"eval.bank={bank}", f"eval.test={data}", "eval.knn_every=0.5", "eval.k=5", "data.max_bad_fraction=0"]
    done = launch(2, *settings(data, out, "moe.ep_size=2", *sets, "checkpoint.keep_best=knn/top1"))
    assert done.returncode == 0, done.stderr[-2000:]
    lines = read(out / "journal.jsonl")
    failed = [line for line in lines if line.get("name") == "evaluation_failed"]
    assert [(line["step"], line["evaluation"]) for line in failed] == [(3, "knn"), (6, "knn")]
    assert "evaluation samples are bad" in failed[0]["reason"] and "the run goes on" in done.stdout
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 7))
    assert not [line for line in lines if line["kind"] == "evaluation"]
