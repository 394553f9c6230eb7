"""The doctor: this machine's real facts, and one line for each thing that is wrong between hosts."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from moe_cl import cli
from moe_cl.config import ConfigError
from moe_cl.planning import host, hosts
from moe_cl.planning.doctor import problems
from moe_cl.planning.hosts import Answer, read_hostfile
from tests.small import make_shards


@pytest.fixture(scope="module")
def facts():
    found = host.facts(None, 29500)
    found["port_free"] = True
    return found


def two(facts, **changes):
    other = copy.deepcopy(facts)
    for key, value in changes.items():
        other[key] = value
    return [Answer("a", facts), Answer("b", other)]


def test_this_machine_is_well(facts):
    assert problems([Answer("here", facts)]) == []
    assert set(facts["packages"]) == set(host.pins()) and facts["disk"]["write_mb_s"] > 0


def test_versions(facts):
    packages = {**facts["packages"], "deepspeed": "0.1.0"}
    lines = problems(two(facts, packages=packages))
    assert len(lines) == 1 and lines[0].startswith("b: deepspeed 0.1.0 (pinned ") and "install.sh" in lines[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"python": "3.12.1"}, "python differs"),
        ({"config": "0000"}, "config differs: a None, b 0000; use the same recipe, DeepSpeed JSON and settings on all"),
        ({"code": "0000"}, "b 0000; use the same checkout on all"),
        ({"data": {"samples": 1, "digest": "x"}}, "data differs"),
        ({"data": {"error": "data/x does not exist"}}, "b: data: data/x does not exist"),
        ({"compiler": "missing"}, "b: no g++ or ninja"),
        ({"disk": {"free_gib": 0.5, "write_mb_s": 1.0}}, "b: only 0.5 GiB free"),
        ({"tracking": {"error": "no answer: refused"}}, "b: tracking: no answer: refused"),
        ({"experts": "torch's products: no compiler"}, "b torch's products: no compiler; other bits and speed"),
        ({"kind": "cuda"}, "kind differs: a cpu, b cuda; use hosts with the same accelerators"),
    ],
)
def test_one_line_each(facts, changes, says):
    found = problems(two(facts, **changes))
    assert any(says in line for line in found) and all("\n" not in line for line in found)


def test_clock(facts):
    answers = two(facts)
    answers[1].skew = -40.0
    assert problems(answers) == ["b: its clock is -40 s off; start a time service (chrony) on it"]


def test_port_in_use(facts):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not host.port_free(port)
    assert host.port_free(port)
    for wrong in ("99999", "0", "²"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["doctor", "--port", wrong])
    assert any("port is in use" in line for line in problems([Answer("a", {**facts, "port_free": False})]))


def test_a_host_that_cannot_be_reached(tmp_path, capsys):
    path = tmp_path / "hosts"
    path.write_text("no-such-host.invalid slots=2  # a comment\n")
    assert cli.main(["doctor", "--hostfile", str(path), "--json"]) == 1
    tree = json.loads(capsys.readouterr().out)
    assert "no-such-host.invalid: ssh cannot reach it" in tree["problems"][0]


def test_more_slots_than_devices(facts):
    gpus = {**facts, "kind": "cuda", "devices": ["H100 80 GiB"] * 4}
    assert problems([Answer("a", gpus, slots=8)]) == ["a: 8 slots, but 4 devices; one rank a device"]
    assert problems([Answer("a", gpus, slots=4)]) == []


@pytest.mark.parametrize(
    "text",
    ["", "node1\n", "node1 slots=many\n", "# nothing\n", "a slots=1\na slots=1\n", "a 8\n", "a slots=0\n",
     "a slots=²\n", "a slots=8 b\n", b"\x80\xff"],
)  # fmt: skip
def test_bad_hostfile(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match="slots=N|names no host|twice|is no text file") as caught:
        read_hostfile(str(path))
    assert "\n" not in str(caught.value)


def test_no_ssh_here(tmp_path, monkeypatch, capsys):
    path = tmp_path / "hosts"
    path.write_text("node1 slots=2\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["doctor", "--hostfile", str(path)]) == 2
    assert "there is no ssh here: install it" in capsys.readouterr().err


def test_settings_without_a_run_are_refused(capsys):
    for words in (["--out", "x"], ["--data", "x"], ["seed=1"]):
        assert cli.main(["doctor", *words]) == 2
        assert "name it with --recipe" in capsys.readouterr().err


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """``ssh`` is a script: each host that it knows answers as told, the others by running the command here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def says(**hosts):
        path = folder / "ssh"
        cases = "".join(f"{name}) {script} ;;\n" for name, script in hosts.items())
        path.write_text('#!/bin/bash\nargs=("$@")\nhost=${args[-2]} command=${args[-1]}\ncase "$host" in\n'
                        f'{cases}*) bash -c "$command" ;;\nesac\n')  # fmt: skip
        path.chmod(0o755)

    return says


def test_a_refusal_there_is_said_as_it_is(ssh):
    ssh(h2="echo 'moe_cl: unknown recipe x' >&2; exit 2")
    assert hosts.ask("h2", []).error == "unknown recipe x"


@pytest.mark.parametrize("behind", [-3, 0, 3])
def test_a_clock_is_found_in_both_directions(ssh, tmp_path, facts, behind):
    """Neither the login nor the start of Python hides a clock that is behind."""
    answer = tmp_path / "answer"
    answer.write_text(json.dumps(facts))
    ssh(h2=f"sleep 0.5; echo Welcome; date -d '{behind} seconds' '+clock %s.%N'; sleep 3.5; cat {answer}")
    found = hosts.ask("h2", [])
    assert found.error == "" and abs(found.skew - behind) < 1
    assert len(problems([found])) == (behind != 0)


@pytest.mark.parametrize(
    ("line", "lost"), [("clock $(date +%s).N", False), ("Welcome$(date '+clock %s.%N')", False), ("hello", True)]
)
def test_a_clock_said_in_another_way(ssh, tmp_path, facts, line, lost):
    """A ``date`` without fractions, a login without a line's end; one that says no clock is not another code's."""
    answer = tmp_path / "answer"
    answer.write_text(json.dumps(facts))
    ssh(h2=f'echo "{line}"; cat {answer}')
    found = hosts.ask("h2", [])
    assert found.facts == facts and abs(found.skew) < 1.5
    assert problems([found]) == (["h2: its clock cannot be read: see what `ssh h2 date +%s` says"] if lost else [])


@pytest.mark.parametrize("off", [False, True])
def test_a_clock_that_seems_wrong_is_asked_for_alone(ssh, tmp_path, facts, off, capsys):
    """What a busy machine read late is no clock that is off."""
    answer, path = tmp_path / "answer", tmp_path / "hosts"
    answer.write_text(json.dumps({**facts, "devices": []}))
    path.write_text("h2 slots=1\n")
    late = "date -d '-9 seconds' '+clock %s.%N'"
    alone = late if off else "eval $command"
    ssh(h2=f'case "$command" in *doctor*) {late}; cat {answer} ;; *) {alone} ;; esac')
    cli.main(["doctor", "--hostfile", str(path), "--json"])
    said = json.loads(capsys.readouterr().out)["problems"]
    assert [line for line in said if "clock" in line] == (
        ["h2: its clock is -9 s off; start a time service (chrony) on it"] if off else []
    )


@pytest.mark.parametrize("change", [None, "disk", "packages", "experts", "folder"])
def test_an_answer_of_another_age_is_one_line(ssh, tmp_path, facts, change):
    other = copy.deepcopy(facts)
    other.pop(change, None)
    if change == "folder":
        other["disk"].pop("folder")
    answer = tmp_path / "answer"
    answer.write_text(json.dumps(other if change else 42))
    ssh(h2=f"date '+clock %s.%N'; cat {answer}")
    lines = problems([Answer("h1", facts), hosts.ask("h2", [])])
    assert lines == ["h2: its answer is that of another code: use the same checkout on all hosts"]


def test_an_out_dir_that_hosts_do_not_share(ssh, tmp_path, facts):
    """h2 sees another folder in its place."""
    out = tmp_path / "out"
    out.mkdir()
    both = [Answer(name, facts | {"disk": host.disk(out / "run")}) for name in ("h1", "h2")]
    ssh()
    assert hosts.not_shared(both) == [] == list(out.iterdir())
    ssh(h2=f'echo "$command" | sed s#{out}#/nowhere# | bash')
    lines = hosts.not_shared(both)
    assert len(lines) == 1 and lines[0].startswith(f"h2: out dir: what h1 writes in {out} is not there; choose")
    assert list(out.iterdir()) == []
    ssh(h1="exit 255")
    assert hosts.not_shared(both) == []


def test_a_disk_that_cannot_be_written(tmp_path, facts):
    """A plain file in the way of the out dir; a file system mounted read-only (as root)."""
    (tmp_path / "file").write_text("")
    found = host.disk(tmp_path / "file" / "runs" / "a")
    assert found == {"error": f"{tmp_path / 'file'}: Not a directory; choose another --out, or make it writable"}
    assert problems([Answer("a", facts | {"disk": found})]) == [f"a: disk: {found['error']}"]
    if os.geteuid() == 0 and shutil.which("unshare"):
        (tmp_path / "disk").mkdir()
        ask = f"from moe_cl.planning import host; print(host.disk(host.Path('{tmp_path}/disk/runs')))"
        mount = f'mount -t tmpfs -o ro none "{tmp_path}/disk" && exec "$0" -c "$1"'
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", mount, sys.executable, ask], capture_output=True, text=True, cwd=host.ROOT
        )
        if "mount:" not in done.stderr and "unshare:" not in done.stderr:  # allowed here
            assert "Read-only file system; choose another --out" in done.stdout, done.stderr
    assert not host.disk(tmp_path / "new" / "runs").get("error") and not (tmp_path / "new").exists()


def test_an_address_that_is_none():
    assert "no answer from http://[bad (" in host.server("http://[bad")["error"]


def test_a_data_set_is_looked_at_file_by_file(tmp_path, facts):
    """What dataset.json claims is the same everywhere; the files may not be."""
    shards = make_shards(tmp_path)
    whole = host.data_set(str(shards))
    assert whole["samples"] == 96 and host.data_set(str(shards)) == whole
    index, tar = sorted(shards.glob("*.index.json"))[0], sorted(shards.glob("*.tar"))[1]
    text = index.read_text()
    index.write_text(text.replace('"label":[', '"label":[ '))  # another file, the same data: said, to be copied again
    assert host.data_set(str(shards))["digest"] != whole["digest"]
    index.unlink()
    assert "has no index: copy it too" in host.data_set(str(shards))["error"]
    index.write_text("{}")
    assert "not a shard index" in host.data_set(str(shards))["error"]
    index.write_text(text)
    with open(tar, "r+b") as file:
        file.truncate(1000)
    assert "has 1,000 bytes, not " in (found := host.data_set(str(shards)))["error"]
    lines = problems(
        [Answer(name, facts | {"data": data}) for name, data in (("a", whole), ("b", whole), ("c", found))]
    )
    assert lines == [f"c: data: {found['error']}"]


def test_a_planned_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    shards = make_shards(tmp_path)
    run = ["doctor", "--recipe", "crmoe_vit_micro_fmnist", "--out", str(tmp_path / "run")]
    assert cli.main([*run, "--data", str(shards), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["data"]["samples"] == 96 and tree["tracking"]["state"] == "embedded" and len(tree["config"]) == 16
    assert cli.main([*run, "--data", "nowhere"]) == 1
    assert "PROBLEM" in (out := capsys.readouterr().out) and "nowhere does not exist" in out
    assert not (tmp_path / "run").exists()


def test_the_remote_command_runs_this_checkout():
    command = hosts.remote("node1", "moe_cl", "doctor", "--json", RANK="1")
    assert command[0] == "ssh" and command[-2] == "node1"
    assert str(host.ROOT) in command[-1] and "RANK=1" in command[-1] and "moe_cl doctor --json" in command[-1]
