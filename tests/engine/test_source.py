"""A run that goes on from another's checkpoint is on the same schedules, and has steps to make."""

import pytest

from moe_cl import config
from moe_cl.config import ConfigError
from moe_cl.engine.checkpoint import source
from tests.engine import test_faults
from tests.engine.test_checks import make


@pytest.fixture
def first(tmp_path):
    """A run of 100 epochs of 7 steps, stopped after 21."""
    model, saver = test_faults.run(tmp_path / "first")
    saver.config = config.to_tree(make(schedule__stop_epochs=3)) | {"params": {"warmup_teacher_epochs": 30}}
    saver.save(21, {"step": 21, "steps_per_epoch": 7}, wait=True)
    return tmp_path / "first"


def second(first, **changes):
    params = changes.pop("params", {"regions": True})
    cfg = make(moe__blocks="none", **changes)
    cfg.params = params
    cfg.model.init_from, cfg.out = str(first), str(first.with_name("second"))
    return cfg


@pytest.mark.parametrize(
    ("changes", "total", "per_epoch", "says"),
    [
        ({}, 700, 7, None),
        ({"schedule__stop_epochs": 50, "batch__micro_batch": 32}, 350, 7, None),
        ({}, 21, 7, "has 21 steps and this run ends at 21: none is left"),
        ({"schedule__max_steps": 9}, 9, 7, "has 21 steps and this run ends at 9: none is left"),
        ({}, 700, 8, "has 7 steps an epoch, this run 8"),
        ({"views__crop_min": 0.5, "optim__betas": [0.9, 0.95]}, 700, 7, None),  # another phase, on the same curves
        ({"batch__global_batch": 512}, 700, 7, "(batch.global_batch 256 -> 512)"),
        ({"schedule__epochs": 50.0}, 350, 7, "(schedule.epochs 100.0 -> 50.0)"),
        ({"optim__base_lr": 0.05, "teacher__momentum": 0.9}, 700, 7, "base_lr 0.00015 -> 0.05, teacher.momentum 0.99"),
        ({"optim__lr_scaling": "none", "optim__weight_decay_end": 0.4}, 700, 7, "optim.weight_decay_end None -> 0.4"),
        ({"params": {"warmup_teacher_epochs": 5}}, 700, 7, "(params.warmup_teacher_epochs 30 -> 5)"),
    ],
)
def test_schedules_go_on_or_the_start_is_refused(first, changes, total, per_epoch, says):
    cfg = second(first, **changes)
    if says is None:
        return source.check_schedule(cfg, total, per_epoch)
    with pytest.raises(ConfigError) as error:
        source.check_schedule(cfg, total, per_epoch)
    assert says in str(error.value) and "checkpoint convert" in str(error.value) and "\n" not in str(error.value)


def test_where_the_data_go_on_is_known_before_the_start(first):
    """The source's place at first, then the run's own; at an epoch's end other data may follow."""
    cfg = second(first)
    assert source.cursor(cfg) is None
    _, saver = test_faults.run(first)
    saver.save(22, {"step": 22, "loader": {"cursor": 4}}, wait=True)
    assert source.cursor(cfg) == {"cursor": 4}
    _, saver = test_faults.run(cfg.out)
    saver.save(23, {"step": 23, "loader": {"cursor": 8}}, wait=True)
    cfg.resume = True
    assert source.cursor(cfg) == {"cursor": 8}
    saver.save(24, {"step": 24, "loader": {"cursor": 0}}, wait=True)
    assert source.cursor(cfg) is None


def test_a_damaged_source_is_one_line(first):
    path = first / "checkpoints" / "step-00000021" / "config.yaml"
    test_faults.flip(path)
    with pytest.raises(ConfigError, match="config.yaml does not have the sha256.*take another"):
        source.check_schedule(second(first), 700, 7)


def test_with_checkpoints_of_its_own_a_run_needs_no_source(first):
    cfg = second(first)
    assert source.needed(cfg)
    _, saver = test_faults.run(cfg.out)
    saver.save(22, {"step": 22}, wait=True)
    config.save(cfg, saver.out / "config.yaml")
    cfg.resume, cfg.model.init_from = True, None
    assert source.kept(cfg) == str(first)
    cfg.model.init_from = "the recipe's"
    assert source.kept(cfg) == str(first) and not source.needed(cfg)
    source.check_schedule(cfg, 10, 3)  # of no interest any more
    cfg.resume = False
    assert source.kept(cfg) == "the recipe's"
