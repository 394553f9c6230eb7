"""Agreement of ranks in one message, and what a non-finite loss leaves behind."""

import json

import pytest
import torch

from moe_cl.comm import LocalComm, SimComm
from moe_cl.engine.guard import Guard
from moe_cl.engine.health import NonFiniteLoss, agree
from tests.engine.runs import batch_of


def test_means_sums_and_stop():
    def rank(comm):
        metrics = {"a": torch.tensor(float(comm.rank)), "load": torch.tensor([1.0, comm.rank])}
        digest = torch.tensor([2**40 + comm.rank, 5])
        return agree(comm, torch.tensor(1.0), metrics, digest, 3, stop=comm.rank == 1)

    for agreed in SimComm.run(2, rank):
        assert agreed.metrics["a"] == 0.5 and agreed.metrics["load"].tolist() == [1.0, 0.5]
        assert agreed.digest.tolist() == [2**41 + 1, 10]
        assert agreed.stop


def test_every_rank_names_the_term():
    def rank(comm):
        nan = torch.tensor(float("nan")) if comm.rank else torch.tensor(0.5)
        with pytest.raises(NonFiniteLoss) as error:
            agree(comm, nan, {"loss/balance": nan, "loss/contrastive": torch.tensor(1.0)}, torch.zeros(2), 7)
        return str(error.value)

    first, second = SimComm.run(2, rank)
    assert "step 7: the loss is not finite on 1 of 2 ranks" in first
    assert first.endswith("over all ranks: loss/balance") and "all finite on this rank" in first
    assert "own: loss/balance" in second


def test_a_metric_alone_does_not_stop():
    agreed = agree(LocalComm(), torch.tensor(1.0), {"rank": torch.tensor(float("inf"))}, torch.zeros(2), 0)
    assert not agreed.stop


def test_what_explains_it_is_left_behind(tmp_path):
    student, batch = torch.nn.Linear(3, 2), batch_of(0, 1)
    with torch.no_grad():
        student.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteLoss), Guard(tmp_path, 0, 1) as guard:
        guard.watch(LocalComm(), None, student)
        guard.at(4, [batch])
        raise NonFiniteLoss("step 4: loss/balance")
    tree = json.loads((tmp_path / "nonfinite-step-4" / "rank-00000.json").read_text())
    assert tree["parameters_not_finite"] == ["weight"]
    assert tree["batches"][0]["positions"] == batch.positions.tolist()
    assert tree["batches"][0]["views"][0]["finite"] and "loss/balance" in tree["error"]
