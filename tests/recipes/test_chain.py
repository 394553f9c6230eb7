"""Trainings in two phases: the second recipe names the first, asks for its run, and goes on at its step."""

from __future__ import annotations

import shlex

import pytest

from moe_cl import config, methods
from moe_cl.cli import main
from moe_cl.engine import checks
from moe_cl.engine.checkpoint import source
from moe_cl.engine.schedules import total_steps
from moe_cl.tracking.journal import Journal, read
from moe_cl.tracking.tail import header
from tests.small import launch, make_shards

CHAINS = [name for name in config.recipe_names() if config.load(name, [], methods.params_of).follows]


@pytest.mark.parametrize("name", CHAINS)
def test_the_second_phase_is_the_first_with_regions(name, capsys):
    second = config.load(name, [], methods.params_of)
    first = config.load(second.follows, [], methods.params_of)
    assert second.model.init_from == f"runs/{second.follows}" and first.model.init_from is None
    assert (first.params.regions, second.params.regions) == (False, True)
    assert total_steps(first.schedule, 10) < total_steps(second.schedule, 10) == 3000
    assert first.schedule.epochs == second.schedule.epochs, "learning rate and temperatures go on along one curve"
    assert (first.model.backbone, first.optim, first.batch) == (second.model.backbone, second.optim, second.batch)
    theirs, mine = config.to_tree(first), config.to_tree(second)
    assert not [key for key, *_ in checks.changed(theirs, mine) if source.on_curve(key)]
    assert main(["recipes", name]) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if "--recipe" in line]
    words = [shlex.split(line.strip("# ")) for line in commands]
    recipes = [w[w.index("--recipe") + 1] for w in words]
    assert recipes == [second.follows, name]
    assert words[0][words[0].index("--out") + 1] == second.model.init_from


def test_without_the_first_phase_it_is_one_line(tmp_path, capsys):
    shards, nothing = make_shards(tmp_path / "data"), tmp_path / "nothing"
    command = ["pretrain", "--recipe", "esvit_swin_tiny_w14", "--data", str(shards), f"model.init_from={nothing}"]
    assert main([*command, "--check", "16"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "model.init_from=" in error
    assert f"pretrain --recipe esvit_swin_tiny_w14_view --out {nothing}" in error


@pytest.mark.processes
def test_two_phases_run_as_one_training(tmp_path):
    shards = make_shards(tmp_path / "data")
    vit = "model.options={img_size: 16, patch_size: 8, dim: 16, depth: 2, heads: 2}"
    sizes = ["model.backbone=vit", vit, "model.drop_path=0", "views.size=16", "views.local_size=8", "track.uri=none",
             "views.local_number=2", "params.out_dim=32", "params.hidden=16", "params.bottleneck=8", "data.streams=4",
             "batch.global_batch=16", "schedule.epochs=2", "schedule.warmup_epochs=0", "engine.precision=fp32",
             f"data.train={shards}", "optim.name=adamw"]  # fmt: skip
    first, second = tmp_path / "view", tmp_path / "both"
    stop = "schedule.stop_epochs=0.5"
    done = launch(0, "--recipe", "esvit_swin_tiny_w14_view", "--out", str(first), *sizes, stop)
    assert done.returncode == 0, done.stderr[-2000:]
    both = ["--recipe", "esvit_swin_tiny_w14", "--out", str(second), *sizes]
    other = Journal(second / "journal.jsonl")  # an earlier try's, ended before its first checkpoint
    other.step(1, {"loss": 1.0})
    other.close()
    done = launch(0, *both, f"model.init_from={first}", "schedule.max_steps=8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fresh: heads.region" in done.stdout and f"every key: {second / 'init_from.json'}" in done.stdout
    assert header(second / "previous-journal.jsonl")["id"] == other.id != header(second / "journal.jsonl")["id"]
    first.rename(tmp_path / "away")  # a run with checkpoints of its own needs it no more
    done = launch(0, *both, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    first = tmp_path / "away"
    steps = [[line for line in read(out / "journal.jsonl") if line["kind"] == "step"] for out in (first, second)]
    numbers = [line["step"] for part in steps for line in part]
    assert numbers == list(range(1, 13)) and len(steps[0]) == 3
    assert "loss/region" not in steps[0][-1]["values"] and "loss/region" in steps[1][0]["values"]
    rates = [line["values"]["lr"] for part in steps for line in part]
    assert rates == sorted(rates, reverse=True), "one schedule over both"
