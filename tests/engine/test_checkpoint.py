"""Checkpoints between layouts: what is saved at one world, ep and ZeRO stage continues at another."""

import hashlib

import pytest
import torch

from moe_cl.config import CheckpointConfig
from moe_cl.engine.checkpoint.format import Reader
from moe_cl.engine.checkpoint.saver import Checkpointer
from moe_cl.engine.checkpoint.store import latest_complete
from tests.engine import tiny

pytestmark = pytest.mark.processes


def checkpointer(run, out):
    return Checkpointer(out, CheckpointConfig(keep_last=9), run.comm, run.engine, run.net, run.teacher, run.method)


def go(comm, out, stage, ep, load, first, last, at):
    """Steps [first, last) after loading ``load``; saves at ``at``. Returns losses and norms."""
    run = tiny.build(comm, stage, ep)
    saver = checkpointer(run, out)
    extra = saver.load(load) if load else None
    assert extra is None or extra["cursor"] == first * tiny.BATCH
    history = []
    for s in range(first, last):
        history.append(run.step(s))
        if s + 1 == at:
            saver.save(at, {"cursor": at * tiny.BATCH})
    saver.close()
    assert [e["name"] for e in saver.drain_events()] == (["checkpoint"] if at and comm.rank == 0 else [])
    return history, run.engine.global_steps, int(run.method.pointer), int(run.net.seen)


def digests(path):
    reader = Reader(path)
    kinds = ("student/", "teacher/", "optimizer/", "method/")
    names = [n for n in reader.manifest.tensors if n.startswith(kinds)]
    return {n: hashlib.sha256(reader.tensor(n).numpy().tobytes()).hexdigest() for n in names}


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """Five uninterrupted steps at (world 2, ep 2, ZeRO 1) with a save after two."""
    out = tmp_path_factory.mktemp("run")
    results = pool.run(2, go, str(out), 1, 2, None, 0, 5, 2)
    return latest_complete(out), results[0][0]


@pytest.mark.parametrize(
    ("world", "stage", "ep"), [(2, 1, 2), (2, 2, 1), (1, 0, 1), (1, 2, 1), (2, 0, 2), (4, 1, 4), (4, 2, 2)]
)
def test_continues_anywhere(pool, saved, tmp_path, world, stage, ep):
    path, straight = saved
    for history, steps, pointer, seen in pool.run(world, go, str(tmp_path), stage, ep, str(path), 2, 5, None):
        assert (steps, pointer, seen) == (5, 5, 5)
        if (world, stage, ep) == (2, 1, 2):
            assert history == straight[2:]  # same layout: bit-equal
        for (loss, norm), (want, want_norm) in zip(history, straight[2:], strict=True):
            assert loss == pytest.approx(want, rel=1e-6)
            assert norm == pytest.approx(want_norm, rel=2e-5)


def resave(comm, out, stage, ep, load):
    run = tiny.build(comm, stage, ep)
    saver = checkpointer(run, out)
    extra = saver.load(load)
    saver.save(2, extra)
    saver.close()


def test_a_round_trip_gives_back_every_byte(pool, saved, tmp_path):
    first = path = saved[0]
    for world, stage, ep in ((1, 0, 1), (2, 2, 2), (4, 1, 4), (1, 1, 1)):
        out = tmp_path / f"{world}-{stage}-{ep}"
        pool.run(world, resave, str(out), stage, ep, str(path))
        path = latest_complete(out)
        assert digests(path) == digests(first)
    shard = torch.tensor(Reader(path).tensor("student/moe.experts.w1").shape)
    assert shard.tolist() == [4, tiny.WIDTH, tiny.WIDTH]


def test_stage_three_moves_too(pool, tmp_path):
    """A dense run saved at (world 2, ZeRO 3) continues at other worlds and stages, and the other way round."""
    results = pool.run(2, go, str(tmp_path / "a"), 3, 0, None, 0, 5, 2)
    path, straight = latest_complete(tmp_path / "a"), results[0][0]
    for world, stage in ((2, 3), (1, 0), (2, 2), (4, 3)):
        for history, *_ in pool.run(world, go, str(tmp_path / "b"), stage, 0, str(path), 2, 5, None):
            if (world, stage) == (2, 3):
                assert history == straight[2:]
            for (loss, norm), (want, want_norm) in zip(history, straight[2:], strict=True):
                assert loss == pytest.approx(want, rel=1e-6)
                assert norm == pytest.approx(want_norm, rel=2e-5)
    first = path
    for world, stage in ((1, 1), (2, 3), (4, 3), (1, 0)):
        out = tmp_path / f"{world}-{stage}"
        pool.run(world, resave, str(out), stage, 0, str(path))
        path = latest_complete(out)
        assert digests(path) == digests(first)
