"""The real command from start to end: through the launcher and without it, killed and resumed, tracked."""

import json
import os
import resource
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from moe_cl import cli
from moe_cl.engine.checkpoint import store
from moe_cl.engine.heartbeat import read as read_signs
from moe_cl.tracking.journal import read
from tests.small import ENV, ROOT, launch, make_shards, settings
from tests.test_cli import refuse

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data"))


def steps(out):
    return [line for line in read(out / "journal.jsonl") if line["kind"] == "step"]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """An uninterrupted run without a launcher."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = launch(0, *settings(shards, out, "moe.ep_size=1", "track.uri=null"))
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_two_ranks_through_the_launcher(shards, whole, tmp_path):
    out = tmp_path / "run"
    options = settings(shards, out, "moe.ep_size=2")
    done = launch(2, *options, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads((out / "environment.json").read_text())["command"]  # starts two ranks too, from the beginning
    words = ["deepspeed", "--num_accelerators", "2", "--module", "moe_cl", "pretrain", *options]
    assert again == f"DS_ACCELERATOR=cpu {shlex.join(words)}"
    lines = steps(out)
    assert [line["step"] for line in lines] == list(range(1, 7))
    # The same samples as on one rank, and (all-fp32, global statistics) the same losses.
    alone = steps(whole)
    assert [line["samples"] for line in lines] == [line["samples"] for line in alone]
    for mine, theirs in zip(lines, alone, strict=True):
        assert mine["values"]["loss"] == pytest.approx(theirs["values"]["loss"], rel=1e-3)
        assert {"loss/contrastive", "loss/balance", "loss/consistency", "images_per_second", "data_wait"} <= set(
            mine["values"]
        )
    assert "16 = 8 micro x 1 accumulation x 2 ranks" in done.stdout
    assert (out / "checkpoints" / "step-00000006" / "manifest.json").exists()


def test_speed_in_floating_point_operations(shards, tmp_path):
    out = tmp_path / "run"
    done = launch(0, *settings(shards, out, "moe.ep_size=1", "schedule.max_steps=2", "engine.peak_tflops=0.5"))
    assert done.returncode == 0, done.stderr[-2000:]
    for line in steps(out):
        values = line["values"]
        assert values["tflops"] > 0 and values["mfu"] == pytest.approx(values["tflops"] / 0.5)
    assert "FLOP an image and step" in done.stdout and "peak 500GFLOP/s" in done.stdout
    assert "== moe_cl pretrain: FINISHED ==" in done.stdout and "2 of 2, 2 of them in this start" in done.stdout
    assert json.loads((out / "ds_config.json").read_text())["train_batch_size"] == 16


def test_journal_and_mlflow_agree(whole):
    # The tracker is niced and gets a bounded time at the end; what it did not manage then is brought by `track sync`.
    subprocess.run([sys.executable, "-m", "moe_cl", "track", "sync", str(whole)], cwd=ROOT, env=ENV, check=True)
    database = sqlite3.connect(whole / "mlflow.db")
    rows = database.execute("select key, step, value from metrics").fetchall()
    found = {(key, step): value for key, step, value in rows}
    assert len(found) == len(rows), "a point was sent twice"
    for line in steps(whole):
        for key, value in line["values"].items():
            if isinstance(value, float):
                assert found[key, line["step"]] == pytest.approx(value)
    assert database.execute("select status from runs").fetchone() == ("FINISHED",)
    assert all("tflops" in line["values"] and "mfu" not in line["values"] for line in steps(whole))
    tags = dict(database.execute("select key, value from tags").fetchall())
    assert float(tags["active_gflops_per_image"]) > 0
    params = dict(database.execute("select key, value from params").fetchall())
    assert params["batch.global_batch"] == "16" and params["method"] == "crmoe"


def test_killed_and_resumed_it_is_the_same_run(shards, whole, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "moe_cl", "pretrain", *settings(shards, out, "moe.ep_size=1", "--resume")]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "latest").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = launch(0, *settings(shards, out, "moe.ep_size=1", "--resume"))
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    ours, theirs = steps(out), steps(whole)
    assert [line["step"] for line in ours] == list(range(1, 7))
    assert [line["samples"] for line in ours] == [line["samples"] for line in theirs]
    assert [line["values"]["loss"] for line in ours] == [line["values"]["loss"] for line in theirs], "not bit-equal"


def test_a_run_killed_before_its_first_checkpoint_is_the_same_run(shards, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints")
    before, tracked = read(out / "journal.jsonl"), json.loads((out / "mlflow.state.json").read_text())["run_id"]
    again = launch(0, *settings(shards, out, "moe.ep_size=1", "track.uri=null", "--resume", "schedule.max_steps=2"))
    assert again.returncode == 0, again.stderr[-2000:]
    lines = read(out / "journal.jsonl")
    assert lines[0]["id"] == before[0]["id"] and [line["step"] for line in steps(out)] == [1, 2]
    (resume,) = [line for line in lines if line.get("name") == "resume"]
    assert (resume["step"], resume["repeats_to"]) == (0, 6)
    assert tracked and json.loads((out / "mlflow.state.json").read_text())["run_id"] == tracked


def test_a_run_whose_last_checkpoint_is_damaged_is_not_done(shards, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shard = out / "checkpoints" / "step-00000006" / "student-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = launch(0, *settings(shards, out, "moe.ep_size=1", "--resume", "checkpoint.keep_last=1"))
    assert done.returncode == 0 and "nothing to resume" not in done.stdout, done.stderr[-2000:]
    assert done.stderr.count("student-00000.safetensors") == 1
    assert [line["values"]["loss"] for line in steps(out)] == [line["values"]["loss"] for line in steps(whole)]
    assert (out / "checkpoints" / "latest").read_text().strip() == "step-00000006" and shard.exists()
    assert (out / "checkpoints" / "damaged-step-00000006").is_dir()
    again = launch(0, *settings(shards, out, "moe.ep_size=1", "--resume"))
    assert again.returncode == 0 and "nothing to resume" in again.stdout


def test_one_rank_through_the_launcher_and_a_second_method(shards, tmp_path, capsys):
    out = tmp_path / "run"
    dense = ["method=mocov3", "params={dim: 8, mlp_dim: 16}", "moe.blocks=none", "moe.ep_size=1"]
    done = launch(1, *settings(shards, out, *dense, "schedule.max_steps=2"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line["step"] for line in steps(out)] == [1, 2]
    again = launch(0, *settings(shards, out, *dense, "schedule.max_steps=2", "--resume", "eval.k=3"))
    assert (
        again.returncode == 0
        and "nothing to resume; set otherwise now, without an effect: eval.k=3 (was" in again.stdout
    )
    for change, says in (
        ([], "add --resume to continue that run"),
        (["--resume", "seed=1"], "a finished run with other settings (seed 0 -> 1)"),
    ):
        other = launch(0, *settings(shards, out, *dense, "schedule.max_steps=2", *change))
        assert other.returncode == 2 and says in other.stderr and other.stderr.strip().count("\n") == 0
    more = settings(shards, out, *dense, "schedule.max_steps=4", "--resume", "--check", "1")
    assert cli.main(["pretrain", *more]) == 0
    for change, says in (
        ("data.streams=2", "data.streams changed since the checkpoint (streams: 4, now 2); in the middle of an epoch"),
        ("optim.name=sgd", "holds an unfinished run with other settings (optim.name adamw -> sgd)"),
        ("teacher.momentum=0.1", "run with other settings (teacher.momentum 0."),
    ):
        assert says in refuse(capsys, *more, change)


@pytest.mark.parametrize("words", [["views.size=20"], ["--check", "0"], ["--nothing"]])
def test_bad_input_through_the_launcher_is_one_line_of_ours(shards, tmp_path, words):
    done = launch(2, *settings(shards, tmp_path / "run", *words))
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    ours = [line for line in done.stderr.splitlines() if "moe_cl: " in line and "launch.py" not in line]
    assert len(ours) == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_accumulation_and_the_exact_large_batch_run(shards, tmp_path):
    losses = {}
    for name, options in {
        "plain": [], "accumulated": ["batch.accumulation=2"],
        "exact": ["batch.accumulation=2", "batch.exact_large_batch=true"],
    }.items():  # fmt: skip
        out = tmp_path / name
        done = launch(0, *settings(shards, out, "moe.ep_size=1", "schedule.max_steps=2", *options))
        assert done.returncode == 0, done.stderr[-2000:]
        losses[name] = [line["values"]["loss"] for line in steps(out)]
        if name == "accumulated":
            assert "negatives" in done.stdout
    assert losses["exact"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["accumulated"] != pytest.approx(losses["plain"], rel=1e-2)


def test_views_finished_on_the_device_train_as_those_of_the_loader(shards, whole, tmp_path):
    out = tmp_path / "run"
    done = launch(0, *settings(shards, out, "moe.ep_size=1", "schedule.max_steps=2", "views.implementation=device"))
    assert done.returncode == 0, done.stderr[-2000:]
    for mine, theirs in zip(steps(out), steps(whole), strict=False):
        assert mine["samples"] == theirs["samples"]
        assert mine["values"]["loss"] == pytest.approx(theirs["values"]["loss"], rel=0.05)


def test_lost_data_on_one_rank_saves_and_stops_all(tmp_path):
    shards = make_shards(tmp_path)
    out = tmp_path / "run"
    for tar in sorted(shards.glob("*.tar"))[1:]:  # the index stays: what it names is not there any more
        tar.write_bytes(b"\0" * tar.stat().st_size)
    options = ["moe.ep_size=2", "data.log_sample_ids=true"]
    done = launch(2, *settings(shards, out, *options, "data.max_bad_fraction=0"))
    assert done.returncode != 0
    assert "start again with --resume" in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.stderr.count("moe_cl: ") == 1
    lines = read(out / "journal.jsonl")
    assert [line for line in lines if line["kind"] == "end"][-1]["status"] == "FAILED"
    ran = [line for line in lines if line["kind"] == "step"]
    assert all(len(set(line["sample_ids"])) == 16 for line in ran)


def test_a_full_disk_leaves_journal_heartbeat_and_signals_in_order(shards, tmp_path):
    """A whole run whose files cannot grow, then can, then cannot: it goes on, says so, catches up, and is requeued."""
    out, hard = tmp_path / "run", resource.RLIM_INFINITY
    options = settings(shards, out, "moe.ep_size=1", "schedule.epochs=2000", "checkpoint.every_steps=20")
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_cl", "pretrain", *options], cwd=ROOT, env=ENV, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    said: list[str] = []
    listener = threading.Thread(target=lambda: said.extend(process.stderr))
    listener.start()

    def room(size):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))

    def until(what):
        deadline = time.monotonic() + 120
        while not what():
            assert process.poll() is None and time.monotonic() < deadline, "".join(said)[-2000:]
            time.sleep(0.02)

    def lost():
        return sum("no checkpoint at step" in line for line in said)

    def reached():
        return read_signs(out, 1)[0].step

    try:
        until(lambda: store.latest_complete(out))
        room(512)
        until(lost)
        good, at, written = store.latest_complete(out), reached(), len(steps(out))
        until(lambda: reached() > at + 10)
        assert store.latest_complete(out) == good and len(steps(out)) <= written + 1  # waiting in memory
        room(hard)
        until(lambda: store.latest_complete(out) != good)
        lines = steps(out)
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > at
        room(512)
        failed = lost()
        until(lambda: lost() > failed)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        listener.join()
    last = store.step_of(store.latest_complete(out))
    assert json.loads((out / "requeue").read_text())["step"] == last
    assert (
        sum("Traceback" in line for line in said) == 0
        and f"goes on from the checkpoint of step {last}, not" in said[-1]
    )
    again_on_a_full_disk(out, options, last)


def resumed(out):
    return any(line.get("name") == "resume" for line in read(out / "journal.jsonl"))


def again_on_a_full_disk(out, options, last):
    """The requeued start saves nothing either: it asks for no other, and what there was stays."""
    command = [sys.executable, "-m", "moe_cl", "pretrain", *options, "--resume", "checkpoint.every_steps=100000"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not resumed(out) or steps(out)[-1]["step"] <= last:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 1 and not (out / "requeue").exists(), said[-2000:]
    assert f"nothing could be saved since its start at step {last}" in said and "Traceback" not in said, said[-2000:]
    assert store.step_of(store.latest_complete(out)) == last


def test_profile_writes_named_spans(shards, tmp_path):
    out = tmp_path / "run"
    done = launch(0, *settings(shards, out, "moe.ep_size=1", "schedule.max_steps=3", "engine.profile=[1, 1]"))
    assert done.returncode == 0, done.stderr[-2000:]
    events = json.loads((out / "trace-00000.json").read_text())["traceEvents"]
    names = {event["name"] for event in events}
    wanted = {"step", "data", "encode student", "encode teacher", "dispatch", "loss", "backward", "optimizer", "commit"}
    assert wanted <= names
    (step,) = [e for e in events if e["name"] == "step"]
    for event in events:
        if event["name"] in wanted:  # all of it inside the step
            assert step["ts"] <= event["ts"] and event["ts"] + event["dur"] <= step["ts"] + step["dur"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "has checkpoints already: add --resume"),
        (["--resume", "seed=5"], "holds a finished run with other settings (seed 0 -> 5)"),
        (
            ["--resume", "schedule.epochs=50"],
            "holds an unfinished run with other settings (schedule.epochs 1.0 -> 50.0)",
        ),
        (["--resume", "moe.experts=2", "optim.base_lr=0.5"], "(moe.experts 4 -> 2, optim.base_lr "),
    ],
)
def test_an_out_dir_holds_one_run(shards, whole, capsys, more, says):
    before = (whole / "journal.jsonl").read_bytes()
    assert says in refuse(capsys, "--check", "1", *settings(shards, whole, "moe.ep_size=1", *more))
    assert (whole / "journal.jsonl").read_bytes() == before
