"""Runs that end in the middle, by an error, a killed worker, an interrupt; and going on after them."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.plan import Settings, make_plan
from data_prep.shard import write_shards
from data_prep.sources import Reader, SourceOptions, open_source
from moe_cl.config import ConfigError
from tests.data_prep.images import image_folder, tree


class Stops(Reader):
    """Reads as ``inner`` does, until one item; there it raises, or kills its own process."""

    def __init__(self, inner, name, kill=False):
        self._inner, self._name, self._kill = inner, name, kill

    def read(self, item):
        if item.name == self._name:
            if self._kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk went away")
        return self._inner.read(item)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("faults") / "images", classes=2, each=8)


def source_and_plan(pictures):
    source = open_source(str(pictures), SourceOptions())
    return source, make_plan(source.items, Settings("x", "train", max_count=3))


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The folder that an undisturbed run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    write_shards(*source_and_plan(pictures), out, 1)
    return tree(out)


@given(stops=st.lists(st.integers(0, 15), max_size=4))
@settings(max_examples=25, deadline=None)
def test_after_any_errors_the_same_shards(pictures, whole, tmp_path_factory, stops):
    out = tmp_path_factory.mktemp("out") / "out"
    source, plan = source_and_plan(pictures)
    reader, done = source.reader, {}
    for stop in stops:
        source.reader = Stops(reader, plan.item(stop).name)
        complete = (out / plan.file(stop // 3)).exists()
        if complete:
            write_shards(source, plan, out, 1)
        else:
            with pytest.raises(OSError, match="the disk went away"):
                write_shards(source, plan, out, 1)
            assert not list(out.glob("*.part")) and not (out / "dataset.json").exists()
        for path in out.glob("*.tar"):
            assert done.setdefault(path.name, path.stat().st_ino) == path.stat().st_ino
        if (out / "dataset.json").exists():
            break
    source.reader = reader
    write_shards(source, plan, out, 1)
    assert tree(out) == whole


@pytest.mark.processes
def test_a_killed_worker_is_one_clear_line(pictures, whole, tmp_path):
    source, plan = source_and_plan(pictures)
    reader, source.reader = source.reader, Stops(source.reader, plan.item(7).name, kill=True)
    with pytest.raises(ConfigError, match="worker process was killed"):
        write_shards(source, plan, tmp_path / "out", 2)
    source.reader = reader
    write_shards(source, plan, tmp_path / "out", 2)
    assert tree(tmp_path / "out") == whole


@pytest.mark.kills
def test_an_interrupt_is_no_traceback(tmp_path):
    source = image_folder(tmp_path / "images", classes=4, each=600)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_prep", "shard", str(source), "--out", str(out), "--max-count", "20",
               "--resize-shorter", "16", "--workers", "2"]  # fmt: skip
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background passes on SIG_IGN
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + 60
    while not list(out.glob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.002)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130 and "the same command continues" in error and "Traceback" not in error
    assert not list(out.glob("*.part"))
    assert 0 < len(list(Path(out).glob("*.tar"))) < 120
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert len(list(out.glob("*.tar"))) == 120
