"""Lines at the start of a run: what is allowed but seldom meant."""

from __future__ import annotations

import pytest

from moe_cl.comm import LocalComm
from moe_cl.engine import checks, setup
from moe_cl.engine.notes import notes
from tests.engine.runs import config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, []),
        ({"optim": "adamw", "batch": 4096}, []),
        ({"batch": 2048}, ["SGD at a global batch of 2048"]),
        ({"accumulation": 2}, ["with accumulation a sample's negatives are the 4 of its micro-batches, not all 8"]),
    ],
)
def test_of_any_method(tmp_path, change, says):
    cfg = config(tmp_path / "run", method="mocov3", **change)
    method, student, _ = setup.build_method(cfg, LocalComm(), None)
    found = notes(cfg, checks.batch_identity(cfg, 1), method, student, 10_000)
    assert len(found) == len(says) and all(map(str.startswith, found, says))
