"""The accuracy table: what is shown of measured cells, what is skipped on a second start, equal networks, and cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import _accuracy_table as page
from benchmarks import _cells, accuracy
from benchmarks._cells import METHODS, Budget, Cell
from benchmarks._flops import flops
from moe_cl import config, methods

MEASURES = ("knn", "linear", "4-shot/ridge", "10-shot/ridge")


def cell(knn, *rows):
    figures = {row: dict.fromkeys(MEASURES, knn if row == "trained" else 0.5) for row in ("trained", *rows)}
    return {"figures": figures, "health": {"feature_std": [0.5, 0.9]}, "images": 100, "seconds": 1.0}


CELLS = {
    "fashion-mnist/MoCo v3/0": cell(0.7, "untrained", "pixels"),
    "fashion-mnist/MoCo v3/1": cell(0.8, "untrained"),
    "fashion-mnist/CR-MoE/0": cell(0.4, "untrained"),
}
SIZES = {"fashion-mnist": {"train": 60000, "test": 10000, "classes": 10}}


def test_the_page():
    costs = {"fashion-mnist/MoCo v3": [2e8, 3e7]}
    text = page.write(Budget(), CELLS, SIZES, costs, " --seeds 2", ["MoCo v3", "CR-MoE"])
    assert "| MoCo v3 | 200 | 30.0 | 2 | 75.0 +- 7.1 |" in text and "| CR-MoE |  |  | 1 | 40.0 |" in text
    assert "| raw pixels |  |  | 1 | 50.0 |" in text and "| untrained V-MoE |  |  | 1 | 50.0 |" in text
    assert "above the untrained network's not of CR-MoE." in text and "0.5 -> 0.9" in text
    assert page.ratio(CELLS, "MoCo v3") == pytest.approx(1.5) and page.ratio(CELLS, "JCL") is None


def test_a_second_start_skips_what_is_there_and_another_budget_is_refused(tmp_path, capsys):
    args = accuracy.arguments(["--out", str(tmp_path), "--table", str(tmp_path / "a.md"), "--minutes", "0"])
    state = accuracy.State(args, Budget())
    state.body["cells"], state.body["sizes"] = dict(CELLS), SIZES
    state.save()
    again = accuracy.State(args, Budget())
    asked = [Cell("fashion-mnist", "MoCo v3", seed) for seed in (0, 1, 2)]
    assert accuracy.run_cells(again, asked, {"fashion-mnist": Path()}) == []
    told = capsys.readouterr().out
    assert "2 of 3 cells are there" in told and "goes on with 1 cells" in told
    assert "75.0 +- 7.1" in (tmp_path / "a.md").read_text()
    with pytest.raises(SystemExit, match="another budget"):
        accuracy.State(args, Budget(images=7))


@pytest.mark.parametrize("name", ["fashion-mnist", "openclipart"])
def test_the_networks_cost_the_same(name, monkeypatch):
    monkeypatch.setattr(_cells, "steps_per_epoch", lambda cfg: 10)
    costs = {}
    for method in METHODS:
        settings, cfg = _cells.resolve(Cell(name, method, 0), Budget(), Path("data") / name)
        assert cfg.moe.ep_size == 1 and cfg.schedule.epochs == pytest.approx(31.2)
        costs[method] = flops(cfg)
    forward = [view for _, view in costs.values()]
    assert max(forward) < 1.01 * min(forward)
    assert costs["EsViT"][0] > costs["MoCo v3"][0] > costs["MoCo v2"][0]


def test_a_method_of_the_table_is_a_recipe():
    for recipe, which in METHODS.values():
        cfg = config.load(recipe, [], methods.params_of)
        assert which == ("teacher" if cfg.method == "esvit" else "student")
