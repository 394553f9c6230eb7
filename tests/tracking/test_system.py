"""A node's samples go into its own journal; the environment says what a run was made with."""

import subprocess
import sys
import time

import torch

from moe_cl.tracking import environment
from moe_cl.tracking.journal import read
from moe_cl.tracking.system import Monitor, sample


def test_a_sample_has_processor_memory_and_rates():
    first, counters = sample()
    time.sleep(0.01)
    second, _ = sample(counters)
    assert 0 <= first["cpu_percent"] <= 100 and 0 < first["memory_gib"] and "network_sent_mb_s" not in first
    assert second["network_sent_mb_s"] >= 0 and 0 < second["memory_percent"] <= 100


def test_no_other_device_is_asked_through_cuda(monkeypatch):
    """Without NVML's package (torch's functions raise) the process's own device alone answers."""

    def nvml(device):
        raise ModuleNotFoundError("nvidia-ml-py")

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i=0: asked.append(i) or (2**30, 3 * 2**30))
    for name in ("device_memory_used", "utilization", "power_draw"):
        monkeypatch.setattr(torch.cuda, name, nvml)
    values, _ = sample()
    assert asked == [0] and {k: v for k, v in values.items() if k.startswith("gpu")} == {"gpu0/memory_gib": 2.0}
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda i: i * 2**30)
    values, _ = sample()
    assert asked == [0] and [values[f"gpu{i}/memory_gib"] for i in range(4)] == [0.0, 1.0, 2.0, 3.0]


def test_the_monitor_writes_at_the_step_it_is_told(tmp_path):
    with Monitor(tmp_path, seconds=0.02) as monitor:
        monitor.step = 7
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and len(read(tmp_path / "system" / f"{monitor.host}.jsonl")) < 3:
            time.sleep(0.02)
    lines = [line for line in read(tmp_path / "system" / f"{monitor.host}.jsonl") if line["kind"] == "step"]
    assert lines and lines[-1]["step"] == 7
    assert f"system/{monitor.host}/cpu_percent" in lines[-1]["values"]


def test_tags_name_code_job_and_machine(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(environment, "git", lambda folder=None: ("a" * 40, True))
    tags = environment.tags("crmoe", "vit", 2, 2, "step 10")
    assert tags["method"] == "crmoe" and tags["world"] == "2" and tags["ep"] == "2" and tags["job"] == "4711"
    assert tags["git.commit"] == "a" * 40 and tags["git.dirty"] == "true" and tags["resumed_from"] == "step 10"


def test_git_tells_a_changed_checkout(tmp_path):
    def git(*command):
        options = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run(["git", "-C", str(tmp_path), *options, *command], check=True, capture_output=True)

    assert environment.git(tmp_path / "nowhere") is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    commit, dirty = environment.git(tmp_path)
    assert len(commit) == 40 and not dirty
    (tmp_path / "file").write_text("2")
    assert environment.git(tmp_path) == (commit, True)


def test_the_environment_names_versions():
    described = environment.describe()
    assert described["packages"]["torch"] and described["python"].startswith("3.")


def test_the_sender_process_needs_no_torch():
    code = "import sys, moe_cl.tracking.sender, moe_cl.tracking.mlflow; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
