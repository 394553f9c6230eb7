"""What is refused before any process starts, each with one line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_cl import config
from moe_cl.config import ConfigError, RunConfig
from moe_cl.engine import checks


def make(**changes):
    cfg = RunConfig()
    cfg.moe.blocks, cfg.moe.experts = "odd", 8
    for key, value in changes.items():
        group, _, name = key.partition("__")
        setattr(getattr(cfg, group), name, value)
    return cfg


@pytest.mark.parametrize(
    ("changes", "world", "says"),
    [
        ({"moe__ep_size": 3}, 3, "moe.ep_size 3 does not divide the 8 experts"),
        ({"moe__ep_size": 4}, 2, "moe.ep_size 4 does not divide the 2 ranks"),
        ({"moe__ep_size": 2, "moe__blocks": "none"}, 2, "without experts"),
        ({"moe__top_k": 9}, 1, "moe.top_k 9 must lie between 1 and moe.experts 8"),
        ({"moe__blocks": "even"}, 1, "write none, odd, all or a list"),
        ({"batch__global_batch": 255}, 2, "batch.global_batch 255 does not divide over 2 ranks; take 256"),
        ({"batch__micro_batch": 48}, 2, "batch.micro_batch 48 does not divide the 128 samples of a rank"),
        ({"batch__accumulation": 3}, 2, "batch.accumulation 3 does not divide the 128 samples"),
        ({"batch__accumulation": 2, "batch__micro_batch": 128}, 2, "but global_batch is 256"),
        ({"engine__ds_config": "nowhere.json"}, 1, "'nowhere.json' is no file; ds_configs/ has"),
        ({"schedule__warmup_epochs": 200.0}, 1, "is longer than the 100.0 epochs"),
        ({"schedule__epochs": 0.0}, 1, "must be above 0"),
    ],
)
def test_refused(changes, world, says):
    with pytest.raises(ConfigError) as error:
        checks.check(make(**changes), world)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO stage 3, which DeepSpeed's MoE does not support"),
        ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "contiguous_gradients is false; experts"),
        ({"zero_optimization": {"stage": 1, "reduce_scatter": False}}, "reduce_scatter is false; experts under ZeRO"),
        ({"bf16": {"enabled": True}}, "set engine.precision=bf16 instead"),
        ({"fp16": {"enabled": True}}, "set engine.precision=fp16 instead"),
        ({"train_batch_size": 64}, "has train_batch_size = 64, but the recipe's batch.global_batch = 256"),
        ({"gradient_accumulation_steps": 4}, "has gradient_accumulation_steps = 4, but the recipe's accumulation = 1"),
        ({"gradient_clipping": 1.0}, "has gradient_clipping = 1.0"),
        ({"optimizer": {"type": "Adam"}}, "belong to the recipe"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
            "has torch_autocast bf16, but engine.precision = fp32",
        ),
    ],
)
def test_json_and_recipe_may_not_disagree(tmp_path, config, says):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error:
        checks.ds_config(make(engine__ds_config=str(path), engine__precision="fp32"), 1, True)
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_broken_json_is_named(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        checks.ds_config(make(engine__ds_config=str(path)), 1, True)


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no g\+\+ found"):
        checks.check(make(), 1)


@given(
    micro=st.integers(1, 64), accumulation=st.integers(1, 8), world=st.integers(1, 64), given_=st.sampled_from("man")
)
def test_batch_identity_holds(micro, accumulation, world, given_):
    cfg = make(batch__global_batch=micro * accumulation * world)
    cfg.batch.micro_batch = micro if given_ == "m" else None
    cfg.batch.accumulation = accumulation if given_ == "a" else None
    b = checks.batch_identity(cfg, world)
    assert b.micro_batch * b.accumulation * b.ranks == b.global_batch
    if given_ == "n":
        assert b.accumulation == 1


def test_clipping_is_always_written_and_precision_filled_in():
    config = checks.ds_config(make(engine__precision="bf16"), 2, True)
    assert config["gradient_clipping"] == 0.0
    assert checks.precision_of(config) == "bf16"
    assert config["train_batch_size"] == 256 and config["train_micro_batch_size_per_gpu"] == 128
    assert checks.precision_of(checks.ds_config(make(engine__precision="fp32"), 2, True)) == "fp32"


@pytest.mark.parametrize(
    ("changes", "per_epoch", "says"),
    [
        ({}, 7, None),
        ({"batch__micro_batch": 32, "schedule__max_steps": 9, "moe__ep_size": 2, "engine__precision": "bf16"}, 7, None),
        ({"engine__ds_config": "cpu_zero2", "data__workers": 3, "eval__k": 5, "model__compile": True}, 7, None),
        ({"model__channels_last": True}, 7, None),
        ({"batch__exact_large_batch": True, "model__activation_checkpointing": True}, 7, None),
        ({"batch__global_batch": 512}, 7, "(batch.global_batch 256 -> 512)"),
        ({"schedule__epochs": 3.0}, 7, "(schedule.epochs 100.0 -> 3.0)"),
        ({"optim__base_lr": 0.05, "moe__top_k": 1}, 7, "(moe.top_k 2 -> 1, optim.base_lr 0.00015 -> 0.05)"),
        ({"teacher__momentum": 0.1, "teacher__schedule": "constant"}, 7, "teacher.schedule cosine -> constant"),
        ({"moe__gate": "shazeer", "engine__statistics": "published"}, 7, "engine.statistics global -> published"),
        ({"views__crop_min": 0.5, "optim__lr_scaling": "none"}, 7, "views.crop_min None -> 0.5"),
        ({"params": {"temperature": 1.0}}, 7, "(params.temperature 0.2 -> 1.0)"),
        ({"model__options": {"depth": 3}}, 7, "(model.options {} -> {'depth': 3})"),
        ({}, 8, "holds a run of 7 steps an epoch, this data set gives 8"),
    ],
)
def test_a_run_goes_on_as_what_it_is(tmp_path, changes, per_epoch, says):
    """What shapes the result stays at a resume; where and how fast it is made may change."""
    checkpoint = tmp_path / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint / "extra.json").write_text(json.dumps({"step": 3, "extra": {"steps_per_epoch": 7}}))
    before = make()
    before.params = {"temperature": 0.2}
    config.save(before, checkpoint / "config.yaml")  # enough where the out dir has lost its own
    cfg = make(**{key: value for key, value in changes.items() if key != "params"})
    cfg.out, cfg.resume, cfg.params = str(tmp_path), True, changes.get("params", before.params)
    if says is None:
        checks.check_same_run(cfg, 700, per_epoch)
        return
    for total, kind in ((700, "an unfinished"), (3, "a finished")):
        with pytest.raises(ConfigError) as error:
            checks.check_same_run(cfg, total, per_epoch)
        said = str(error.value)
        assert says in said and "\n" not in said and "another --out" in said
        assert "steps an epoch" in said or (f"{kind} run with other settings" in said and "checkpoint convert" in said)


def test_another_spelling_of_an_older_version_is_no_change(tmp_path):
    cfg = make(engine__statistics="group: 64")
    cfg.out, cfg.resume = str(tmp_path), True
    (tmp_path / "journal.jsonl").write_text("")
    config.save(make(engine__statistics="group:64"), tmp_path / "config.yaml")
    assert checks.begun(cfg) and "statistics" not in checks.without_effect(cfg)
    cfg.engine.statistics = "group: 32"
    assert not checks.begun(cfg) and "group: 32 (was group: 64)" in checks.without_effect(cfg)


def test_a_begun_run_goes_on_without_a_checkpoint_if_it_is_the_same(tmp_path):
    cfg = make(data__train="https://me:one@host/x.tar")
    cfg.out, cfg.resume = str(tmp_path), True
    assert not checks.begun(cfg)  # nothing is there
    (tmp_path / "journal.jsonl").write_text("")
    config.save(make(data__train="https://***@host/x.tar"), tmp_path / "config.yaml")  # as a run keeps it
    assert checks.begun(cfg)
    cfg.data.train, cfg.data.workers, cfg.moe.ep_size = "https://me:two@host/x.tar", 7, 2  # not what a run is
    assert checks.begun(cfg)
    cfg.optim.base_lr = 1.0
    assert not checks.begun(cfg)
    cfg.optim.base_lr, cfg.resume = make().optim.base_lr, False
    assert not checks.begun(cfg)


def test_the_beginning_of_another_continuation_is_not_gone_on_with(tmp_path):
    """EsViT's second phase, killed before its first checkpoint: its steps are not those of a run set otherwise."""
    cfg = make(model__init_from="runs/view", data__train="x.tar")
    cfg.out, cfg.resume = str(tmp_path), True
    checks.check_same_run(cfg, 700, 7)  # nothing is there
    (tmp_path / "journal.jsonl").write_text("")
    config.save(cfg, tmp_path / "config.yaml")
    checks.check_same_run(cfg, 700, 7)
    cfg.data.workers, cfg.moe.ep_size, cfg.schedule.max_steps = 7, 2, 9  # not what a run is
    checks.check_same_run(cfg, 700, 7)
    cfg.optim.base_lr = 1.0
    with pytest.raises(ConfigError) as error:
        checks.check_same_run(cfg, 700, 7)
    said = str(error.value)
    assert "beginning of a run with other settings (optim.base_lr 0.00015 -> 1.0)" in said and "another --out" in said
    assert "\n" not in said
    cfg.resume = False  # begins anew there
    checks.check_same_run(cfg, 700, 7)
