"""Heartbeats, and the survivors' line from them."""

import os
import re
import signal
import socket
import time

import pytest
import torch

from moe_cl.engine import heartbeat
from moe_cl.engine.heartbeat import Heartbeat, RankLost, survivors


def test_signs_outlive_the_writer_and_the_slowest_is_named(tmp_path):
    beats = [Heartbeat(tmp_path, rank) for rank in range(3)]
    for rank, beat in enumerate(beats):
        beat.step = 7
        beat("all_reduce")
        if rank != 1:
            beat("gradient reduction (backward)")
    signs = heartbeat.read(tmp_path, 4)
    assert [s.rank for s in signs] == [0, 1, 2]
    late = heartbeat.behind(signs)
    assert (late.rank, late.step, late.what) == (1, 7, "all_reduce")
    line = r"rank 1 stopped answering: its last sign was 'all_reduce' in step 7, \d+ s ago, on host "
    line += f"{socket.gethostname()}; rank 0"
    with pytest.raises(RankLost, match=line):
        with survivors(beats[0], 3):
            raise RuntimeError("[gloo] Timed out waiting 1000ms for recv operation to complete")


def test_a_rank_that_never_came_is_named_whatever_an_earlier_run_left(tmp_path):
    before = Heartbeat(tmp_path, 1)
    for _ in range(5):
        before("all_reduce")  # the earlier run's sign of rank 1
    mine, _other = Heartbeat(tmp_path, 0), Heartbeat(tmp_path, 2)
    with pytest.raises(RankLost, match="^rank 1, 3 of 4 did not come to the start; rank 0 waited on "):
        with survivors(mine, 4):
            raise RuntimeError("Timed out after 5 seconds waiting for clients. 2/4 clients joined.")


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), survivors(Heartbeat(tmp_path, 0), 2):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_beat_is_cheap(tmp_path):
    beat = Heartbeat(tmp_path, 0)
    begin = time.perf_counter()
    for _ in range(1000):
        beat("all_reduce")
    assert time.perf_counter() - begin < 0.5


def _work(comm, out, seconds):
    """Rank 1 stops for ever in step 3; the others meet the time-out of their process group."""
    from datetime import timedelta

    import torch.distributed as dist

    from moe_cl.comm import DistComm

    mine = DistComm(dist.new_group(list(range(comm.world)), timeout=timedelta(seconds=seconds)))
    beat = Heartbeat(out, comm.rank)
    beat.attach(mine)
    for step in range(5):
        beat.step = step
        if step == 3 and comm.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        begin = time.monotonic()
        try:
            with survivors(beat, comm.world):
                mine.all_reduce(torch.ones(1))
        except RankLost as error:
            return str(error), time.monotonic() - begin
    return "", 0.0


@pytest.mark.kills
def test_a_silent_rank_ends_the_others_within_the_time_out(tmp_path):
    from tests.pool import Pool

    ranks = Pool(2)
    try:
        ranks.run(2, _nothing)
        with pytest.raises(AssertionError, match="no answer"):
            ranks.run(2, _report, str(tmp_path), 4.0, str(tmp_path / "line"), timeout=15)
        text = (tmp_path / "line").read_text()
    finally:
        ranks.close()  # kill -9 also ends a stopped process
    assert re.search(r"rank 1 stopped answering: its last sign was 'all_reduce' in step 2", text)
    assert float(text.split()[-1]) < 8


def _nothing(comm):
    return comm.rank


def _report(comm, out, seconds, path):
    line, took = _work(comm, out, seconds)
    with open(path, "w") as file:
        file.write(f"{line} {took}")
