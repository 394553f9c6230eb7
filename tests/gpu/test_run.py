"""The real command on a GPU: views finished there or not, experts, saved and resumed; and batches that are pinned."""

import pytest
import torch

from moe_cl.config import DataConfig, ViewsConfig
from moe_cl.data.loader import Loader
from moe_cl.tracking.journal import read
from moe_cl.views.spec import build_spec
from tests.small import launch, make_shards, settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("change", [
    ["views.implementation=device", "data.log_sample_ids=true"],
    ["engine.precision=bf16", "data.workers=1"],
    ["engine.precision=fp16"],
    ["batch.micro_batch=8", "batch.exact_large_batch=true"],
    ["method=mocov3", "params={dim: 8, mlp_dim: 16}", "moe.blocks=none", "model.backbone=resnet18", "model.options={}",
     "views.size=32"],
    ["method=moco", "params={dim: 8, queue: 64}", "moe.blocks=none", "batch.accumulation=2"],
    ["method=esvit", "params={out_dim: 64, hidden: 16, bottleneck: 8}", "moe.blocks=none", "views.spec=esvit",
     "views.local_size=8", "views.local_number=2"],
])  # fmt: skip
def test_a_run_trains_and_goes_on(shards, tmp_path, change):
    for more in (["schedule.max_steps=2"], ["schedule.max_steps=4", "--resume"]):
        done = launch(0, *settings(shards, tmp_path / "run", "moe.ep_size=1", *change, *more), DS_ACCELERATOR="cuda")
        assert done.returncode == 0, done.stderr[-3000:]
    steps = [line for line in read(tmp_path / "run" / "journal.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]


def test_batches_are_pinned(shards):
    spec = build_spec(ViewsConfig(size=16))
    loader = Loader(
        DataConfig(train=str(shards), streams=4, workers=1), spec, seed=0, global_batch=16, micro_batch=16, pin=True
    )
    try:
        assert all(view.is_pinned() for batch in next(loader) for view in batch.views)
    finally:
        loader.close()
