"""The lambda search, the metrics, and few-shot draws on planted data with known answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.cli import main
from moe_cl.comm import SimComm
from moe_cl.config import ConfigError
from moe_cl.evals.fewshot import draw, few_shot, interval, ridge
from moe_cl.evals.logistic import GRID, fit, logistic, search
from moe_cl.evals.metrics import average_precision_11, map11, metric, per_class
from tests.evals.run_dir import make_dtd, make_images, make_run
from tests.evals.test_knn_linear import lopsided, planted


@given(st.integers(0, 96))
def test_search_finds_the_peak_of_a_hill_in_fifteen_fits(peak):
    seen = []

    def score(penalty):
        index = int(round(np.log10(penalty) * 8)) + 48
        seen.append(index)
        return -abs(index - peak)

    best, scores = search(score)
    assert best == GRID[peak]
    assert len(seen) == len(set(seen)) == len(scores) <= 15


def test_ties_go_to_the_larger_lambda():
    assert search(lambda penalty: 1.0)[0] == GRID[96]
    assert (
        GRID[0] == pytest.approx(1e-6)
        and GRID[96] == pytest.approx(1e6)
        and GRID[1] / GRID[0] == pytest.approx(10**0.125)
    )


def test_logistic_on_separable_and_on_noisy_classes():
    x, y = planted(200)
    tx, ty = planted(100, seed=1)
    out = logistic(x, y, tx, ty)
    assert out["accuracy"] == 1.0 and len(out["fits"]) <= 15
    x, y = planted(200, noise=6.0)
    tx, ty = planted(400, noise=6.0, seed=1)
    searched = logistic(x, y, tx, ty)
    weak = metric("accuracy", fit(x.double().numpy(), y.numpy(), 1e6)(tx.double().numpy()), ty.numpy())
    assert searched["accuracy"] >= weak - 0.05 and 1e-6 <= searched["lambda"] <= 1e6
    given_split = logistic(x[:100], y[:100], tx, ty, validation=(x[100:], y[100:]), name="per_class")
    assert 0 < given_split["per_class"] <= 1


def test_several_labels_an_image():
    g = np.random.default_rng(0)
    x = g.normal(size=(200, 6))
    marks = (x[:, :3] > 0).astype(int)
    marks[:5, 0] = -1  # difficult: neither trained on nor scored
    out = logistic(torch.from_numpy(x[:150]), torch.from_numpy(marks[:150]), torch.from_numpy(x[150:]),
                   torch.from_numpy(marks[150:]), name="map11")  # fmt: skip
    assert out["map11"] > 0.98
    with pytest.raises(ConfigError, match="map11"):
        metric("accuracy", x[:, :3], marks)


def test_metrics_of_known_answers():
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    assert per_class(scores, np.array([0, 0, 0, 0])) == 0.75
    assert per_class(scores, np.array([0, 0, 1, 1])) == 0.75  # (1 + .5) / 2
    # right at ranks 1 and 3: precision 1 up to recall .5 (6 of 11 points), 2/3 beyond
    ap = average_precision_11(np.array([4.0, 3.0, 2.0, 1.0]), np.array([1, 0, 1, 0]))
    assert ap == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert map11(np.array([[1.0], [0.5]]), np.array([[1], [-1]])) == 1.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 5))
def test_draws_are_nested_and_balanced(seed, few, more):
    y = torch.arange(40) % 4
    small, large = draw(y, few, seed), draw(y, few + more, seed)
    assert set(small.tolist()) <= set(large.tolist())
    assert torch.equal(y[large].bincount(), torch.full((4,), few + more))
    assert len(set(large.tolist())) == len(large)


def test_leave_one_out_is_exact():
    """The closed form's chosen penalty is the one that refitting without each image chooses."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))
    from moe_cl.evals.fewshot import PENALTIES

    _, chosen = ridge(x, y, x, 3)
    scale = float(torch.linalg.eigvalsh((x - x.mean(0)) @ (x - x.mean(0)).T).mean())

    def error(penalty):
        total = 0.0
        for i in range(12):
            keep = torch.arange(12) != i
            a, b = x[keep], torch.nn.functional.one_hot(y, 3).double()[keep]
            am, bm = a.mean(0), b.mean(0)
            w = torch.linalg.solve(
                (a - am).T @ (a - am) + penalty * scale * torch.eye(4).double(), (a - am).T @ (b - bm)
            )
            total += float(((x[i] - am) @ w + bm - torch.nn.functional.one_hot(y, 3)[i]).square().sum())
        return total

    assert min(PENALTIES, key=error) == chosen


def test_few_shot_learns_and_does_not_depend_on_ranks():
    x, y = planted(200)
    tx, ty = planted(100, seed=1)
    want = few_shot(x, y, tx, ty, shots=(2, 5), seeds=3)
    assert set(want) == {"2-shot/ridge", "2-shot/logistic", "5-shot/ridge", "5-shot/logistic"}
    assert min(min(v) for v in want.values()) > 0.9
    for got in SimComm.run(2, lambda c: few_shot(x, y, tx, ty, shots=(2, 5), seeds=3, comm=c)):
        assert got == want
    with pytest.raises(ConfigError, match="500 shots"):
        few_shot(x, y, tx, ty, shots=(500,))


def test_few_shot_counts_small_classes_as_much_as_large_ones():
    for got in SimComm.run(2, lambda c: few_shot(*lopsided(), shots=(5,), seeds=2, comm=c, name="per_class")):
        for method in ("ridge", "logistic"):
            assert got[f"5-shot/{method}"] == pytest.approx([0.8, 0.8])
            assert got[f"5-shot/{method}/per_class"] == pytest.approx([2 / 3, 2 / 3])


def test_interval():
    mean, half = interval([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6) and half == pytest.approx(4.302653 * 0.1 / 3**0.5)


def test_lambda_is_chosen_on_the_official_validation_part(tmp_path, monkeypatch):
    """DTD's own val where it is DTD; any set by --val."""
    from moe_cl.evals import logistic as module

    seen = []
    whole = module.logistic
    monkeypatch.setattr(module, "logistic", lambda *a, **k: seen.append((len(a[0]), k["validation"])) or whole(*a, **k))
    out, images = tmp_path / "out", make_images(tmp_path / "images")
    make_run(out, images)
    make_dtd(tmp_path / "data" / "dtd" / "dtd", images)
    dtd, command = f"torchvision:DTD:{tmp_path / 'data'}", ["eval", "logistic", "--checkpoint", str(out)]
    assert main([*command, "--iterations", "5", "--train", dtd, "--test", dtd]) == 0
    setting = json.loads((out / "evals" / "logistic.json").read_text())["setting"]
    assert setting["train"] == dtd.replace("DTD", "DTD@train") and setting["val"] == dtd.replace("DTD", "DTD@val")
    assert main([*command, "--iterations", "5", "--val", f"folder:{images / 'test'}"]) == 0
    assert [(n, len(val[1])) for n, val in seen] == [(12, 12), (36, 18)]


def test_commands(tmp_path):
    out = tmp_path / "out"
    make_run(out, make_images(tmp_path / "images"))
    assert main(["eval", "logistic", "--checkpoint", str(out), "--iterations", "50"]) == 0
    assert main(["eval", "fewshot", "--checkpoint", str(out), "--shots", "2", "--seeds", "2"]) == 0
    found = json.loads((out / "evals" / "logistic.json").read_text())
    assert found["values"]["accuracy"] > 0.9 and len(found["fits"]) <= 15
    found = json.loads((out / "evals" / "fewshot.json").read_text())
    assert len(found["draws"]["2-shot/ridge"]) == 2 and found["values"]["2-shot/ridge"] > 0.6
