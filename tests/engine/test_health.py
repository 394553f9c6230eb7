"""Agreement of ranks in one message, and what a non-finite loss leaves behind."""

import json
from pathlib import Path

import pytest
import torch

from moe_cl.comm import LocalComm, SimComm
from moe_cl.engine.guard import Guard
from moe_cl.engine.health import NonFiniteLoss, agree
from tests.engine import tiny
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


def test_a_disk_that_refuses_hides_nothing(tmp_path):
    (tmp_path / "nonfinite-step-4").write_text("a file in the way")
    with pytest.raises(NonFiniteLoss) as caught, Guard(tmp_path, 0, 1) as guard:
        guard.watch(LocalComm(), None, torch.nn.Linear(3, 2))
        guard.at(4, [])
        raise NonFiniteLoss("step 4: loss/balance")
    assert "could not be written" in caught.value.__notes__[0]
    with Guard(tmp_path, 0, 1):  # the out dir's lock is free again
        pass


def explained(comm, out, stage):
    """What the ranks leave behind after a gradient that is not finite, and which parameters each rank holds."""
    run = tiny.build(comm, stage=stage, ep=0)
    with pytest.raises(NonFiniteLoss, match="norm.weight") as caught, Guard(out, comm.rank, comm.world) as guard:
        guard.watch(comm, run.engine, run.net)
        guard.at(0, [])
        loss = run.loss(0)
        run.net.norm.weight.register_hook(lambda grad: grad * float("inf"))
        run.engine.backward(loss)
        run.control()
    tree = json.loads((Path(out) / "nonfinite-step-0" / f"rank-{comm.rank:05d}.json").read_text())
    return tree["gradients_not_finite"], len(tree["largest_parameters"]), caught.value.__notes__


@pytest.mark.processes
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_that_are_not_finite_are_named_at_every_stage(pool, tmp_path, stage):
    """Where ZeRO has cut them up, by the ranks that hold them."""
    found = pool.run(2, explained, str(tmp_path), stage)
    assert {name for names, _, _ in found for name in names} == {"norm.weight"}
    assert all(count > 3 and "what explains it is in" in notes[0] for _, count, notes in found)
