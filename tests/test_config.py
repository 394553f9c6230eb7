"""Recipes and overrides: types, nearest names, bases."""

import resource
from dataclasses import dataclass

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl import config
from moe_cl.config import ConfigError


@dataclass
class Params:
    temperature: float = 0.2
    dims: int = 8


def params_of(name):
    return Params


def recipe(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return str(path)


def test_override_is_typed_and_reaches_params(tmp_path):
    cfg = config.load(
        recipe(tmp_path, "method: mocov3\nparams: {temperature: 1}\n"),
        ["optim.base_lr=1e-4", "params.dims=16", "moe.blocks=[1, 3]", "data.train=a=b", "schedule.max_steps=5"],
        params_of,
    )
    assert cfg.params == Params(1.0, 16) and isinstance(cfg.params.temperature, float)
    assert cfg.optim.base_lr == 1e-4 and cfg.moe.blocks == [1, 3]
    assert cfg.data.train == "a=b" and cfg.schedule.max_steps == 5


@pytest.mark.parametrize("value", ["group: 64", "{group: 64}", "group:64", "'group: 64'", '"group:  64"'])
def test_groups_of_images_may_be_written_in_any_way(tmp_path, value):
    """Without quotes YAML takes ``group: 64`` for a mapping; all are one setting, also when runs are compared."""
    cfg = config.load(recipe(tmp_path, "method: mocov3\n"), [f"engine.statistics={value}"], params_of)
    assert cfg.engine.statistics == "group: 64"
    name = config.load(recipe(tmp_path, "method: mocov3\n"), ["track.run_name=a: b"], params_of).track.run_name
    assert name == "a: b"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("schedule.epoch=3", "unknown key schedule.epoch; did you mean epochs?"),
        ("shedule.epochs=3", "unknown key shedule; did you mean schedule?"),
        ("params.temprature=3", "unknown key params.temprature; did you mean temperature?"),
        ("moe.init=xaver", "'xaver' is not one of published, xavier; did you mean xavier?"),
        ("schedule.epochs=many", "schedule.epochs: expected float, found 'many'"),
        ("batch.global_batch=2.5", "batch.global_batch: expected int, found 2.5"),
        ("batch.exact_large_batch=3", "expected bool"),
        ("schedule.epochs.x=1", "epochs is a value"),
        ("nonsense", "write it as key=value"),
        ("data=[", "not valid YAML"),
    ],
)
def test_bad_settings_name_the_key_in_one_line(tmp_path, override, says):
    with pytest.raises(ConfigError) as error:
        config.load(recipe(tmp_path, "method: m\nschedule: {epochs: 2}\n"), [override], params_of)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean crmoe_vit_micro_fmnist"):
        config.load("crmoe_vit_micro_fmist", [], params_of)


def test_base_recipe_is_changed_not_replaced(tmp_path):
    base = recipe(tmp_path, "method: m\noptim: {name: sgd, base_lr: 3}\n")
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"base": base, "optim": {"base_lr": 4}}))
    cfg = config.load(str(child), [], params_of)
    assert (cfg.optim.name, cfg.optim.base_lr) == ("sgd", 4.0)


@settings(deadline=None)  # it writes a file
@given(
    seed=st.integers(0, 2**31),
    lr=st.floats(1e-8, 10),
    blocks=st.one_of(st.sampled_from(["odd", "none"]), st.lists(st.integers(0, 11), max_size=4)),
    names=st.one_of(st.none(), st.text("abc/:{}.", min_size=1)),
)
def test_saved_config_reads_back_equal(tmp_path_factory, seed, lr, blocks, names):
    cfg = config.RunConfig(seed=seed, params=Params())
    cfg.optim.base_lr, cfg.moe.blocks, cfg.data.cache_dir = lr, blocks, names
    path = tmp_path_factory.mktemp("cfg") / "config.yaml"
    config.save(cfg, path)
    assert config.from_tree(config.read_yaml(path), params_of) == cfg


def test_a_config_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "config.yaml"
    config.save(config.RunConfig(seed=1, params=Params()), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # every write beyond 100 bytes of a file fails, as on a full disk or at a kill in the middle
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError):
            config.save(config.RunConfig(seed=2, params=Params()), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert config.from_tree(config.read_yaml(path), params_of).seed == 1
