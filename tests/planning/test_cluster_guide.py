"""docs/cluster.md: every job that it starts passes the check of the launchers; the doctor; the hostfile."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from moe_cl import cli
from moe_cl.planning.doctor import read_hostfile
from tests.guide import DOCS
from tests.small import ROOT, make_shards

TEXT = (DOCS / "cluster.md").read_text()
JOBS = re.findall(r"^ +(?:bash launchers/multinode\.sh hostfile|sbatch .* launchers/slurm\.sbatch) (.*)$", TEXT, re.M)
CHECKS = re.findall(r"^ +python -m moe_cl pretrain --check (\d+) (.*)$", TEXT, re.M)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("guide"), images=3072)


def given(words, shards, tmp_path):
    """The guide's words with the data and out dir of this test."""
    return words.replace("/data/imagenet/train", str(shards)).replace("runs/crmoe300", str(tmp_path / "run"))


def test_the_guide_has_what_is_tested_here():
    assert len(JOBS) == 2 and len(CHECKS) == 1


@pytest.mark.parametrize(("ranks", "words"), [(16, JOBS[0]), (32, JOBS[1]), *CHECKS])
def test_every_job_passes_the_check(ranks, words, shards, tmp_path):
    assert cli.main(["pretrain", "--check", str(ranks), *shlex.split(given(words, shards, tmp_path))]) == 0


def test_the_first_steps(shards, tmp_path):
    (doctor,) = re.findall(r"^ +python -m (moe_cl doctor --hostfile .*)$", TEXT, re.M)
    words = shlex.split(given(doctor, shards, tmp_path))[1:]
    at = words.index("--hostfile")
    assert cli.main([*words[:at], *words[at + 2 :], "--json"]) == 0  # this machine in the hosts' place
    (line,) = re.findall(r"^ +(printf .*)$", TEXT, re.M)
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    assert read_hostfile(str(tmp_path / "hostfile")) == {"node1": 8, "node2": 8}


def test_the_flight_recorders_dumps_are_where_it_says():
    (said,) = re.findall(r"dump is `(/tmp/\w+)`", TEXT)
    command = ["bash", "-c", '. launchers/timeouts.sh; echo "$TORCH_FR_DUMP_TEMP_FILE $(id -un)"']
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_")}
    name, user = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True).stdout.split()
    assert f"{name}N" == said.replace("USER", user)
    # The names are PyTorch's own.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    assert subprocess.run(["grep", "-qc", "TORCH_FR_DUMP_TEMP_FILE", str(library)]).returncode == 0


def test_every_file_it_names_is_there():
    for name in re.findall(r"`((?:launchers|tests|docs)/[\w./]+)`", TEXT):
        assert (ROOT / name).exists(), name
