"""The loader on real shards: same batches for any workers and ranks, exact resume, several sources, its settings."""

import itertools
import logging
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.config import ConfigError, DataConfig, ViewsConfig
from moe_cl.data.loader import Loader
from moe_cl.views.spec import build_spec
from tests.data.shards import make_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four workers on two cores
SPEC = build_spec(ViewsConfig(spec="mocov3", size=16))


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), [30, 7, 41, 22])


def loader(pattern, batch=8, micro=4, rank=0, world=1, seed=3, **cfg):
    cfg = {"streams": 4, "window": 8, "workers": 0} | cfg
    return Loader(
        DataConfig(train=pattern, **cfg), SPEC, seed=seed, global_batch=batch, micro_batch=micro, rank=rank, world=world
    )


def take(source, steps):
    out = []
    for batches in itertools.islice(source, steps):
        source.used()
        out.append(batches)
    return out


def ids(steps):
    return [np.concatenate([b.sample_ids for b in step]).tolist() for step in steps]


def same(a, b):
    for x, y in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
        assert torch.equal(x.sample_ids, y.sample_ids) and torch.equal(x.positions, y.positions)
        assert torch.equal(x.labels, y.labels) and torch.equal(x.boxes, y.boxes)
        assert all(torch.equal(v, w) for v, w in zip(x.views, y.views, strict=True))


def test_shapes_labels_and_positions(pattern):
    source = loader(pattern)
    (step,) = take(source, 1)
    assert len(step) == source.accumulation == 2
    for batch in step:
        assert [tuple(v.shape) for v in batch.views] == [(8, 3, 16, 16)] and batch.views[0].dtype == torch.float32
        assert batch.boxes.shape == (2, 4, 5) and batch.keys is None
        assert torch.equal(batch.labels, batch.sample_ids % 10)
    assert torch.cat([b.positions for b in step]).tolist() == list(range(8))
    assert source.steps_per_epoch == 12 and source.wait_seconds > 0


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(pattern, workers):
    plain, other = loader(pattern), loader(pattern, workers=workers)
    same(take(plain, 26), take(other, 26))  # over two epoch boundaries
    assert other.epoch == 2 and plain.state_dict() == other.state_dict()
    other.close()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_same_steps(pattern, world):
    whole = take(loader(pattern), 14)
    ranks = [take(loader(pattern, micro=8 // world, rank=r, world=world), 14) for r in range(world)]
    for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        views = {}
        for batch in step:
            for v, p, i in zip(batch.views[0][:4], batch.positions.tolist(), batch.sample_ids.tolist(), strict=True):
                views[p] = (v, i)
        for batch in itertools.chain(*parts):
            n = len(batch.positions)
            for v, p, i in zip(batch.views[0][:n], batch.positions.tolist(), batch.sample_ids.tolist(), strict=True):
                assert views[p][1] == i and torch.equal(views.pop(p)[0], v)
        assert not views


def test_three_ranks_of_a_batch_of_six(pattern):
    whole = ids(take(loader(pattern, batch=6, micro=6), 20))
    ranks = [ids(take(loader(pattern, batch=6, micro=2, rank=r, world=3), 20)) for r in range(3)]
    for n, step in enumerate(whole):
        assert sorted(step) == sorted(itertools.chain(*(r[n] for r in ranks)))


@pytest.fixture(scope="module")
def whole_run(pattern):
    return take(loader(pattern), 34)


@settings(deadline=None, max_examples=12)
@given(before=st.integers(0, 30), ahead=st.integers(0, 2), world=st.sampled_from([1, 2, 4]))
def test_resume_continues_with_none_lost_and_none_repeated(pattern, whole_run, before, ahead, world):
    first = loader(pattern)
    first.load_state_dict(first.state_dict() | dict(zip(("epoch", "cursor"), divmod(before * 8, 96), strict=True)))
    expected = whole_run[before : before + 3]
    for _ in range(ahead):  # handed out but not used: a kill here must not lose them
        next(first)
    take(first, 1)
    state = first.state_dict()
    assert all(isinstance(v, (int, str)) for v in state.values())
    found = []
    for rank in range(world):
        again = loader(
            pattern, micro=min(4, 8 // world), rank=rank, world=world, seed=99
        )  # the seed is the checkpoint's
        again.load_state_dict(state)
        found.append(take(again, 2))
    for n, step in enumerate(ids(expected[1:])):
        assert sorted(step) == sorted(itertools.chain(*(ids(f)[n] for f in found)))
    if world == 1:
        same(found[0], expected[1:])


def test_resume_with_workers_counts_used_samples_only(pattern):
    source = loader(pattern, workers=2, prefetch=8)
    take(source, 3)
    state = source.state_dict()
    source.close()
    assert state["cursor"] == 24
    again = loader(pattern, workers=1)
    again.load_state_dict(state)
    same(take(again, 3), take(loader(pattern), 6)[3:])
    again.close()


def test_another_batch_size_in_the_middle_of_an_epoch(pattern):
    source = loader(pattern)
    used = ids(take(source, 5))
    again = loader(pattern, batch=20, micro=5)
    again.load_state_dict(source.state_dict())
    more = ids(take(again, 3))
    assert again.epoch == 0
    seen = list(itertools.chain(*used, *more))
    assert len(seen) == len(set(seen)) == 100


def test_every_sample_at_most_once_and_the_rest_is_said(pattern):
    source = loader(pattern)
    (event,) = source.drain_events()
    assert event["name"] == "data_order" and event["dropped"] == 100 - 96 and event["steps_per_epoch"] == 12
    seen = list(itertools.chain(*ids(take(source, 12))))
    assert len(set(seen)) == 96 and source.state_dict()["epoch"] == 1
    assert source.drain_events() == []


def test_several_sources_with_repeat(tmp_path):
    first, second = make_shards(tmp_path / "a", [10, 6]), make_shards(tmp_path / "b", [8])
    source = loader(f"{first}::{second}", batch=8, micro=8, repeat=[1, 3])
    times = np.bincount(list(itertools.chain(*ids(take(source, source.steps_per_epoch)))), minlength=24)
    assert source.steps_per_epoch == 5 and times[:16].max() == 1 and times[16:].sum() == 40 - times[:16].sum()
    assert times[16:].max() == 3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batch": 9}, "not a multiple"),
        ({"streams": 0}, "data.streams"),
        ({"streams": 101}, "data.streams 101 is more than the 100 samples"),
        ({"workers": -1}, "data.workers"),
        ({"repeat": [1, 2]}, "2 numbers for 1 sources"),
        ({"repeat": [0]}, "at least 1"),
        ({"decoder": "nvjpg"}, "data.decoder"),
        ({"max_bad_fraction": 3.0}, "max_bad_fraction"),
    ],
)
def test_settings_that_cannot_work(pattern, change, text):
    with pytest.raises(ConfigError, match=text) as error:
        loader(pattern, **change)
    assert "\n" not in str(error.value)


def test_missing_data(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        loader(str(tmp_path / "nothing"))


def test_changed_data_is_refused_inside_an_epoch(pattern, tmp_path, caplog):
    source = loader(pattern)
    take(source, 2)
    other = loader(make_shards(tmp_path, [50, 50]))
    with pytest.raises(ConfigError, match="data set .* changed"):
        other.load_state_dict(source.state_dict())
    with pytest.raises(ConfigError, match=r"data\.window changed"):
        loader(pattern, window=9).load_state_dict(source.state_dict())
    take(source, 10)
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(source.state_dict())  # at the end of an epoch new data may come
    assert "next epoch" in caplog.text and other.state_dict()["epoch"] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch says it from a destructor too
def test_a_killed_worker_is_named(pattern):
    source = loader(pattern, workers=1)
    next(source)
    for worker in source._made._workers:
        worker.kill()
    with pytest.raises(RuntimeError, match="loading process died"):
        for _ in range(30):
            next(source)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_from_elsewhere_do_not_end_the_workers(pattern, number):
    """A scheduler signals every process of a run; the rank must be able to finish its step and save."""
    source, alone = loader(pattern, workers=2), loader(pattern)
    begin = take(source, 2)  # one from each: both have begun
    workers = source._made._workers
    for process in workers:
        subprocess.run(["kill", f"-{int(number)}", str(process.pid)], check=True)
    time.sleep(0.2)
    same(begin + take(source, 19), take(alone, 21))  # over the epoch's end too: nothing is missing
    assert all(process.is_alive() for process in workers)
    source.close()
    for process in workers:
        process.join(20)
    assert [process.exitcode for process in workers] == [0, 0]


def _stuck(index):
    time.sleep(600)


def test_a_rank_can_end_a_worker_that_does_not_listen(pattern, monkeypatch):
    monkeypatch.setattr("moe_cl.data.samples.BatchMaker.__getitem__", lambda self, item: _stuck(item))
    source = loader(pattern, workers=1)
    (process,) = source._made._workers
    time.sleep(0.5)
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)  # as torch does, and multiprocessing at the interpreter's end
    process.join(20)
    assert process.exitcode == 0 and time.monotonic() - begin < 10
