"""Checkpoints that are damaged, foreign, of another model, or cannot be written: never half loaded, never unpickled."""

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import time
import types

import pytest
import torch
from torch import nn

from moe_cl.comm import LocalComm
from moe_cl.config import CheckpointConfig, ConfigError, OptimConfig
from moe_cl.engine import optim
from moe_cl.engine.checkpoint import Checkpointer, foreign, latest_complete, store
from moe_cl.engine.checkpoint import saver as saver_module
from moe_cl.engine.checkpoint.format import MANIFEST, Damaged, FileEntry, Reader, read_manifest


class Model(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.backbone, self.heads = nn.Linear(3, width), nn.ModuleDict({"view": nn.Linear(width, 2)})

    def forward(self, x):
        return self.heads["view"](self.backbone(x))


def run(out, width=4, seed=0, **cfg):
    """A model with an optimizer that has stepped once, and its checkpointer; no DeepSpeed."""
    torch.manual_seed(seed)
    model, settings = Model(width), OptimConfig()
    adamw = optim.build(optim.param_groups(model, settings), settings, 0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    adamw.step()
    engine = types.SimpleNamespace(optimizer=adamw, global_steps=1, gradient_accumulation_steps=lambda: 1)
    return model, Checkpointer(out, CheckpointConfig(**cfg), LocalComm(), engine, model, patience=5)


@pytest.fixture
def saved(tmp_path):
    """A run with checkpoints of steps 1 and 2; the model was moved in between."""
    model, saver = run(tmp_path)
    saver.save(1, {"cursor": 8}, wait=True)
    with torch.no_grad():
        model.backbone.weight.add_(1)
    saver.save(2, {"cursor": 16}, wait=True)
    return tmp_path, model


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def damage(kind, path):
    shard = path / "student-00000.safetensors"
    if kind == "flipped byte":
        flip(shard)
    elif kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif kind == "missing shard":
        shard.unlink()
    elif kind == "garbled manifest":
        (path / MANIFEST).write_text("{")
    elif kind == "flipped extra":
        flip(path / "extra.json", 10)


@pytest.mark.parametrize("kind", ["flipped byte", "truncated", "missing shard", "garbled manifest", "flipped extra"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(saved, capsys, kind):
    out, _ = saved
    damage(kind, out / "checkpoints" / "step-00000002")
    model, saver = run(out, seed=1)
    assert saver.load() == {"cursor": 8}
    line = capsys.readouterr().err
    assert "step-00000002" in line and "trying the one before" in line and line.count("\n") == 1
    assert "stays as damaged-step-00000002" in line and (out / "checkpoints" / "damaged-step-00000002").is_dir()
    assert (out / "checkpoints" / "latest").read_text().strip() == "step-00000001"
    with pytest.raises(ConfigError, match="no checkpoint can be read: step-00000002"):
        saver.load(out / "checkpoints" / "step-00000002")
    damage(kind, out / "checkpoints" / "step-00000001")
    with pytest.raises(ConfigError, match="no checkpoint can be read"):
        saver.load()


def test_a_full_disk_keeps_no_damaged_one_in_its_place(saved, capsys, monkeypatch):
    """A rename needs no room, the pointer does; the run knows which checkpoint is good."""
    out, _ = saved
    damage("flipped byte", out / "checkpoints" / "step-00000002")
    monkeypatch.setattr(os, "replace", full)  # how the pointer gets its name
    model, saver = run(out, seed=1)
    assert saver.last is None and saver.load() == {"cursor": 8}
    assert "stays as damaged-step-00000002" in capsys.readouterr().err
    assert [saver.last] == store.complete(out) == [out / "checkpoints" / "step-00000001"]
    saver.save(2, {"cursor": 16}, wait=True)
    assert store.step_of(saver.last) == 2 and "no checkpoint" not in capsys.readouterr().err


def test_another_format_version_is_one_line(saved):
    out, _ = saved
    path = out / "checkpoints" / "step-00000002"
    tree = json.loads((path / MANIFEST).read_text())
    for version in (0, 99):
        (path / MANIFEST).write_text(json.dumps({**tree, "version": version}))
        with pytest.raises(ConfigError, match=f"version {version} cannot be read") as error:
            run(out)[1].load()
        assert "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["MOE_CL_BOMB"],)


def test_a_malicious_pickle_is_never_run(saved, tmp_path, monkeypatch):
    out, _ = saved
    bomb = tmp_path / "exploded"
    monkeypatch.setenv("MOE_CL_BOMB", str(bomb))
    payload = pickle.dumps(Bomb())
    for name in ("model.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(payload)
        with pytest.raises(ConfigError):
            foreign.read_file(tmp_path / name)
    torch.save({"model": {"w": torch.ones(1)}, "x": Bomb()}, tmp_path / "zip.pth")
    with pytest.raises(ConfigError, match=r"more than tensors and plain values \(posix.mkdir\)$"):
        foreign.read_file(tmp_path / "zip.pth")
    # In the place of a shard, its hash made to fit: the safetensors reader refuses it.
    path = out / "checkpoints" / "step-00000002"
    shard = path / "student-00000.safetensors"
    shard.write_bytes(payload)
    manifest = read_manifest(path)
    manifest.files[shard.name] = FileEntry(len(payload), hashlib.sha256(payload).hexdigest())
    (path / MANIFEST).write_text(manifest.dump())
    with pytest.raises(Damaged, match="student-00000"):
        Reader(path).tree("student")
    assert not bomb.exists()


@pytest.mark.parametrize("kind", ["yaml", "text", "module", "script"])
def test_torchs_advice_to_run_a_files_code_is_never_passed_on(tmp_path, kind):
    path = tmp_path / "config.yaml"
    if kind == "module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "script":
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    else:
        path.write_text("method: moco\nseed: 3\n" if kind == "yaml" else "hello")
    says = {"module": "more than tensors and plain values", "script": "no readable torch file .TorchScript"}
    with pytest.raises(ConfigError, match=says.get(kind, "no readable torch file .it is neither")) as error:
        foreign.read_file(path)
    assert "weights_only" not in str(error.value) and len(str(error.value)) < len(str(path)) + 120


def test_another_model_is_named(saved):
    out, _ = saved
    with pytest.raises(ConfigError, match=r"backbone.* has shape \(4"):
        run(out, width=5)[1].load()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_full_disk_the_run_goes_on_and_the_last_good_one_stays(saved, capsys, asynchronous):
    out, _ = saved
    model, saver = run(out, asynchronous=asynchronous)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # every write beyond 100 bytes of a file fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        saver.save(3, {})
        saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (event,) = saver.drain_events()
    assert event["name"] == "checkpoint_failed" and event["step"] == 3
    line = capsys.readouterr().err
    assert "no checkpoint at step 3" in line and "step-00000002" in line and line.count("\n") == 1
    assert latest_complete(out).name == "step-00000002" and not list((out / "checkpoints").glob(".staging*"))
    saver.save(4, {"cursor": 1}, wait=True)  # room again
    assert latest_complete(out).name == "step-00000004"


def test_read_only_out_dir_the_run_goes_on(saved, capsys):
    out, _ = saved
    model, saver = run(out)
    folder = out / "checkpoints"
    hidden = out / "hidden"
    folder.rename(hidden)
    folder.write_text("no directory can be made here, whoever runs this")
    saver.save(3, {}, wait=True)
    assert saver.drain_events()[0]["name"] == "checkpoint_failed"
    assert "no checkpoint at step 3" in capsys.readouterr().err
    folder.unlink()
    hidden.rename(folder)
    assert saver.load() == {"cursor": 16}


def test_half_written_directories_do_not_count_and_are_removed(saved):
    out, _ = saved
    stage = store.staging(out, "dead", 3)
    shutil.copytree(out / "checkpoints" / "step-00000002", stage)
    assert latest_complete(out).name == "step-00000002"
    run(out)
    assert not stage.exists()


def test_a_silent_rank_gives_the_checkpoint_up(saved, capsys):
    out, _ = saved
    model, saver = run(out)
    saver.patience = 0.1
    saver.comm = types.SimpleNamespace(rank=0, world=2)
    saver.save(3, {}, wait=True)
    assert "rank 1 wrote nothing" in capsys.readouterr().err
    assert latest_complete(out).name == "step-00000002"


def test_a_damaged_checkpoint_takes_no_good_ones_place(saved):
    """After falling back from a damaged step 2 to 1, a save before step 2 must not be the one that is deleted."""
    out, _ = saved
    damage("flipped byte", out / "checkpoints" / "step-00000002")
    model, saver = run(out, keep_last=1)
    assert saver.load() == {"cursor": 8}
    saver.save(1, {"cursor": 9}, wait=True)
    assert [p.name for p in store.complete(out)] == ["step-00000001"]
    assert run(out)[1].load() == {"cursor": 9}


def test_what_was_just_committed_is_never_deleted(saved):
    out, _ = saved
    for step in (3, 4):
        shutil.copytree(out / "checkpoints" / "step-00000002", out / "checkpoints" / store.directory_name(step))
    shutil.rmtree(out / "checkpoints" / "step-00000002")
    model, saver = run(out, keep_last=1)  # nobody verified 3 and 4, and they are newer
    saver.save(2, {"cursor": 17}, wait=True)
    assert [store.step_of(p) for p in store.complete(out)] == [4, 2]


def test_if_all_are_damaged_they_stay_where_they_are(saved):
    out, _ = saved
    for step in (1, 2):
        damage("truncated", out / "checkpoints" / store.directory_name(step))
    with pytest.raises(ConfigError, match="no checkpoint can be read: step-00000002"):
        run(out)[1].load()
    assert [store.step_of(p) for p in store.complete(out)] == [2, 1]


def checkpointers(out, world):
    """The savers of ``world`` ranks of one run, in this process."""
    savers = [run(out)[1] for _ in range(world)]
    for rank, saver in enumerate(savers):
        saver.comm, saver.patience, saver._token = types.SimpleNamespace(rank=rank, world=world), 30, "same"
    return savers


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_without_room_for_a_word_is_known_at_once(saved, capsys, monkeypatch, who):
    """Not even its report can be written: the others must neither wait for it nor lose the directory under them."""
    out, _ = saved
    savers = checkpointers(out, 2)
    begin = time.monotonic()
    with monkeypatch.context() as patch:
        for name in ("write_bytes", "write_shard"):
            real = getattr(saver_module, name)
            patch.setattr(
                saver_module, name, lambda path, x, real=real: (full if f"-{who:05d}." in path.name else real)(path, x)
            )
        for saver in reversed(savers):
            saver.save(3, {})
        for saver in savers:
            saver.wait()
    assert time.monotonic() - begin < 10
    assert "no checkpoint at step 3" in capsys.readouterr().err
    assert [e["name"] for e in savers[who].drain_events()] == ["checkpoint_failed"]
    assert latest_complete(out).name == "step-00000002"
    savers[1].save(4, {})
    savers[0].save(4, {"cursor": 1}, wait=True)  # room again
    savers[1].wait()
    assert latest_complete(out).name == "step-00000004" and not list((out / "checkpoints").glob(".staging*"))


def test_a_removed_stage_ends_the_wait_and_a_late_ranks_goes_at_the_next_save(saved, capsys):
    out, _ = saved
    savers = checkpointers(out, 2)
    savers[0].save(3, {})
    stage = store.staging(out, "same", 3)
    while not (stage / "rank-00000.json").exists():
        time.sleep(0.01)
    begin = time.monotonic()
    stage.rename(out / "gone")
    savers[0].wait()
    assert time.monotonic() - begin < 10 and "was removed" in capsys.readouterr().err
    savers[1].save(3, {}, wait=True)  # it comes late, and makes the directory again
    assert stage.is_dir()
    savers[1].save(4, {})
    savers[0].save(4, {}, wait=True)
    savers[1].wait()
    assert latest_complete(out).name == "step-00000004" and not stage.exists()


def test_retention(tmp_path):
    model, saver = run(tmp_path, keep_last=2, keep_every=4, keep_best="knn")
    for step, knn in enumerate([0.1, 0.9, 0.3, 0.2, 0.1, 0.5, 0.4, 0.1], 1):
        saver.save(step, {"metrics": {"knn": knn}}, wait=True)
    kept = sorted(store.step_of(p) for p in store.complete(tmp_path))
    assert kept == [2, 4, 7, 8]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step-00000008"
    assert store.best_of(store.complete(tmp_path), "-knn").name == "step-00000008"


def test_the_same_step_again_replaces(saved):
    out, model = saved
    other, saver = run(out, seed=5)
    saver.save(2, {"cursor": 99}, wait=True)
    assert run(out)[1].load() == {"cursor": 99}


def test_torch_and_numpy_generators_come_back(tmp_path):
    import random

    import numpy as np

    model, saver = run(tmp_path)
    saver.save(1, {}, wait=True)
    want = torch.rand(3), np.random.rand(3), random.random()
    saver.load()
    got = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(want[0], got[0]) and (want[1] == got[1]).all() and want[2] == got[2]
