"""A run's page from its journal: whole, self-contained, right in its figures; and several runs side by side."""

import argparse
import json
import re

import numpy as np
import pytest

from moe_cl.config import ConfigError
from moe_cl.reports import build, compare, curves, page, router, style
from moe_cl.reports.cli import add_arguments, main
from moe_cl.reports.run import Run, Series
from moe_cl.tracking.journal import Journal
from tests.reports.made import make_run


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "first", steps=120)


@pytest.fixture(scope="module")
def text(out):
    return build.write(out).read_text()


def test_page_has_every_section_and_nothing_from_outside(out, text):
    for heading in ("Evaluations", "Training", "Router", "Health", "Speed", "Reproduce", "Events", "Configuration"):
        assert f'<h2 id="{heading.lower()}">' in text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", text.replace("xlink:href", "x"))
    assert "@import" not in text and "url(http" not in text
    names = re.findall(r'data-figure="(\w+)"', text)
    assert len(names) == len(set(names)) == len(list((out / "figures").glob("*.png"))) > 15
    assert {"loss", "loss_parts", "expert_load", "dead", "router_agreement_cls", "throughput"} <= set(names)


def test_figures_follow_the_theme_and_the_png_does_not(text):
    for light, _ in style._TOKENS.values():
        assert light not in re.sub(r":root.*?\n", "", text), light
    assert "var(--s0)" in text and "DejaVu" not in text


def test_hover_data_is_what_the_journal_says(out, text):
    data = json.loads(re.search(r'id="hover">(.*?)</script>', text, re.S)[1])
    lr = data["lr"]["lines"][0]
    series = Run.load(out).series["lr"]
    assert lr["x"] == series.x.tolist() and np.allclose(lr["y"], series.y, rtol=1e-4)
    assert data["throughput"]["unit"] == "images/s"


def test_text_of_a_run_cannot_become_markup(tmp_path):
    out = tmp_path / "<b>x"
    journal = Journal(out / "journal.jsonl")
    journal.step(1, {"loss": 1.0}, "x")
    journal.event("</script><script>alert(1)</script>", step=1, text="<img src=x>")
    journal.close()
    text = build.write(out).read_text()
    assert "<script>alert" not in text and "<img src=x>" not in text and "<b>x" not in text


def test_a_run_that_has_just_begun_and_one_without_numbers(tmp_path):
    journal = Journal(tmp_path / "a" / "journal.jsonl")
    journal.step(1, {"loss": float("nan"), "moe/L0/load": [0.5, 0.5]}, "x")
    text = build.write(tmp_path / "a").read_text()
    assert "running" in text and "not finite" in text
    Journal(tmp_path / "b" / "journal.jsonl").close("FAILED")
    assert "failed" in build.write(tmp_path / "b").read_text()
    with pytest.raises(ConfigError, match="no journal.jsonl"):
        build.write(tmp_path / "c")


def test_comparison_marks_what_differs(out, tmp_path):
    other = make_run(tmp_path / "second", steps=90, lr=2e-3, seed=1)
    runs = [Run.load(out), Run.load(other)]
    differing = {key for key, _, different in compare.settings(runs) if different}
    assert differing == {"optim.base_lr", "seed"}
    text = compare.write([out, other], tmp_path / "both.html").read_text()
    assert text.count("class=differs") == 4 and "first and second" in text
    assert len(list((tmp_path / "both_figures").glob("*.png"))) > 10
    results = compare.results(runs)
    assert results["kNN, trained"] == [0.8, 0.81] and results["steps"] == [120.0, 90.0]
    with pytest.raises(ConfigError, match="twice"):
        compare.write([out, out])


def test_labels_tell_runs_apart(tmp_path):
    assert compare.labels([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert compare.labels([tmp_path / "a" / "x", tmp_path / "b" / "y"]) == ["x", "y"]


def test_command_line(tmp_path, capsys):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.step(1, {"loss": 1.0}, "x")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert main(parser.parse_args([str(tmp_path), "--no-track"])) == 0
    captured = capsys.readouterr()
    assert "report.html" in captured.out and "figures of the encoder are left out" in captured.err


def test_table_sorts_by_value_and_shows_what_is_missing():
    html = page.table(["name", "top-1"], [["a", ("81.00%", 0.81)], ["b", None]])
    assert 'data-value="0.81"' in html and "81.00%" in html and "–" in html and html.count("data-sort") == 2


def test_evenness_and_thinning():
    assert router.evenness(np.array([[0.25] * 4, [1.0, 0, 0, 0]])) == pytest.approx([1.0, 0.0])
    x, y = style.thin(np.arange(10_000), np.arange(10_000.0))
    assert len(x) == 400 and abs(np.diff(y) - 25).max() < 1e-9
    few = curves.one(curves.Chart("c", "C", "u"), [("a", Series(np.array([3]), np.array([1.0])))])
    assert len(few) == 1 and curves.one(curves.Chart("c", "C", "u"), []) == []
    smooth = curves.running_mean(np.array([1.0, np.nan, 3.0] * 50))
    assert np.isfinite(smooth).all() and abs(smooth.mean() - 2) < 0.1
@pytest.mark.parametrize("name", ["environment.json", "summary.json", "config.yaml"])
@pytest.mark.parametrize("text", ['{"a": "b', "[1]"])
def test_a_torn_file_is_one_line(tmp_path, name, text):
    Journal(tmp_path / "journal.jsonl").close()
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        getattr(Run.load(tmp_path), name.partition(".")[0])
    assert name in str(error.value) and "\n" not in str(error.value)


