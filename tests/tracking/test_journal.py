"""The journal: what is written is read, through rotations, torn lines, a full disk and resumes."""

import errno
import json
import math
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.tracking import journal as module
from moe_cl.tracking.journal import Journal, NullJournal, read
from moe_cl.tracking.tail import Tail, parts


def steps(lines):
    return [line["step"] for line in lines if line["kind"] == "step"]


def test_lines_come_back_as_written(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.step(1, {"loss": 2.5, "moe/L1/load": [0.25, 0.75]}, "abc", cursor=64)
    journal.step(2, {"loss": torch.tensor(float("nan")), "load": torch.ones(2), "x": np.float32(0.5)}, "abd")
    journal.event("bad image", step=2, key="a/b")
    journal.evaluation("knn", 2, {"top1": 0.5})
    journal.close("FINISHED")
    head, one, two, event, evaluation, end = read(tmp_path / "journal.jsonl")
    assert head["id"] == journal.id
    assert one["values"] == {"loss": 2.5, "moe/L1/load": [0.25, 0.75]} and one["cursor"] == 64
    assert math.isnan(two["values"]["loss"]) and two["values"]["load"] == [1.0, 1.0] and two["values"]["x"] == 0.5
    assert event["name"] == "bad image" and event["key"] == "a/b"
    assert evaluation["values"] == {"top1": 0.5} and end["status"] == "FINISHED"
    for raw in (tmp_path / "journal.jsonl").read_text().splitlines():
        json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_resume_cuts_later_steps_and_torn_lines(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, max_bytes=2000)
    for step in range(1, 101):
        journal.step(step, {"loss": float(step)}, "d")
        if step % 10 == 0:
            journal.evaluation("knn", step, {"top1": step / 100})
    journal.close("KILLED")
    with open(path, "ab") as file:
        file.write(b'{"kind":"step","step":101,"val')
    again = Journal(path, resume_step=42, max_bytes=2000)
    assert again.id == journal.id
    again.step(43, {"loss": 0.0}, "d")
    again.close()
    lines = read(path)
    assert steps(lines) == list(range(1, 44))
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [10, 20, 30, 40]
    (resume,) = [line for line in lines if line["kind"] == "event"]
    assert (resume["name"], resume["step"], resume["repeats_to"]) == ("resume", 42, 100)
    assert not [line for line in lines if line["kind"] == "end"]


def test_a_new_run_in_the_same_place_keeps_the_old_journal_aside(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = Journal(path)
    first.step(1, {"loss": 1.0})
    first.close()
    second = Journal(path)
    second.close()
    assert second.id != first.id and steps(read(path)) == []
    assert steps(read(tmp_path / "previous-journal.jsonl")) == [1]


def test_bounded_size_keeps_all_events_and_thins_steps(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, max_bytes=3000, keep=4)
    for step in range(1, 1001):
        journal.step(step, {"loss": 1.0}, "d")
        if step % 100 == 0:
            journal.event("save", step=step)
            if journal._compaction:
                journal._compaction.join()
    journal.close()
    lines = read(path)
    assert len(parts(path)) <= 6
    assert sum(part.stat().st_size for part in parts(path)) < 6 * 3200
    got = steps(lines)
    assert got == sorted(set(got)) and got[-50:] == list(range(951, 1001)) and got[0] < 10
    assert [line["step"] for line in lines if line["kind"] == "event"] == list(range(100, 1001, 100))


def test_a_crash_in_the_middle_of_compaction_loses_and_repeats_nothing(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, max_bytes=1000, keep=100)
    for step in range(1, 60):
        journal.step(step, {"loss": 1.0}, "d")
    journal.close()
    before = len(parts(path))

    def crash(self):
        raise OSError(errno.EIO, "crash")

    monkeypatch.setattr(module.Path, "unlink", crash)
    module._compact(path, before - 2)
    got = steps(read(path))
    assert got == sorted(set(got)) and got[-1] == 59 and len(parts(path)) == before - 1


def test_a_full_disk_neither_raises_nor_loses(tmp_path, monkeypatch, capsys):
    journal = Journal(tmp_path / "journal.jsonl")
    write = os.write

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "write", full)
    for step in range(1, 6):
        journal.step(step, {"loss": 1.0})
    monkeypatch.setattr(module.os, "write", lambda file, data: write(file, bytes(data[:7])))
    journal.step(6, {"loss": 1.0})
    journal.close()
    assert steps(read(tmp_path / "journal.jsonl")) == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().err.count("No space left") == 1


def test_a_journal_that_cannot_open_its_next_file_goes_on_in_the_full_one(tmp_path, monkeypatch, capsys):
    """And never writes into whatever was given the number of its old file since."""
    path, foreign = tmp_path / "journal.jsonl", tmp_path / "foreign"
    journal = Journal(path, max_bytes=500)
    real, opened = os.open, []

    def none_left(name, *more, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    for step in range(1, 41):
        if step == 5:
            monkeypatch.setattr(module.os, "open", none_left)
        if step == 15:
            monkeypatch.setattr(module.os, "open", real)
        journal.step(step, {"loss": 1.0}, "d")
        opened.append(real(foreign, os.O_RDWR | os.O_CREAT))
    journal.close()
    for number in opened:
        os.close(number)
    assert foreign.read_bytes() == b"" and steps(read(path)) == list(range(1, 41))
    assert len(parts(path)) > 2 and capsys.readouterr().err.count("Too many open files") == 1


@pytest.mark.parametrize("lost", [1, 2])
def test_a_journal_killed_between_two_files_goes_on_as_the_next(tmp_path, monkeypatch, lost):
    """``lost``: of the two renames of a rotation the first, or the second, is not made any more."""
    path = tmp_path / "journal.jsonl"
    journal, real, count = Journal(path, max_bytes=400), os.rename, iter(range(1, 99))

    def stopped(old, new):
        if next(count) >= lost:
            raise OSError(errno.EIO, "killed")
        real(old, new)

    monkeypatch.setattr(module.os, "rename", stopped)
    for step in range(1, 8):
        journal.step(step, {"loss": 1.0}, "d")
    monkeypatch.setattr(module.os, "rename", real)
    again = Journal(path, resume_step=7, max_bytes=400)  # the first one was killed: nobody closes it
    for step in range(8, 30):
        again.step(step, {"loss": 1.0}, "d")
    again.close()
    assert steps(read(path)) == list(range(1, 30))
    numbers = [json.loads(part.read_text().splitlines()[0])["part"] for part in parts(path)]
    assert numbers == list(range(1, len(numbers) + 1))


@settings(max_examples=30, deadline=None)
@given(
    script=st.lists(st.sampled_from(["step", "event", "poll", "kill"]), min_size=1, max_size=60),
    size=st.integers(200, 900),
)
def test_a_tail_sees_every_line_once(tmp_path_factory, script, size):
    path = tmp_path_factory.mktemp("tail") / "journal.jsonl"
    journal, tail, seen, step = Journal(path, max_bytes=size, keep=1000), Tail(path), [], 0
    for what in script:
        if what == "step":
            step += 1
            journal.step(step, {"loss": 1.0})
        elif what == "event":
            journal.event("e", step=step)
        elif what == "kill":
            journal.close()
            journal = Journal(path, resume_step=step, max_bytes=size, keep=1000)
        else:
            seen += tail.poll()
    journal.close()
    while new := tail.poll():
        seen += new
    tail.close()
    assert seen == read(path) and steps(seen) == list(range(1, step + 1))


def test_a_tail_beside_a_writer_in_a_thread(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal, tail, seen = Journal(path, max_bytes=20_000, keep=1000), Tail(path), []
    writer = threading.Thread(target=lambda: [journal.step(s, {"loss": 1.0}) for s in range(1, 3001)])
    writer.start()
    while writer.is_alive():
        seen += steps(tail.poll())
    while new := tail.poll():
        seen += steps(new)
    assert seen == list(range(1, 3001))


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = NullJournal()
    journal.step(1, {"loss": 1.0})
    journal.evaluation("knn", 1, {})
    journal.close("FINISHED")
    assert list(tmp_path.iterdir()) == []
