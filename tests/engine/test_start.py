"""Runs that start from other runs, and what others wrote."""

import argparse
import contextlib
import copy
import json
import os
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moe_cl import methods
from moe_cl.comm import LocalComm
from moe_cl.config import CheckpointConfig, ConfigError, ModelConfig, MoEConfig, OptimConfig, RunConfig
from moe_cl.engine import optim, setup
from moe_cl.engine.checkpoint import Checkpointer, cli, foreign, latest_complete, source, start
from moe_cl.models.build import build_backbone
from tests.engine.test_checks import make
from tests.engine.tiny import Memory

VIT = {"dim": 16, "depth": 2, "heads": 2, "img_size": 16, "patch_size": 8}


class Net(nn.Module):
    def __init__(self, heads, experts=True):
        super().__init__()
        torch.manual_seed(len(heads))
        moe = MoEConfig(blocks="odd", experts=4, hidden_ratio=1.0) if experts else None
        self.backbone = build_backbone("vit", moe=moe, **VIT)
        self.heads = nn.ModuleDict({name: nn.Linear(16, 3) for name in heads})


def run(out, heads, init=None, steps=0, experts=True):
    """Student, teacher and checkpointer with an optimizer of the project, after ``steps`` steps."""
    net, teacher = Net(heads, experts), Net(heads, experts).requires_grad_(False)
    cfg = OptimConfig(base_lr=0.1)
    fresh = start.fresh_names(init, [n for n, _ in net.named_parameters()])
    adamw = optim.build(optim.param_groups(net, cfg, fresh=fresh), cfg, 0.1)
    engine = types.SimpleNamespace(optimizer=adamw, global_steps=steps, gradient_accumulation_steps=lambda: 1)
    saver = Checkpointer(out, CheckpointConfig(), LocalComm(), engine, net, teacher)
    for _ in range(steps):
        step(net, adamw)
    return net, teacher, adamw, saver


def step(net, adamw):
    features = net.backbone([torch.randn(4, 3, 16, 16)]).features
    sum(head(features).square().mean() for head in net.heads.values()).backward()
    adamw.step()
    adamw.zero_grad()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of one head with three steps behind it."""
    out = tmp_path_factory.mktemp("first")
    net, teacher, adamw, saver = run(out, ["view"], steps=3)
    saver.save(3, {"step": 3, "loader": {"used": 24}}, wait=True)
    return out, net, adamw


def test_a_new_head_starts_fresh_and_all_else_goes_on(first, tmp_path):
    out, old, old_adamw = first
    net, teacher, adamw, saver = run(tmp_path, ["view", "region"], init=out)
    report = saver.init_from(out)
    assert report.extra == {"step": 3, "loader": {"used": 24}}
    assert report.fresh == ["heads.region.weight", "heads.region.bias"] and not report.unused
    assert "continues at its step" in str(report)
    told = json.loads(report.write(tmp_path, str(out)).read_text())
    assert told["teacher"]["fresh"] == report.fresh and sorted(told["optimizer"]["fresh"]) == sorted(report.fresh)
    assert len(told["optimizer"]["loaded"]) == sum(p.requires_grad for p in old.parameters()) and told["continues"]
    theirs = dict(old.named_parameters())
    for name, p in net.named_parameters():
        if name in theirs:
            assert torch.equal(p, theirs[name])
            if p.requires_grad:
                assert torch.equal(adamw.state[p]["exp_avg_sq"], old_adamw.state[theirs[name]]["exp_avg_sq"])
    assert torch.equal(teacher.heads["region"].weight, net.heads["region"].weight)
    step(net, adamw)
    counts = {n: float(adamw.state[p]["step"]) for n, p in net.named_parameters() if p.requires_grad}
    assert all(count == (1 if "region" in name else 4) for name, count in counts.items())
    saver.save(4, {"step": 4}, wait=True)  # and it is a run like any other
    assert run(tmp_path, ["view", "region"], init=out)[3].load() == {"step": 4}
    # Its own checkpoint says which parameters count their own steps: the source may be gone.
    cfg = RunConfig(out=str(tmp_path), resume=True, model=ModelConfig(init_from=str(tmp_path / "gone")))
    names = [name for name, _ in net.named_parameters()]
    assert not source.needed(cfg) and source.fresh_names(cfg, names) == report.fresh


def test_a_queue_of_another_shape_starts_fresh_and_is_named(tmp_path):
    _, _, _, saver = run(tmp_path / "first", ["view"], steps=1)
    saver.method = Memory()
    saver.method.pointer += 3
    saver.save(1, {"step": 1}, wait=True)
    _, _, _, saver = run(tmp_path / "second", ["view"], init=tmp_path / "first")
    saver.method = Memory()
    saver.method.register_buffer("queue", torch.zeros(8, 3))
    saver.method.register_buffer("center", torch.zeros(2))
    report = saver.init_from(tmp_path / "first")
    assert report.others["method"].fresh == ["queue ((4, 3) there, (8, 3) here)", "center"]
    assert int(saver.method.pointer) == 3 and "method: 1 tensors loaded, fresh: queue ((4, 3) there" in str(report)


def test_another_backbone_is_refused(first, tmp_path):
    with pytest.raises(ConfigError, match="backbone tensors differ"):
        run(tmp_path, ["view"], experts=False)[3].init_from(first[0])
    with pytest.raises(ConfigError, match="no such file"):
        run(tmp_path, ["view"])[3].init_from(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        run(tmp_path, ["view"])[3].init_from(tmp_path / "empty")


def call(*argv):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.main(parser.parse_args([str(a) for a in argv]))


def test_the_command(first, tmp_path, capsys):
    out, net, _ = first
    assert call("ls", out) == 0 and "step-00000003" in capsys.readouterr().out
    assert call("verify", out) == 0 and "ok" in capsys.readouterr().out
    assert call("convert", out, tmp_path / "w.safetensors", "--what", "teacher") == 0
    state = load_file(tmp_path / "w.safetensors")
    assert state["backbone.blocks.1.mlp.experts.w1"].shape == (4, 16, 16)
    other, _, _, saver = run(tmp_path / "other", ["view"], steps=3)
    with torch.no_grad():
        other.backbone.cls_token.add_(1)
    saver.save(3, {"step": 3, "loader": {"used": 24}}, wait=True)
    assert call("diff", out, out) == 0 and "all equal" in capsys.readouterr().out
    assert call("diff", out, tmp_path / "other") == 1
    assert "student/backbone.cls_token: largest difference" in capsys.readouterr().out
    assert call("diff", out, tmp_path / "other", "--tolerance", "1e9") == 0
    shard = latest_complete(tmp_path / "other") / "teacher-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    assert call("verify", tmp_path / "other") == 1 and "damaged: step-00000003" in capsys.readouterr().out
    for bad in (("ls", tmp_path), ("verify", tmp_path), ("convert", tmp_path, tmp_path / "x.safetensors")):
        with pytest.raises(ConfigError):
            call(*bad)


def test_a_file_of_weights_starts_at_step_0(first, tmp_path):
    out, old, _ = first
    call("convert", out, tmp_path / "w.safetensors")
    net, teacher, _, saver = run(tmp_path, ["other"])
    report = saver.init_from(tmp_path / "w.safetensors")
    assert report.extra is None and report.unused == ["heads.view.bias", "heads.view.weight"]
    assert torch.equal(net.backbone.cls_token, old.backbone.cls_token)
    assert torch.equal(teacher.backbone.cls_token, old.backbone.cls_token)


def test_a_dense_file_is_upcycled(tmp_path):
    dense = Net(["view"], experts=False)
    save_file({n: v.contiguous() for n, v in dense.backbone.state_dict().items()}, tmp_path / "dense.safetensors")
    net, teacher, _, saver = run(tmp_path, ["view"])
    report = saver.init_from(tmp_path / "dense.safetensors")
    assert report.upcycled
    w1 = dense.backbone.blocks[1].mlp.fc1.weight
    assert torch.equal(net.backbone.blocks[1].mlp.experts.w1[0], w1[:16])
    assert torch.equal(teacher.backbone.blocks[1].mlp.experts.w1, net.backbone.blocks[1].mlp.experts.w1)


def test_a_dense_run_is_upcycled(tmp_path):
    """Straight from its directory: the student's weights, at step 0, the optimizer without a past."""
    dense, _, _, saver = run(tmp_path / "dense", ["view"], steps=2, experts=False)
    saver.save(2, {"step": 2}, wait=True)
    net, teacher, adamw, saver = run(tmp_path / "sparse", ["view"], init=tmp_path / "dense")
    router = net.backbone.blocks[1].mlp.router.weight.clone()
    start.check(tmp_path / "dense")
    report = saver.init_from(tmp_path / "dense")
    assert report.upcycled and report.extra is None and not adamw.state
    assert "(experts from the dense blocks), fresh: backbone.blocks.1.mlp.router.weight, unused: none" in str(report)
    theirs = dict(dense.state_dict())
    for name, value in net.state_dict().items():
        if ".mlp." not in name or "blocks.0." in name:
            assert torch.equal(value, theirs[name]), name
    fc1, experts = dense.backbone.blocks[1].mlp.fc1, net.backbone.blocks[1].mlp.experts
    assert torch.equal(experts.w1.flatten(0, 1), fc1.weight) and torch.equal(experts.b1.flatten(), fc1.bias)
    assert torch.equal(net.backbone.blocks[1].mlp.router.weight, router)
    assert torch.equal(teacher.backbone.blocks[1].mlp.experts.w1, experts.w1)
    step(net, adamw)
    saver.save(1, {"step": 1}, wait=True)
    assert run(tmp_path / "sparse", ["view"], init=tmp_path / "dense")[3].load() == {"step": 1}


@pytest.mark.parametrize("blocks", ["all", [0], "none"])
def test_experts_in_other_blocks_are_refused_before_the_start(first, tmp_path, blocks):
    """Some blocks dense, some not: neither upcycling nor the same network. From a run and from its file."""
    out, _, _ = first
    call("convert", out, tmp_path / "w.safetensors")
    cfg = make(model__backbone="vit", model__options=VIT, views__size=16, moe__blocks=blocks, batch__global_batch=8)
    cfg.moe.experts, cfg.moe.hidden_ratio = 4, 1.0
    cfg.params = methods.params_of(cfg.method)()
    for path in (out, tmp_path / "w.safetensors"):
        cfg.model.init_from, cfg.out = str(path), str(tmp_path / "new")
        with pytest.raises(ConfigError, match=r"has experts in the blocks \[1\], this run in .*set moe.blocks=\[1\]"):
            setup.check_model(cfg, 8, 1)
        same = copy.deepcopy(cfg)
        same.moe.blocks = [1]
        setup.check_model(same, 8, 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"moe__experts": 2}, r"router.weight has shape \(16, 4\), this model \(16, 2\)"),
        ({"moe__hidden_ratio": 2.0}, r"experts.w1 has shape \(4, 16, 16\), this model \(4, 32, 16\)"),
        ({"moe__gate": "shazeer"}, "lacks student backbone.blocks.1.mlp.router.noise_weight"),
        ({"model__options": VIT | {"depth": 3}}, "backbone tensors differ"),
        ({"optim__name": "sgd"}, "has exp_avg, exp_avg_sq of another optimizer: keep optim.name"),
        ({"moe__blocks": "none"}, "has experts in the blocks"),
    ],
)
def test_another_network_is_refused_before_the_start(first, tmp_path, changes, says):
    """By the manifest alone: to start from the run, and to go on with it."""
    same = {"model__backbone": "vit", "model__options": VIT, "views__size": 16, "batch__global_batch": 8}
    same |= {"moe__blocks": "odd", "moe__experts": 4, "moe__hidden_ratio": 1.0}
    cfg, other = make(**same), make(**(same | changes))
    for one in (cfg, other):
        one.params = methods.params_of(one.method)()
        one.model.init_from, one.out = str(first[0]), str(tmp_path / "new")
    setup.check_model(cfg, 8, 1)
    with pytest.raises(ConfigError, match=says) as error:
        setup.check_model(other, 8, 1)
    assert "\n" not in str(error.value)
    modules = []
    for one in (cfg, other):
        one.model.init_from, one.out, one.resume = None, str(first[0]), True
        modules.append({"student": nn.ModuleDict({"backbone": setup.check_model(one, 8, 1)["student"].backbone})})
        modules[-1]["student"]["heads"] = nn.ModuleDict({"view": nn.Linear(16, 3)})
    source.check_own(cfg, modules[0])
    with pytest.raises(ConfigError, match=r"step-00000003.*(resume with the recipe that wrote it|keep optim.name)"):
        source.check_own(other, modules[1])
    other.resume = False
    source.check_own(other, modules[1])


# -- what others wrote -------------------------------------------------------------------------------------------------
MODEL, FILE = "mp_rank_00_model_states.pt", "layer_0_expert_%d_mp_rank_00_model_states.pt"
GATE, EXPERT = "m.deepspeed_moe.gate.wg.weight", "m.deepspeed_moe.experts.deepspeed_experts.%d.fc%d.weight"


def expert(number, hidden=4):
    return {EXPERT % (number, 1): torch.ones(hidden, 3), EXPERT % (number, 2): torch.ones(3, hidden)}


FOREIGN = {
    "a list": ([1, 2], None),
    "int keys": ({0: torch.ones(1)}, None),
    "a tensor": (torch.ones(2), {}),
    "a module of numbers": ({"module": {GATE: 3}}, {}),
    "a module of int names": ({"module": {1: torch.ones(1)}}, {}),
    "a gate of one dimension": ({"module": {GATE: torch.ones(2)}}, {0: expert(0), 1: expert(1)}),
    "an expert as a list": ({"module": {"a": torch.ones(1)}}, {0: [1]}),
    "experts of unequal shapes": ({"module": {GATE: torch.ones(2, 3)}}, {0: expert(0), 1: expert(1, 5)}),
    "half of an expert": ({"module": {GATE: torch.ones(2, 3)}}, {0: expert(0), 1: {EXPERT % (1, 1): torch.ones(4, 3)}}),
    "no expert 0, no gate": ({"module": {"m.a": torch.ones(2)}}, {1: expert(1)}),
    "more experts than the gate": ({"module": {GATE: torch.ones(1, 3)}}, {0: expert(0), 1: expert(1)}),
    "no experts of a gate": ({"module": {GATE: torch.ones(2, 3)}}, {0: expert(0)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_that_is_no_network_is_one_line(tmp_path, kind):
    model, experts = FOREIGN[kind]
    folder = tmp_path / "ds"
    folder.mkdir()
    torch.save(model, folder / MODEL if experts is not None else tmp_path / "file.pt")
    for number, state in (experts or {}).items():
        torch.save(state, folder / (FILE % number))
    with pytest.raises(ConfigError) as error:
        start.read_weights(folder if experts is not None else tmp_path / "file.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("latest", [b"\xff\xfe", b"a\0b", b"..", b"/etc", b""])
def test_a_latest_that_names_no_folder_is_one_line(tmp_path, latest):
    (tmp_path / "latest").write_bytes(latest)
    with pytest.raises(ConfigError, match="no complete checkpoint there"):
        start.read_weights(tmp_path)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.fc2(torch.nn.functional.gelu(self.fc1(x)))


class Native(nn.Module):
    def __init__(self, ep):
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.embed = nn.Linear(6, 6)
        self.mlp = MoE(6, Expert(), num_experts=4, ep_size=ep, k=2)

    def forward(self, x):
        return self.mlp(self.embed(x))[0]


def native(comm, folder, ep):
    """A checkpoint by DeepSpeed's own save_checkpoint; returns this rank's experts and the gate."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    from moe_cl.engine.ranks import leave_out_shm_op

    leave_out_shm_op()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(0)
    model = Native(ep)
    for i, p in enumerate(model.parameters()):
        with torch.no_grad():  # DeepSpeed copies one expert; here each is its own
            torch.manual_seed(100 * i + (comm.rank if not getattr(p, "allreduce", True) else 0))
            p.normal_()
    groups = split({"params": list(model.parameters()), "name": "all"})
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(groups, lr=0.1), config=config)
        engine.save_checkpoint(folder, tag="last")
    own = [e.fc1.weight.detach().numpy() for e in model.mlp.deepspeed_moe.experts.deepspeed_experts]
    return own, model.mlp.deepspeed_moe.gate.wg.weight.detach().numpy()


@pytest.mark.processes
@pytest.mark.parametrize("ep", [1, 2])
def test_deepspeeds_native_moe_comes_in(pool, tmp_path, ep):
    ranks = pool.run(2, native, str(tmp_path), ep)
    state = foreign.read_deepspeed(tmp_path)
    want = [w for own, _ in (ranks if ep == 2 else ranks[:1]) for w in own]
    assert len(want) == 4
    for mine, theirs in zip(state["mlp.experts.w1"], want, strict=True):
        assert torch.equal(mine, torch.from_numpy(theirs))
    assert torch.equal(state["mlp.router.weight"], torch.from_numpy(ranks[0][1]).t())
    assert state["mlp.experts.b2"].shape == (4, 6) and "embed.weight" in state
    assert call("convert", tmp_path, tmp_path / "ds.safetensors") == 0
    assert load_file(tmp_path / "ds.safetensors")["backbone.mlp.experts.w2"].shape == (4, 6, 10)
    next(tmp_path.glob("last/layer_0_expert_1_*")).unlink()
    with pytest.raises(ConfigError, match="expert 1 of the 4 of mlp is missing"):
        foreign.read_deepspeed(tmp_path)
