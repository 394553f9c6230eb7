"""Signals are noted, the out dir belongs to one run, the requeue mark comes and goes."""

import json
import multiprocessing
import os
import signal

import pytest

from moe_cl.config import ConfigError
from moe_cl.engine.checkpoint import store
from moe_cl.engine.checkpoint.format import MANIFEST
from moe_cl.engine.guard import Guard
from moe_cl.engine.preemption import OutLock, Preemption, clear_requeue, mark_requeue


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with Preemption() as signals:
        assert not signals.requested()
        os.kill(os.getpid(), number)
        assert signals.requested() and signals.name == signal.Signals(number).name
    assert signal.getsignal(number) is before


def _try(out, results):
    try:
        OutLock(out).close()
        results.put("")
    except ConfigError as error:
        results.put(str(error))


def second_run(out):
    """What another process is told on the same out dir."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    other = context.Process(target=_try, args=(str(out), results))
    other.start()
    answer = results.get(timeout=60)
    other.join()
    return answer


def test_the_second_run_on_one_out_dir_refuses(tmp_path):
    lock = OutLock(tmp_path)
    answer = second_run(tmp_path)
    assert f"in use by pid {os.getpid()}" in answer and "\n" not in answer
    lock.close()
    assert second_run(tmp_path) == ""


def test_an_out_dir_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        OutLock(tmp_path / "file" / "out")


def test_the_requeue_mark(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_CL_REQUEUE_FILE", str(tmp_path / "told"))  # launchers/slurm.sbatch knows no out dir
    path = mark_requeue(tmp_path, 12, "SIGTERM")
    assert (tmp_path / "told").read_text() == path.read_text()
    assert json.loads(path.read_text())["step"] == 12
    clear_requeue(tmp_path)
    clear_requeue(tmp_path)
    assert not path.exists()


def test_a_stop_that_its_starter_cannot_be_told_is_a_stop(tmp_path, monkeypatch, capsys):
    told = tmp_path / "of another machine" / "told"
    monkeypatch.setenv("MOE_CL_REQUEUE_FILE", str(told))
    assert mark_requeue(tmp_path, 12, "SIGTERM").exists()
    said = capsys.readouterr().err
    assert said == f"moe_cl: {told} cannot be written (No such file or directory): start the run again yourself\n"


def test_a_full_disk_at_the_start_is_one_line(tmp_path, no_room):
    with no_room(), pytest.raises(ConfigError, match="cannot be written") as error:
        OutLock(tmp_path)
    assert "\n" not in str(error.value)
    OutLock(tmp_path).close()


def checkpoint(out, step):
    """What is complete by its name and manifest; its path."""
    path = store.root(out) / store.directory_name(step)
    path.mkdir(parents=True)
    (path / MANIFEST).write_text("{}")
    return path


@pytest.mark.parametrize(("saved", "marked"), [(9, 9), (6, 6), (None, None)])
def test_a_stop_whose_save_failed_is_not_taken_for_the_end(tmp_path, capsys, saved, marked):
    """launchers/slurm.sbatch requeues on exit code 0 and a mark; 0 without a mark is a run that is done."""
    with Guard(tmp_path, 0, 1) as guard:
        code = guard.stopped(9, checkpoint(tmp_path, saved) if saved else None)
    line, mark = capsys.readouterr().err, tmp_path / "requeue"
    assert (code, mark.exists()) == ((0, True) if marked else (1, False))
    if marked:
        assert json.loads(mark.read_text())["step"] == marked
    assert line.count("\n") == (saved != 9) and ("step 6, not 9" in line if saved == 6 else True)
    assert saved or "nothing could be saved" in line and "--resume" in line


@pytest.mark.parametrize(("began", "saved", "marked"), [(6, 6, False), (4, 6, True), (6, 9, True)])
def test_a_start_that_saved_nothing_asks_for_no_other(tmp_path, capsys, began, saved, marked):
    """A disk that stays full must not send a job round and round through the queue."""
    last = checkpoint(tmp_path, saved)
    checkpoint(tmp_path, 9 if saved < 9 else 8)  # a damaged one of an earlier start, which kept its name: it is no save
    with Guard(tmp_path, 0, 1) as guard:
        code = guard.stopped(9, last, began=began)
    line = capsys.readouterr().err
    assert (code, (tmp_path / "requeue").exists()) == ((0, True) if marked else (1, False))
    if not marked:
        assert "nothing could be saved since its start at step 6" in line and line.count("\n") == 1
        assert "has the checkpoint of step 6; make room there, then start again with --resume" in line


def test_a_stop_that_cannot_be_marked_is_said_by_the_exit_code(tmp_path, capsys, no_room):
    with Guard(tmp_path, 0, 1) as guard:
        last = checkpoint(tmp_path, 6)
        with no_room():
            assert guard.stopped(9, last) == 1
    line = capsys.readouterr().err
    assert "no requeue mark could be left" in line and "the checkpoint of step 6" in line and line.count("\n") == 1


def test_a_run_whose_last_save_failed_is_not_done(tmp_path):
    with Guard(tmp_path, 0, 1) as guard:
        said = guard.unsaved(9, None)
        assert "not saved: " in said and "has no checkpoint" in said
        six, nine = checkpoint(tmp_path, 6), checkpoint(tmp_path, 9)  # the newest one that is there may be damaged
        said = guard.unsaved(9, six)
        assert "has the checkpoint of step 6" in said and "\n" not in said
        assert guard.unsaved(9, nine) == ""
