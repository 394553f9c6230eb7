"""Settings that follow the number of ranks: the same groups may be said otherwise, others not."""

import pytest

from moe_cl import config
from moe_cl.config import ConfigError, RunConfig
from moe_cl.engine import checks
from moe_cl.engine.checkpoint import store
from moe_cl.engine.checkpoint.format import MANIFEST, Manifest


def make(out, bn_groups, statistics, **batch):
    cfg = RunConfig(out=str(out), resume=True)
    cfg.params, cfg.engine.statistics = {"bn_groups": bn_groups}, statistics
    for key, value in batch.items():
        setattr(cfg.batch, key, value)
    return cfg


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        ((8, 1, "global", {}), (1, 8, "global", {}), None),
        ((8, 1, "global", {}), (2, 4, "global", {"accumulation": 2}), None),
        ((8, 1, "global", {}), (4, 1, "global", {}), None),  # the number of ranks is free
        (
            (1, 8, "global", {}),
            (1, 1, "global", {}),
            "bn_groups=8 on 1 ranks, params.bn_groups=1 on 1 are other",
        ),
        ((8, 1, "global", {}), (2, 2, "global", {}), "ranks x params.bn_groups stays 8 when"),
        ((8, 1, "published", {}), (1, 1, "group: 32", {}), None),
        ((8, 1, "published", {"accumulation": 2}), (2, 1, "group: 16", {"micro_batch": 64}), None),
        ((2, 1, "group:32", {}), (8, 1, "published", {}), None),
        (
            (8, 1, "published", {}),
            (1, 1, "group: 64", {}),
            "'published' (micro-batch 32), 'group: 64' (",
        ),
        ((8, 1, "published", {}), (8, 1, "global", {}), "keep 'group: 32'"),
    ],
)
def test_a_run_keeps_its_groups(tmp_path, before, now, says):
    path = store.root(tmp_path) / store.directory_name(3)
    path.mkdir(parents=True)
    (path / MANIFEST).write_text(Manifest(3, before[0]).dump())
    config.save(make(tmp_path, *before[1:3], **before[3]), path / "config.yaml")
    cfg, world = make(tmp_path, *now[1:3], **now[3]), now[0]

    def start():
        batch = checks.batch_identity(cfg, world)
        checks.regroup.check(cfg, world, batch.micro_batch)
        checks.check_same_run(cfg, 700)

    if says is None:
        start()
    else:
        with pytest.raises(ConfigError) as error:
            start()
        assert says in str(error.value) and "\n" not in str(error.value)
    (path / MANIFEST).write_text("{}")  # the number of ranks is not known: nothing may change
    if now[1:3] != before[1:3] and before[2] != "group:32":
        with pytest.raises(ConfigError, match="run with other settings"):
            start()
