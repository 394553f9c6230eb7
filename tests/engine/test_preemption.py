"""Signals are noted, the out dir belongs to one run, the requeue mark comes and goes."""

import json
import multiprocessing
import os
import signal

import pytest

from moe_cl.config import ConfigError
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


def test_the_requeue_mark(tmp_path):
    path = mark_requeue(tmp_path, 12, "SIGTERM")
    assert json.loads(path.read_text())["step"] == 12
    clear_requeue(tmp_path)
    clear_requeue(tmp_path)
    assert not path.exists()
