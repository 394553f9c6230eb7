"""Every recipe resolves, says what it is, and takes one step with its sizes cut down; sweeps resolve too."""

from __future__ import annotations

import re
import shlex

import pytest
import torch

from moe_cl import config, methods
from moe_cl.comm import LocalComm
from moe_cl.engine import checks, optim, schedules
from moe_cl.engine.setup import build_method
from moe_cl.losses import groups
from moe_cl.recipes.cli import commands, sweep_names
from moe_cl.views.spec import Batch, build_spec
from tests.guide import DOCS
from tests.plain import Run

CUT = {  # sizes alone; what a recipe decides stays
    "moco": ["params.dim=8", "params.queue=64"],
    "jcl": ["params.dim=8", "params.queue=64"],
    "simclr": ["params.dim=8"],
    "mocov3": ["params.dim=8", "params.mlp_dim=16"],
    "crmoe": ["params.dim=8", "params.mlp_dim=16"],
    "esvit": ["params.out_dim=32", "params.hidden=16", "params.bottleneck=8"],
}
VIT = ["dim=16", "depth=2", "heads=2", "patch_size=8", "img_size=32"]
SWIN = ["dim=8", "depths=[1, 1, 1, 1]", "heads=[1, 1, 2, 2]"]


def cut(name: str) -> config.RunConfig:
    """A recipe at toy size."""
    cfg = config.load(name, [], methods.params_of)
    sizes = CUT[cfg.method] + [
        "batch.global_batch=4",
        "views.size=64" if "swin" in cfg.model.backbone else "views.size=32",
    ]
    kind = cfg.model.backbone
    if "vit" in kind or "deit" in kind or "vmoe" in kind:
        sizes += [f"model.options.{o}" for o in VIT]
    elif "swin" in kind:
        sizes += [f"model.options.{o}" for o in SWIN] + ["views.local_size=32"]
    elif kind == "resnet50":
        sizes += ["model.backbone=resnet18"]
    if getattr(cfg.params, "bn_groups", 1) > 1:
        sizes += ["params.bn_groups=2"]
    if cfg.method == "esvit" and "swin" not in kind:
        sizes += ["views.local_size=16"]
    if cfg.method == "esvit":
        sizes += ["views.local_number=2"]
    if cfg.moe.blocks != "none" or "vmoe" in kind:
        sizes += ["moe.experts=4", "moe.ep_size=1"]
    if cfg.engine.statistics.startswith("group"):
        sizes += ["engine.statistics='group: 2'"]
    return config.load(name, sizes, methods.params_of)


HEALTH = {  # beside spread and effective rank of the features
    "moco": {"positive", "negative", "queue_age"},
    "jcl": {"positive", "negative", "queue_age", "key_spread"},
    "simclr": {"positive", "negative"},
    "mocov3": {"positive", "negative"},
    "crmoe": {"positive", "negative"},
    "esvit": {"teacher_entropy", "kl", "centre_norm"},
}


def one_step(cfg: config.RunConfig) -> tuple[torch.Tensor, dict, dict]:
    torch.manual_seed(0)
    spec, samples = build_spec(cfg.views), cfg.batch.global_batch
    views = [torch.randn(count * samples, 3, size, size) for size, count in spec.resolutions]
    ids = torch.arange(samples)
    boxes = torch.tensor([0.1, 0.2, 0.6, 0.5, 0.0]).expand(spec.views, samples, 5).clone()
    method, student, teacher = build_method(cfg, LocalComm(), None)
    run = Run(method, student, teacher)
    peak = schedules.scaled_lr(cfg.optim, samples)
    optimizer = optim.build(optim.param_groups(student, cfg.optim), cfg.optim, peak)
    run.optimize(optimizer)
    loss = run.step(Batch(views, boxes, ids, ids, ids), cfg.teacher.momentum)
    return loss, run.grads, run.metrics


@pytest.mark.parametrize("name", config.recipe_names())
def test_one_step(name):
    cfg = cut(name)
    loss, grads, metrics = one_step(cfg)
    assert torch.isfinite(loss) and grads and all(torch.isfinite(g).all() for g in grads.values())
    wanted = {"feature_std", "effective_rank", *HEALTH[cfg.method]}
    wanted |= {"match_rate"} if getattr(cfg.params, "consistency", "") in ("overlap", "similarity") else set()
    wanted |= {"match_unique"} if getattr(cfg.params, "regions", False) else set()
    assert {f"health/{name}" for name in wanted} <= metrics.keys()


@pytest.mark.parametrize("name", config.recipe_names())
def test_says_what_it_is(name):
    """The head of the file: what, the command, hardware, expected figures."""
    head = [line for line in config.recipe_path(name).read_text().split("\n") if line.startswith("#")]
    text = "\n".join(head)
    assert len(head) >= 2 and f"--recipe {name}" in text or "quickstart" in text
    if "micro_fmnist" not in name:
        assert "Hardware" in text and "Expected" in text


def test_every_recipe_and_sweep_has_its_place_in_the_guide():
    text = (DOCS / "methods.md").read_text()
    for braces in re.findall(r"`(\w+)\{([\w,]+)\}(\w*)`", text):
        text += "".join(f" `{braces[0]}{middle}{braces[2]}`" for middle in braces[1].split(","))
    missing = [name for name in [*config.recipe_names(), *sweep_names()] if f"`{name}`" not in text]
    assert not missing


def ranks_of(command: str, head: str) -> int:
    """How many ranks a command starts; a launcher of one machine starts 8 at most."""
    words = shlex.split(command)
    if words[:2] == ["bash", "launchers/multinode.sh"]:
        hosts, slots = map(int, re.search(r"HOSTFILE: (\d+) hosts, slots=(\d+)", head).groups())
        return hosts * slots
    if words[:2] == ["bash", "launchers/local.sh"]:
        return int(words[2])
    if words[0] == "deepspeed":
        assert words[1] == "--num_gpus" and words[3:6] == ["--module", "moe_cl", "pretrain"] and int(words[2]) <= 8
        return int(words[2])
    assert words[:4] == ["python", "-m", "moe_cl", "pretrain"]
    return 1


def check_command(command: str, head: str) -> str:
    """A command's settings fit the ranks it starts; returns its recipe."""
    words = shlex.split(command)
    name, settings = words[words.index("--recipe") + 1], [w for w in words if re.match(r"[\w.]+=", w)]
    cfg = config.load(name, settings, methods.params_of)
    checks.check(cfg, ranks_of(command, head))
    build_spec(cfg.views)
    assert "--data" in words and words[words.index("--out") + 1].startswith("runs/")
    return name


@pytest.mark.parametrize("name", config.recipe_names())
def test_the_head_has_commands_that_start_it(name):
    head = [line.lstrip("# ") for line in config.recipe_path(name).read_text().split("\n") if line.startswith("#")]
    found = [line for line in head if "--recipe" in line]
    quick = [line for line in head if line.startswith("bash launchers/quickstart.sh")]
    recipes = [check_command(line, "\n".join(head)) for line in found]
    assert quick or name in recipes
    if "cifar10" in name or "fmnist" in name:
        assert quick or any(line.startswith(("python ", "bash launchers/local.sh ")) for line in found), "on a CPU"


@pytest.mark.parametrize("name", sweep_names())
def test_a_sweeps_commands_start_their_runs(name):
    outs = set()
    for row, command, _ in commands(name, ["data.train=/data/my images", "seed=3"]):
        words = shlex.split(command)
        head = config.recipe_path(words[words.index("--recipe") + 1]).read_text()
        check_command(command, head)
        assert words[words.index("--data") + 1] == "/data/my images" and words[-1] == "seed=3"
        assert words[0] != "python", "its recipe asks for several devices"
        outs.add(words[words.index("--out") + 1])
        assert f"runs/{name}-{row}" in outs
    assert len(outs) == len(commands(name))


def test_statistics_are_those_of_the_papers_ranks():
    """Images a group = global batch / GPUs of the paper."""
    ranks_of = {"crmoe_vmoe_small_100ep": 16, "naive_vmoe_small_100ep": 16, "crmoe_vmoe_small_300ep": 32}
    for name, ranks in ranks_of.items():
        cfg = config.load(name, [], methods.params_of)
        assert groups.check(cfg.engine.statistics, cfg.batch.global_batch) == cfg.batch.global_batch // ranks


def test_effective_learning_rates():
    """The papers' own numbers at their batch."""
    for name, want in {"mocov3_r50_100ep": 9.6, "mocov3_vit_small_300ep": 2.4e-3, "crmoe_vmoe_small_100ep": 2e-3,
                       "crmoe_vmoe_small_300ep": 6e-3, "esvit_swin_tiny_w7": 1e-3, "jcl_paper_r50_200ep": 0.06,
                       "mocov2_r50_200ep": 0.03}.items():  # fmt: skip
        cfg = config.load(name, [], methods.params_of)
        assert schedules.scaled_lr(cfg.optim, cfg.batch.global_batch) == pytest.approx(want)
