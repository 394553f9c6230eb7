"""Heartbeats, and the survivors' line from them."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from moe_cl.comm import LocalComm
from moe_cl.config import ConfigError
from moe_cl.engine import heartbeat
from moe_cl.engine.guard import Guard
from moe_cl.engine.heartbeat import Heartbeat, RankLost, Watch, survivors


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


def test_a_start_that_is_refused_leaves_a_healthy_runs_signs_alone(tmp_path):
    """Only rank 0 takes the out dir's lock: other ranks of a second start are here before they hear that it is held."""
    healthy = Heartbeat(tmp_path, 1)
    healthy("all_reduce")
    path = tmp_path / "heartbeats" / "rank-00001"
    mapped = path.stat()
    second = Heartbeat(tmp_path, 1)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (mapped.st_ino, mapped.st_mtime_ns)
    healthy("all_to_all")
    assert heartbeat.read(tmp_path, 2)[0].what == "all_to_all"
    second.close()
    assert [file.name for file in path.parent.iterdir()] == ["rank-00001"]
    third = Heartbeat(tmp_path, 1)
    third("all_reduce")  # of a run that went on while the first one hung, say: never the file that is mapped there
    healthy("all_reduce")
    assert path.stat().st_ino != mapped.st_ino and heartbeat.read(tmp_path, 2)[0].count == 2


def test_a_full_disk_at_the_start_is_one_line_and_later_a_warning(tmp_path, no_room, capsys):
    early = Heartbeat(tmp_path, 0)
    with no_room():
        with pytest.raises(ConfigError, match="cannot be written") as error:
            Heartbeat(tmp_path / "other", 0)
        early("all_reduce")
    assert "\n" not in str(error.value) and "goes on" in capsys.readouterr().err
    early("all_to_all")  # there is room again
    assert heartbeat.read(tmp_path, 1)[0].what == "all_to_all"
    assert [file.name for file in (tmp_path / "heartbeats").iterdir()] == ["start-00000"]


def test_a_file_that_is_cut_or_taken_away_ends_no_run(tmp_path):
    """As another host may do to a file of a shared directory."""
    beat, path = Heartbeat(tmp_path, 0), tmp_path / "heartbeats" / "rank-00000"
    beat("all_reduce")
    os.truncate(path, 0)
    beat("all_to_all")
    assert heartbeat.read(tmp_path, 1)[0].what == "all_to_all"
    path.unlink()
    beat("broadcast")
    beat.close()
    number = os.open(tmp_path / "other", os.O_CREAT | os.O_WRONLY)  # gets the number that was closed
    beat("late")
    beat.sync()
    os.close(number)
    assert (tmp_path / "other").read_bytes() == b""


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), survivors(Heartbeat(tmp_path, 0), 2):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_beat_is_cheap(tmp_path):
    beat = Heartbeat(tmp_path, 0)
    begin = time.perf_counter()
    for _ in range(1000):
        beat("all_reduce")
    assert time.perf_counter() - begin < 0.5


def _heard(capsys):
    """What comes on stderr first."""
    begin = time.monotonic()
    while not (text := capsys.readouterr().err):
        assert time.monotonic() - begin < 60
        time.sleep(0.05)
    return text


def test_the_line_comes_before_a_time_out_that_no_exception_tells_of(tmp_path, capsys):
    """Once for each silence, and only on a rank that waits: NCCL's watchdog ends the process at the time-out."""
    beats = [Heartbeat(tmp_path, rank) for rank in range(2)]
    with Watch(beats[0], 2, 2.0), Watch(beats[1], 2, 2.0):
        time.sleep(2.5)
        assert capsys.readouterr().err == ""  # before the ranks have met there is an exception
        for beat in beats:
            beat("all_reduce")
        beats[0]("all_to_all")
        text = _heard(capsys)
        assert text.startswith("moe_cl: rank 1 stopped answering: its last sign was 'all_reduce' in step 0, ")
        assert "rank 0 on " in text and "waited in 'all_to_all'" in text and text.count("\n") == 1
        time.sleep(2.5)
        assert capsys.readouterr().err == ""
        beats[0]("all_to_all")  # it went on after all, and is silent again
        assert _heard(capsys).count("rank 1 stopped answering") == 1


ABORTED = """
import faulthandler, sys, time
from moe_cl.engine.heartbeat import Heartbeat, Watch
mine, other = Heartbeat(sys.argv[1], 0), Heartbeat(sys.argv[1], 1)
mine("all_reduce"), mine("all_to_all"), other("all_reduce")
Watch(mine, 2, 6.0)
faulthandler.dump_traceback_later(6.0, exit=True)  # from a thread of C's, as NCCL's watchdog
time.sleep(60)
"""


def test_a_process_that_is_aborted_has_said_its_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", ABORTED, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "rank 1 stopped answering" in done.stderr and "Timeout" in done.stderr


@pytest.mark.parametrize(("backend", "watched"), [("cuda", True), ("cpu", False)])
def test_gloo_raises_and_needs_no_watch(tmp_path, backend, watched):
    with Guard(tmp_path, 0, 2) as guard:
        comm = LocalComm()
        comm.world, comm.device = 2, torch.device(backend)
        guard.watch(comm, None, torch.nn.Linear(1, 1), 60.0)
        assert any(thread.name == "heartbeats" for thread in threading.enumerate()) == watched
    assert not any(thread.name == "heartbeats" for thread in threading.enumerate())


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
