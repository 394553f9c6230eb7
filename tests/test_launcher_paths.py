"""The launchers start from any directory; relative paths are those of whoever stands there."""

import subprocess

import pytest

from tests.pool import free_port
from tests.small import ENV, ROOT, make_shards, settings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with ``shards`` in it, outside of the checkout."""
    folder = tmp_path_factory.mktemp("place")
    make_shards(folder)
    return folder


def environment():
    return {**ENV, "MASTER_PORT": str(free_port())}


def options(*more):
    words = settings("shards", "here/run", "moe.ep_size=1", *more)
    return [str(word) for word in words]


@pytest.mark.parametrize("script", [["local.sh", "1"], ["torchrun.sh"]])
def test_relative_data_is_the_callers(place, script):
    """``eval.knn_every`` is refused after the data was found, so a refusal of it says that they were."""
    command = ["bash", str(ROOT / "launchers" / script[0]), *script[1:]]
    told = {"eval.knn_every=1": "needs eval.bank", "data.train=elsewhere": "elsewhere does not exist"}
    for setting, says in told.items():
        done = subprocess.run(
            [*command, *options(setting)], cwd=place, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.processes
def test_a_run_from_elsewhere_writes_where_the_caller_stands(place):
    command = ["bash", str(ROOT / "launchers" / "local.sh"), "1", *options("schedule.max_steps=1")]
    done = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (place / "here" / "run" / "journal.jsonl").is_file() and not (ROOT / "here").exists()
    # Started again it goes on (here: there is nothing left to do), unless it is told not to.
    again = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "nothing to resume" in again.stdout, again.stderr[-2000:]
    command += ["resume=false"]
    refused = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "has checkpoints already" in refused.stderr


@pytest.mark.parametrize("script", ["local.sh", "torchrun.sh", "multinode.sh", "slurm.sbatch"])
def test_every_launcher_continues(script):
    text = (ROOT / "launchers" / script).read_text()
    assert "resume.sh" in text or text.count('pretrain --resume "$@"') == 1
