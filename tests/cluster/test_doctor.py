"""The doctor over ssh: two healthy hosts, and every start-up error made for real on one of them, found before a job."""

import json
import socket
from contextlib import ExitStack
from glob import glob
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.cluster.conftest import need
from tests.cluster.forwarder import inside
from tests.pool import free_port
from tests.small import ROOT, make_shards

pytestmark = pytest.mark.cluster
RECIPE = ROOT / "moe_cl" / "recipes" / "crmoe_vit_micro_fmnist.yaml"


def test_healthy_hosts_are_measured(cluster, shards, tmp_path):
    run = ["--recipe", RECIPE.stem, "--data", str(shards), "--out", str(tmp_path / "run"), "--port", str(free_port())]
    done = cluster.run("python", "-m", "moe_cl", "doctor", "--hostfile", str(cluster.hostfile), "--json", *run)
    tree = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0 and tree["problems"] == [], done.stdout + done.stderr
    assert [a["facts"]["host"] for a in tree["hosts"]] == ["h1", "h2"]
    assert [a["facts"]["data"]["samples"] for a in tree["hosts"]] == [96, 96]
    assert tree["links"]["all_reduce_mb_s"] > 0 and tree["links"]["all_to_all_mb_s"] > 0


def changed(path, old, new, folder):
    """A copy of ``path`` with a word changed, to be mounted over it."""
    text = path.read_text()
    assert old in text
    copy = folder / path.name
    copy.write_text(text.replace(old, new, 1))
    return str(copy)


def test_what_is_wrong_on_a_host_is_one_line_each(cluster, shards, tmp_path):
    need({"/usr/bin/faketime": "faketime"})
    other = make_shards(tmp_path / "other", images=48)
    package = Path(distribution("deepspeed")._path) / "METADATA"
    version, out, port = distribution("deepspeed").version, tmp_path / "run", free_port()
    out.mkdir()
    hosts = tmp_path / "hosts"
    hosts.write_text("h1 slots=1\nh2 slots=1\n10.77.0.9 slots=1\n")
    with ExitStack() as stack:
        two = lambda target, *source: stack.enter_context(cluster.mounted(2, target, *source))  # noqa: E731
        two(package, "--bind", changed(package, f"\nVersion: {version}\n", "\nVersion: 0.1.0\n", tmp_path))
        two(RECIPE, "--bind", changed(RECIPE, "seed: 0", "seed: 7", tmp_path))
        two(ROOT / "moe_cl" / "comm.py", "--bind", changed(ROOT / "moe_cl" / "comm.py", "world", "World", tmp_path))
        two(shards, "--bind", str(other))
        two(out, "-t", "tmpfs", "-o", "size=128m", "tmpfs")
        library = glob("/usr/lib/*/faketime/libfaketime.so.1")[0]
        stack.enter_context(cluster.login_environment(2, LD_PRELOAD=library, FAKETIME="+3600s"))
        with inside("h1"):
            stack.enter_context(socket.create_server(("", port)))
        done = cluster.run(
            "python", "-m", "moe_cl", "doctor", "--hostfile", str(hosts), "--recipe", RECIPE.stem, "--data",
            str(shards), "--out", str(out), "--port", str(port), f"track.uri=http://me:secret@10.77.0.254:{port}",
        )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    found = sorted(line.removeprefix("PROBLEM  ") for line in done.stdout.splitlines() if line.startswith("PROBLEM"))
    expected = sorted([
        "10.77.0.9: ssh cannot reach it (",
        f"h2: deepspeed 0.1.0 (pinned {version}): run launchers/install.sh there",
        "h2: only 0.1 GiB free for the out dir",
        f"h2: out dir: what h1 writes in {out} is not there",
        "h2: its clock is +3600 s off",
        "h1: the port is in use: choose another with --port",
        f"h1: tracking: no answer from http://***@10.77.0.254:{port} (",
        f"h2: tracking: no answer from http://***@10.77.0.254:{port} (",
        "code differs: h1 ",
        "config differs: h1 ",
        "data differs: h1 ",
    ])  # fmt: skip
    assert len(found) == len(expected), found
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found
