"""Who a process is among the ranks, which of them speaks, and which cores are its own."""

import socket

import pytest
import torch

from moe_cl import cli
from moe_cl.comm import LocalComm
from moe_cl.config import ConfigError
from moe_cl.engine import ranks as engine_ranks
from moe_cl.engine.ranks import from_environment
from tests.small import only_launcher

SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"RANK": "first", "WORLD_SIZE": "2"}, "^RANK='first' must be a whole number of at least 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "^RANK='-1' must be"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "^WORLD_SIZE='0' must be a whole number of at least 1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "^LOCAL_RANK='x' must be"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "^RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "^LOCAL_RANK=2 must be below"),
        ({"RANK": "3"}, "^RANK=3 is set and WORLD_SIZE is not: set both, or neither"),
        ({"WORLD_SIZE": "2"}, "^WORLD_SIZE=2 is set and RANK is not"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}, "^SLURM_PROCID=1 is set and SLURM_NTASKS is not"),
    ],
)
def test_ranks_that_cannot_be_are_one_line(given, says, monkeypatch):
    only_launcher(given, monkeypatch)
    with pytest.raises(ConfigError, match=says):
        from_environment()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, True),
        ({"RANK": "1", "WORLD_SIZE": "4"}, False),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, True),
        ({**SRUN, "SLURM_STEP_ID": "0"}, False),
        ({**SRUN, "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0"}, True),
        (SRUN, True),
        (OPEN_MPI, False),
        ({"RANK": "3"}, True),  # half a set is what there is to say
    ],
)
def test_one_rank_of_a_host_speaks(given, says, monkeypatch, capsys):
    only_launcher(given, monkeypatch)
    for verb, line in (("pretrain", says), ("doctor", True), ("plan", True)):
        with pytest.raises(SystemExit, match="2"):
            cli.main([verb, "--no-such-option"])
        assert bool(capsys.readouterr().err) == line, verb
    assert cli.main(["doctor", "--hostfile", "/no/such/file"]) == 2
    assert "hostfile /no/such/file: No such file" in capsys.readouterr().err
    assert cli.main(["pretrain", "--recipe", "no_such_recipe"]) == 2
    assert bool(capsys.readouterr().err) == says


@pytest.mark.parametrize(
    ("given", "check", "says"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4"}, [], ""),  # what all ranks see is said by one
        ({"RANK": "1", "WORLD_SIZE": "4"}, ["--check", "2"], "does not divide"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, ["--check=many"], "a whole number of at least 1 is needed"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, [], "RANK=2 must be below"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, [], "RANK='first' must be"),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, [], "LOCAL_RANK=2 must be"),
    ],
)
def test_what_one_rank_alone_sees_it_says(given, check, says, monkeypatch, capsys):
    """Else it ends without a word, and the others wait for it."""
    only_launcher(given, monkeypatch)
    recipe = ["--recipe", "crmoe_vit_micro_fmnist", "moe.ep_size=3"]
    try:
        code = cli.main(["pretrain", *recipe, *check])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == bool(says) and says in said


def test_who_speaks_is_settled_before_the_ranks_meet(monkeypatch, capsys):
    """Slurm's --gpus-per-task=1: to every rank of a host its device is number 0."""
    only_launcher({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, monkeypatch)

    def fails(args):
        monkeypatch.setenv("LOCAL_RANK", "0")
        raise ConfigError("all ranks see this")

    monkeypatch.setattr(cli, "main_pretrain", fails)
    assert cli.main(["pretrain", "--recipe", "crmoe_vit_micro_fmnist"]) == 2
    assert capsys.readouterr().err == ""


def test_cores_of_a_ranks_own_are_not_divided_again(monkeypatch):
    """12 cores each, as srun binds them; 12 cores for two ranks; two of these hosts; a number that was asked for."""
    mine, theirs = list(range(12)), list(range(12, 24))
    here, there, before = socket.gethostname(), "another", torch.get_num_threads()

    class Ranks(LocalComm):
        others = ()

        def gather_objects(self, value):
            return [value, *self.others]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(engine_ranks, "_cores", lambda: mine)
    try:
        torch.set_num_threads(12)
        for others, expected in (([], 12), ([(here, theirs)], 12), ([(here, mine)], 6), ([(there, mine)], 12),
                                 ([(here, mine)] * 23, 1)):  # fmt: skip
            comm = Ranks()
            comm.others = others
            assert engine_ranks.threads(comm) == expected
        monkeypatch.setenv("OMP_NUM_THREADS", "12")
        assert engine_ranks.threads(Ranks()) == 12
    finally:
        torch.set_num_threads(before)
