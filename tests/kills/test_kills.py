"""kill -9 of a rank and of all ranks at random moments, saves included: the resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from moe_cl.engine.checkpoint import latest_complete, store
from moe_cl.engine.checkpoint.format import Reader
from moe_cl.tracking.journal import read
from tests.pool import free_port
from tests.small import ENV, ROOT, make_shards, settings

pytestmark = pytest.mark.kills
WORLD, STEPS = 2, 40
OPTIONS = ("moe.ep_size=2", "schedule.epochs=8", f"schedule.max_steps={STEPS}", "checkpoint.every_steps=3",
           "engine.collective_timeout=20", "track.uri=none", "data.workers=0")  # fmt: skip


def start(shards, out, *more):
    """Both ranks by environment (a launcher adds seconds), each the leader of its own process group."""
    port, procs = str(free_port()), []
    for rank in range(WORLD):
        who = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
        env = {**ENV, **who, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "moe_cl", "pretrain", *settings(shards, out, *OPTIONS, *more, "--resume")]
        log = open(f"{out}-rank{rank}.log", "ab")
        procs.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True))
    return procs


def end(procs, number=signal.SIGKILL):
    for proc in procs:
        if proc.poll() is None:
            os.killpg(proc.pid, number)
    for proc in procs:
        proc.wait(timeout=60)


def wait(procs, seconds=400):
    """Exit codes once all ranks have ended (the limit is for a busy machine; a hang is longer)."""
    deadline = time.monotonic() + seconds
    while any(p.poll() is None for p in procs):
        if time.monotonic() > deadline:
            end(procs)
            raise AssertionError("a rank does not end")
        time.sleep(0.05)
    return [p.returncode for p in procs]


def steps(out):
    path = out / "journal.jsonl"
    lines = [line for line in read(path) if line["kind"] == "step"] if path.exists() else []
    return {line["step"]: (line["values"]["loss"], line["samples"]) for line in lines}


def tail(out):
    return "".join(f"{out}-rank{r}.log\n" + open(f"{out}-rank{r}.log").read()[-1500:] for r in range(WORLD))


def tensors(path):
    reader = Reader(path)
    return {n: reader.tensor(n).numpy().tobytes() for n in reader.manifest.tensors}


def dead_in_the_middle(out):
    """True while a save is on its way."""
    return any((out / "checkpoints").glob(".staging-*")) if (out / "checkpoints").is_dir() else False


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    procs = start(shards, out)
    assert wait(procs) == [0, 0], tail(out)
    return out


def test_killed_at_random_moments_it_is_the_same_run(request, shards, whole, tmp_path):
    kills, out, done = request.config.getoption("--kills"), tmp_path / "run", []
    dice = random.Random(kills)
    for _ in range(kills):
        goal, save, whom = dice.randrange(1, STEPS), dice.random() < 0.5, dice.choice([[0], [1], [0, 1]])
        procs = start(shards, out)
        before = max(steps(out), default=0)
        deadline = time.monotonic() + 120
        while all(p.poll() is None for p in procs) and time.monotonic() < deadline:
            now = max(steps(out), default=0)
            if now > before and (dead_in_the_middle(out) if save else now >= min(before + goal % 9 + 1, STEPS)):
                break
            time.sleep(0.002)
        end([procs[r] for r in whom])
        done.append((whom, "save" if save else "step", max(steps(out), default=0)))
        codes = wait(procs)  # the survivors end by themselves
        assert len(whom) == WORLD or all(code != 0 or max(steps(out)) == STEPS for code in codes), tail(out)
        latest = latest_complete(out)
        if latest is not None:
            assert json.loads((latest / "manifest.json").read_text())["step"] == store.step_of(latest)
    assert wait(start(shards, out)) == [0, 0], tail(out)
    print(f"kills: {done}")
    assert steps(out) == steps(whole), done  # losses bit-equal, no sample lost or repeated
    last, want = tensors(latest_complete(out)), tensors(latest_complete(whole))  # every rank's generators among them
    assert last.keys() == want.keys() and [n for n in want if last[n] != want[n]] == []


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_on_one_rank_saves_once_and_marks(shards, whole, tmp_path, rank):
    out = tmp_path / "run"
    procs = start(shards, out)
    deadline = time.monotonic() + 120
    while max(steps(out), default=0) < 4:
        assert time.monotonic() < deadline and all(p.poll() is None for p in procs), tail(out)
        time.sleep(0.01)
    procs[rank].send_signal(signal.SIGTERM)
    assert wait(procs) == [0, 0], tail(out)
    mark, last = json.loads((out / "requeue").read_text()), latest_complete(out)
    assert mark["step"] == store.step_of(last) == max(steps(out)) < STEPS
    assert wait(start(shards, out)) == [0, 0], tail(out)
    assert not (out / "requeue").exists()
    assert steps(out) == steps(whole)


def test_signals_to_every_process_save_once_and_mark(shards, whole, tmp_path):
    """As Slurm and DeepSpeed's launcher send them: to the ranks, their loading processes and the tracker's child."""
    out, more = tmp_path / "run", ("data.workers=2", "track.uri=null")
    procs = start(shards, out, *more)
    deadline = time.monotonic() + 120
    while max(steps(out), default=0) < 4:
        assert time.monotonic() < deadline and all(p.poll() is None for p in procs), tail(out)
        time.sleep(0.01)
    family = [child.pid for proc in procs for child in psutil.Process(proc.pid).children(recursive=True)]
    assert len(family) == 2 * 2 + 1
    for number in (signal.SIGUSR1, signal.SIGTERM):
        for pid in (*family, *(proc.pid for proc in procs)):
            os.kill(pid, number)
    assert wait(procs) == [0, 0], tail(out)
    mark, last = json.loads((out / "requeue").read_text()), latest_complete(out)
    assert mark["step"] == store.step_of(last) == max(steps(out)) < STEPS and mark["reason"] in ("SIGUSR1", "SIGTERM")
    assert wait(start(shards, out, *more)) == [0, 0], tail(out)
    assert steps(out) == steps(whole)


def test_a_rank_that_stops_answering_ends_the_others(shards, tmp_path):
    out = tmp_path / "run"
    procs = start(shards, out)
    deadline = time.monotonic() + 120
    while max(steps(out), default=0) < 3:
        assert time.monotonic() < deadline and all(p.poll() is None for p in procs), tail(out)
        time.sleep(0.01)
    os.kill(procs[1].pid, signal.SIGSTOP)
    begin = time.monotonic()
    try:
        procs[0].wait(timeout=60)
    finally:
        took = time.monotonic() - begin
        end(procs)
    text = open(f"{out}-rank0.log").read()
    assert procs[0].returncode != 0 and took < 45, text[-2000:]
    assert "rank 1 stopped answering: its last sign was" in text, text[-3000:]
