"""The golden files pass; a wrong value, an array nobody compares and an unknown file do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conformance.__main__ import main
from tests.conformance.checks import CHECKS
from tests.conformance.given import ranks_of
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


@pytest.mark.parametrize("name", ["moco_simclr_ntxent", "moco_v12_loss", "jcl_2proc", "crmoe_moco", "crmoe_sched"])
def test_every_array_counts(tmp_path, name):
    """One entry of each array in turn, off by a hundredth of the largest."""
    with np.load(GOLDEN / f"{name}.npz") as z:
        arrays = dict(z)
    unnoticed = []
    for key, value in arrays.items():
        wrong = value.astype(float).reshape(-1)
        wrong[wrong.size // 2] += max(1 if value.dtype.kind == "i" else 0.01 * np.abs(wrong).max(), 1e-2)
        np.savez(tmp_path / f"{name}.npz", **{**arrays, key: wrong.reshape(value.shape).astype(value.dtype)})
        if all(r.ok for r in run(tmp_path, CHECKS)):
            unnoticed.append(key)
    assert not unnoticed


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("moco_simclr_ntxent", "extra"),
        ("moco_v3_loss", "world1/rank0/T0.2/grad_k1"),
        ("moco_lars", "r50/p1_norms"),
        ("crmoe_moelayer", "train1_grad_noise"),
    ],
)
def test_an_array_nobody_compares_fails(tmp_path, name, extra):
    change(tmp_path, name, **{extra: np.zeros(3)})
    assert [r.case for r in run(tmp_path, CHECKS) if not r.ok] == [extra]


def test_a_missing_array_fails(tmp_path):
    with np.load(GOLDEN / "moco_simclr_ntxent.npz") as z:
        arrays = {k: v for k, v in dict(z).items() if k != "T0.5/grad_z0"}
    np.savez(tmp_path / "moco_simclr_ntxent.npz", **arrays)
    (failed,) = {r.note.strip().split("\n")[-1] for r in run(tmp_path, CHECKS) if r.note.startswith("Traceback")}
    assert failed == "KeyError: 'T0.5/grad_z0'"


def test_variants_run_by_their_arrays_whatever_their_name_and_folder(tmp_path):
    (tmp_path / "more").mkdir()
    names = {"jcl_4proc": "jcl_2proc", "moco_v3_loss_b": "moco_v3_loss", "more/another": "moco_simclr_ntxent"}
    for new, old in names.items():
        shutil.copy(GOLDEN / f"{old}.npz", tmp_path / f"{new}.npz")
    rows = run(tmp_path, CHECKS)
    assert {r.file for r in rows} == set(names) and all(r.ok for r in rows)


def test_what_no_check_knows_fails(tmp_path):
    np.savez(tmp_path / "a_new_method.npz", loss=np.zeros(2))
    np.save(tmp_path / "loose.npy", np.zeros(2))
    (tmp_path / "moco_lars.npz").write_bytes(b"torn")
    (tmp_path / "README.md").write_text("where these are from")
    rows = {r.file: r for r in run(tmp_path, CHECKS)}
    assert rows["README"].ok and "text" in rows.pop("README").note
    assert not any(r.ok for r in rows.values())
    assert "no check" in rows["a_new_method"].note and "neither" in rows["loose"].note
    assert "cannot be read" in rows["moco_lars"].note


def moe_layer(experts: int, k: int) -> dict[str, np.ndarray]:
    """A file of an MoE layer in evaluation, computed densely: every expert on every token."""
    import torch

    torch.manual_seed(experts)
    dim, hidden = 6, 10
    x, r, gate = torch.randn(2, 7, dim), torch.randn(2, 7, dim), torch.randn(dim, experts)
    shapes = {
        "htoh4_weight": (hidden, dim),
        "htoh4_bias": (hidden,),
        "h4toh_weight": (dim, hidden),
        "h4toh_bias": (dim,),
    }
    leaves = {"x": x, "w_gate": gate, **{n: torch.randn(experts, *s) / 3 for n, s in shapes.items()}}
    p = {n: v.double().requires_grad_() for n, v in leaves.items()}
    scores = (p["x"] @ p["w_gate"]).softmax(-1)
    weights, index = scores.topk(k)
    inner = torch.einsum("btd,ehd->bteh", p["x"], p["htoh4_weight"]) + p["htoh4_bias"]
    each = torch.einsum("bteh,edh->bted", torch.nn.functional.gelu(inner), p["h4toh_weight"]) + p["h4toh_bias"]
    y = (torch.zeros_like(scores).scatter(-1, index, weights)[..., None] * each).sum(2)
    (y * r).sum().backward()
    arrays = {"r": r, "eval_y": y.detach(), **leaves, **{f"eval_grad_{n}": v.grad for n, v in p.items()}}
    return {n: v.float().numpy() for n, v in arrays.items()}


@pytest.mark.parametrize(("experts", "k"), [(5, 3), (4, 1), (6, 2)])
def test_experts_and_choices_come_from_the_file(tmp_path, experts, k):
    """Five experts are dealt over five ranks, and how many a token has is found: no array says it."""
    np.savez(tmp_path / "crmoe_moelayer.npz", **moe_layer(experts, k))
    rows = run(tmp_path, CHECKS)
    assert all(r.ok for r in rows) and f"top_k {k} fits" in rows[0].note
    assert any(f"{ranks_of(experts)} ranks" in r.case for r in rows)


def test_rows_are_dealt_evenly():
    assert [ranks_of(n) for n in (1, 5, 6, 9, 17)] == [1, 5, 2, 3, 1]


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
