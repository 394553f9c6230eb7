"""The golden files pass; a wrong value, an array nobody compares and an unknown file do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conformance.__main__ import main
from tests.conformance.checks import CHECKS
from tests.conformance.harness import run

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(p.stem for p in GOLDEN.iterdir() if p.suffix in (".npz", ".json"))


@pytest.mark.parametrize("name", FILES)
def test_golden(name):
    rows = run(GOLDEN, CHECKS, name)
    assert rows and not [r for r in rows if not r.ok]


def change(folder: Path, name: str, **arrays: np.ndarray) -> None:
    with np.load(GOLDEN / f"{name}.npz") as z:
        np.savez(folder / f"{name}.npz", **{**dict(z), **arrays})


def test_a_wrong_value_fails(tmp_path, capsys):
    loss = np.load(GOLDEN / "moco_v3_loss.npz")["world2/rank1/T0.2/loss"]
    change(tmp_path, "moco_v3_loss", **{"world2/rank1/T0.2/loss": loss * (1 + 1e-7)})
    assert main(["--golden", str(tmp_path)]) == 1
    out = capsys.readouterr().out.strip().split("\n")
    failed = [line for line in out if "FAIL" in line]
    assert len(failed) == 1 and "rank1" in failed[0] and out[-1] == f"{len(out) - 2} passed, 1 failed"


def test_an_array_nobody_compares_fails(tmp_path):
    change(tmp_path, "moco_simclr_ntxent", extra=np.zeros(3))
    assert [r.case for r in run(tmp_path, CHECKS) if not r.ok] == ["extra"]


def test_a_missing_array_and_an_unknown_file_fail(tmp_path):
    with np.load(GOLDEN / "moco_simclr_ntxent.npz") as z:
        np.savez(tmp_path / "moco_simclr_ntxent.npz", **{k: v for k, v in dict(z).items() if "grad_z0" not in k})
    shutil.copy(GOLDEN / "moco_simclr_ntxent.npz", tmp_path / "a_new_method.npz")
    notes = {(r.file, r.case): r.note for r in run(tmp_path, CHECKS) if not r.ok}
    assert "KeyError" in notes["moco_simclr_ntxent", "-"] and "no check" in notes["a_new_method", "-"]


def test_other_shapes_of_the_same_form(tmp_path):
    """Sizes come from the file: NT-Xent of another batch, width and temperature."""
    import torch

    from moe_cl.comm import LocalComm
    from moe_cl.losses.ntxent import ntxent

    z0, z1 = torch.randn(2, 5, 7, dtype=torch.float64).unbind()
    leaves = z0.clone().requires_grad_(), z1.clone().requires_grad_()
    loss = ntxent(*leaves, 0.3, LocalComm()).loss
    loss.backward()
    arrays = {"N": 5, "C": 7, "z0": z0, "z1": z1, "T0.3/loss": loss.detach(), "T0.3/grad_z0": leaves[0].grad,
              "T0.3/grad_z1": leaves[1].grad}  # fmt: skip
    np.savez(tmp_path / "moco_simclr_ntxent.npz", **arrays)
    assert all(r.ok for r in run(tmp_path, CHECKS))


def test_only(capsys):
    assert main(["--golden", str(GOLDEN), "--only", "moco_lars/nowd*"]) == 0
    rows = capsys.readouterr().out.strip().split("\n")[:-1]
    assert rows and all(line.startswith("moco_lars") and " nowd" in line for line in rows)


def test_nothing_to_run(tmp_path):
    assert main(["--golden", str(tmp_path)]) == 1
    with pytest.raises(SystemExit):
        main(["--golden", str(tmp_path / "absent")])
