"""The doctor: this machine's real facts, and one line for each thing that is wrong between hosts."""

import copy
import json
import socket

import pytest

from moe_cl import cli
from moe_cl.config import ConfigError
from moe_cl.planning import doctor, host
from moe_cl.planning.doctor import Answer, problems, read_hostfile
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
        ({"disk": {"error": "/x: Read-only file system"}}, "b: disk: /x: Read-only file system"),
        ({"tracking": {"error": "no answer: refused"}}, "b: tracking: no answer: refused"),
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


@pytest.mark.parametrize("text", ["", "node1\n", "node1 slots=many\n", "# nothing\n", "a slots=1\na slots=1\n"])
def test_bad_hostfile(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match="slots=N|names no host|twice"):
        read_hostfile(str(path))


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
    command = doctor.remote("node1", "moe_cl", "doctor", "--json", RANK="1")
    assert command[0] == "ssh" and command[-2] == "node1"
    assert str(host.ROOT) in command[-1] and "RANK=1" in command[-1] and "moe_cl doctor --json" in command[-1]
