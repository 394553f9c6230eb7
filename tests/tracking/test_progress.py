"""The console: plain lines without a terminal, a bar with one, advice once."""

import io

from moe_cl.tracking import progress
from moe_cl.tracking.progress import Progress, banner, count, duration, table


class Terminal(io.StringIO):
    def isatty(self):
        return True


VALUES = {"loss": 5.43219, "images_per_second": 847.2, "data_wait": 0.031, "memory_gib": 1.25}


def test_plain_lines_come_every_so_many_seconds(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    bar = Progress(total=100, start=20, plain_seconds=30, stream=out)
    for step in range(21, 81):
        clock[0] += 1.0
        bar.update(step, VALUES)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0] == (
        "pretrain step 50/100 (50.0%)  loss 5.4322  847 images/s  data wait 3%  memory 1.2 GiB  ETA 0:50"
    )
    clock[0] += 1.0
    bar.update(100, VALUES)
    assert "100/100 (100.0%)" in out.getvalue().splitlines()[-1]


def test_a_terminal_gets_a_bar_and_lines_above_it():
    out = Terminal()
    with Progress(total=10, stream=out) as bar:
        bar.update(4, VALUES)
        bar.say("saved [step 4]")
        bar._bar.refresh()
    assert "4/10" in out.getvalue() and "loss 5.4322" in out.getvalue() and "saved [step 4]" in out.getvalue()


def test_data_wait_prints_once_what_to_do():
    out = io.StringIO()
    bar = Progress(total=100, plain_seconds=1e9, stream=out)
    for step in range(1, 60):
        bar.update(step, {"data_wait": 0.5 if step > 5 else 0.9})
    assert out.getvalue().count("data.workers") == 1 and "50%" in out.getvalue()


def test_one_slow_read_is_no_reason_for_advice():
    out = io.StringIO()
    bar = Progress(total=200, plain_seconds=1e9, stream=out)
    for step in range(1, 150):
        bar.update(step, {"data_wait": 0.95 if step % 40 == 0 else 0.02, "images_per_second": 300.0})
    assert "data.workers" not in out.getvalue()


def test_a_slow_step_weighs_as_long_as_it_took():
    out = io.StringIO()
    bar = Progress(total=100, plain_seconds=1e9, stream=out)
    for step in range(1, 60):  # every tenth step takes ninety times as long, nearly all of it waiting
        slow = step % 10 == 0
        bar.update(step, {"data_wait": 0.99 if slow else 0.0, "images_per_second": 10.0 if slow else 900.0})
    assert out.getvalue().count("data.workers") == 1


def test_a_line_every_so_many_steps_if_asked(capsys):
    out = io.StringIO()
    bar = Progress(total=100, plain_seconds=1e9, every=10, stream=out)
    for step in range(1, 36):
        bar.update(step, VALUES)
    assert [line.split()[2] for line in out.getvalue().splitlines()] == ["10/100", "20/100", "30/100"]


def test_another_rank_prints_nothing(capsys):
    bar = Progress(total=3, enabled=False)
    bar.update(3, VALUES)
    bar.say("x")
    bar.close()
    assert capsys.readouterr().out == ""


def test_banner_and_table_read_well_without_a_terminal():
    out = io.StringIO()
    banner({"model": "vit_micro [6 blocks]", "lr": 0.1}, "run", out)
    table(["features", "top-1"], [["pixels", 0.81234], ["trained", 0.9]], "kNN", out)
    assert out.getvalue().splitlines() == [
        "== run ==", "model  vit_micro [6 blocks]", "lr     0.1",
        "kNN", "features   top-1", "--------  ------", "pixels    0.8123", "trained   0.9000",
    ]  # fmt: skip
    rich = Terminal()
    banner({"model": "vit_micro [6 blocks]"}, "run", rich)
    table(["features", "top-1"], [["pixels", 0.81234]], "kNN", rich)
    assert "vit_micro [6 blocks]" in rich.getvalue() and "0.8123" in rich.getvalue()


def test_short_forms():
    assert [duration(5), duration(125), duration(3725)] == ["0:05", "2:05", "1:02:05"]
    assert [count(999), count(12_345_678), count(2.5e9)] == ["999", "12.3M", "2.5G"]
