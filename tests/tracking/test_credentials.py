"""Credentials are nowhere: in no file of a run, no line on its console, nothing that goes to MLflow."""

import json
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_cl.config import ConfigError, TrackConfig
from moe_cl.tracking import mlflow, redact
from moe_cl.tracking.journal import Journal, read
from tests.data.servers import http_site
from tests.pool import free_port
from tests.small import ENV, ROOT, launch, make_shards, settings

SECRET = "swordfish"


def nowhere(out):
    for path in out.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.browser  # starts MLflow
def test_nothing_of_a_tracked_journal_has_them(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("MOE_CL_TRACKER_NICE", "0")
    out = tmp_path / "run"
    journal = Journal(out / "journal.jsonl")
    uri = f"http://me:{SECRET}@127.0.0.1:{free_port()}"
    handle = mlflow.start(out, TrackConfig(uri=uri), {"note": SECRET}, config={"track": {"uri": uri}})
    journal.step(1, {"loss": 1.0})
    journal.event("retry", step=1, url=f"https://me:{SECRET}@host/x.tar", detail={"why": f"?sig={SECRET} refused"})
    journal.close("FINISHED")
    deadline = time.monotonic() + 300
    while not (out / "mlflow.log").stat().st_size and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not handle.stop(1) and SECRET not in handle.shown + handle.open_with
    assert (out / "mlflow.log").stat().st_size
    nowhere(out)


@pytest.mark.processes
def test_no_file_and_no_line_of_a_run_has_them(tmp_path):
    """Server and data are named with a password: config, checkpoint, journal, environment, console, MLflow's store."""
    shards, out = make_shards(tmp_path / "data"), tmp_path / "run"
    with http_site(shards) as site:
        place = site.url.replace("://", f"://me:{SECRET}@")
        tars = f"{place}/{sorted(p.name for p in shards.glob('*.tar'))[0]}"
        uri = f"track.uri=http://me:{SECRET}@127.0.0.1:{free_port()}"
        run = settings(shards, out, "moe.ep_size=1", "schedule.max_steps=1", "track.flush_seconds=0", "data.streams=1")
        run = [*run, f"data.train={tars}", uri]
        done = launch(0, *run)
        assert done.returncode == 0, done.stderr[-2000:]
        assert SECRET not in done.stdout + done.stderr and "http://***@127.0.0.1" in done.stdout
        assert list((out / "checkpoints").glob("step-*/config.yaml")) and "***" in (out / "config.yaml").read_text()
        assert "***" in next(e["data"] for e in read(out / "journal.jsonl") if e.get("name") == "start")
        nowhere(out)
        with pytest.raises(ConfigError, match="credentials of .* are not kept: give --track-uri"):
            mlflow.sync(out, seconds=0)
        assert mlflow.sync(out, f"sqlite:///{out / 'server.db'}", 300)["done"]
        nowhere(out)
        again = launch(0, *run, "--resume")  # given again, they are no other settings
        assert again.returncode == 0 and again.stdout.strip().endswith("nothing to resume"), again.stderr[-2000:]
    command = [sys.executable, "-m", "moe_cl", "report", str(out)]
    report = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=200)
    assert report.returncode == 0 and SECRET not in report.stdout + report.stderr
    assert "its credentials are not kept with the run" in report.stderr
    nowhere(out)


@pytest.mark.parametrize(
    ("given_", "shown"),
    [
        ("get https://a:b@h/p?X-Amz-Credential=1&n=2", "get https://***@h/p?X-Amz-Credential=***&n=2"),
        ("http://me:sword@fish99@host", "http://***@host"),
        ("http://me:pa/ss@host:5000", "http://***@host:5000"),
        ("http://me:pa?s#s@host:5000", "http://***@host:5000"),
        ("http://h/a?pwd=abc", "http://h/a?pwd=***"),
        ("postgresql+psycopg2://me:pa/ss@db/x", "postgresql+psycopg2://***@db/x"),
        ("s3://k:s@b/x::https://u:p@h/y", "s3://***@b/x::https://***@h/y"),
        # nothing to hide: an @ in a path, a port, a range of ports
        ("https://host/data@v1/x.tar", "https://host/data@v1/x.tar"),
        ("http://[::1]:5000/a@b", "http://[::1]:5000/a@b"),
        ("https://h-{0..3}:80{80,81}/x@y", "https://h-{0..3}:80{80,81}/x@y"),
        ("sqlite:////a@2/x.db", "sqlite:////a@2/x.db"),
    ],
)
def test_text(given_, shown):
    assert redact.text(given_) == shown and redact.text(shown) == shown


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=1), st.sampled_from("/?#@:"))
def test_a_password_of_any_characters_is_hidden_in_a_setting(password, odd):
    password = f"<{password}{odd}>"
    assert redact.setting(f"http://me:{password}@host:5000/x") == "http://***@host:5000/x"


def test_settings():
    assert redact.value("s3.secret", "abc") == "***" and redact.value("model.tokens", 3) == 3
    assert (
        json.dumps(redact.value("a", {"password": "x", "b": ["u://k:v@h"]}))
        == '{"password": "***", "b": ["u://***@h"]}'
    )


def test_the_directory_of_the_shell_is_no_secret(monkeypatch):
    monkeypatch.setenv("PWD", "/home/someone")
    monkeypatch.setenv("MYSQL_PWD", SECRET)
    assert redact.text(f"/home/someone/run {SECRET}") == "/home/someone/run ***"
