"""A run's page from its journal: whole, self-contained, right in its figures; and several runs side by side."""

import argparse
import json
import re

import numpy as np
import pytest

from moe_cl.config import ConfigError
from moe_cl.reports import build, compare, curves, measures, page, router, style
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
    results = {r.name: r for r in compare.results(runs)}
    assert results["kNN, trained"].values == [0.8, 0.81] and results["kNN, trained"].best() == [False, True]
    assert results["steps"].values == [120.0, 90.0]
    with pytest.raises(ConfigError, match="twice"):
        compare.write([out, out])


def test_bold_is_only_what_can_be_compared(tmp_path):
    outs = [make_run(tmp_path / name, steps=60, seed=seed) for seed, name in enumerate("ab")]

    def bold(*changes):
        runs = [Run.load(out) for out in outs]
        for key, value in changes:
            section, _, name = key.rpartition(".")
            (runs[1].config[section] if section else runs[1].config)[name] = value
        return {r.name.split(",")[0] for r in compare.results(runs) if any(r.best())}

    every = {"kNN", "loss", "knn top1", "training seconds", "images per second", "data wait"}
    # The same accuracy in both; seconds of runs that are only written may be the same too.
    assert bold() >= every - {"knn top1", "training seconds"}
    assert "loss" not in bold(("method", "simclr")) and "kNN" in bold(("method", "simclr"))
    assert "loss" not in bold(("batch.global_batch", 512)) and "loss" in bold(("optim.base_lr", 2.0))
    assert "training seconds" not in bold(("batch.global_batch", 512))  # as many steps, twice the images
    assert "kNN" not in bold(("data.train", "other/train")) and "kNN" in bold(("data.train", "/x/shards/train"))
    other = Run.load(make_run(tmp_path / "c", steps=90))
    assert not any(next(r for r in compare.results([Run.load(outs[0]), other]) if "seconds" in r.name).best())


def test_units_of_evaluations(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for step in (1, 2):
        journal.step(step, {"loss": 1.0}, "x")
        journal.evaluation("detection", step, {"bbox/AP": 38.2 - 1 / step, "bbox/AP50": 59.0})
    found = {p.name: p for p in build.figures(Run.load(tmp_path))}
    assert [line["y"][0] for line in found["accuracy"].hover["lines"]] == [37.2, 59.0]
    assert "37.70%" in build.write(tmp_path).read_text()
    journal.evaluation("correspondence", 2, {"attention/block3/entropy_bits": 2.43, "accuracy": 0.5})
    assert ("correspondence accuracy, step 2", "50.00%") in build.headline(Run.load(tmp_path))
    assert ("correspondence attention/block3/entropy_bits, step 2", "2.43") in build.headline(Run.load(tmp_path))
    assert measures.shown("k10/top1", 0.8) == measures.shown("5-shot/ridge", 0.8) == "80.00%"
    keys = ("top1", "bbox/AP", "5-shot/ridge", "train_loss", "5-shot/ridge/interval", "similarity", "lr")
    assert [measures.better(key) for key in keys] == [1, 1, 1, -1, 0, 0, 0]


def test_counts_are_counts():
    y = np.array([3.0] * 40 + [1.0] * 10 + [0.0] * 950)
    drawn = curves.one(curves.Chart("dead", "D", "experts", counts=True), [("L0", Series(np.arange(1000), y))])[0]
    assert set(drawn.hover["lines"][0]["y"]) == {3.0, 1.0, 0.0}  # no ramp between them
    ticks = re.findall(r">([\d.]+)</text>", drawn.svg)
    assert ticks and not [t for t in ticks if "." in t]


def test_legends_fit_and_read_along_rows():
    for count, most in ((8, 12), (24, 12), (4, 2), (5, 3)):
        drawing, axes = style.figure(4.0, 2.4)
        handles = [
            axes.plot([0, 1], [0, i], label=f"{i}" if count > 5 else f"a longer name {i}")[0] for i in range(count)
        ]
        style.legend(drawing, handles, most, title="first expert", loc="outside lower center")
        drawing.draw_without_rendering()
        box = drawing.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= drawing.bbox.width, count
        tops = {t.get_text(): t.get_window_extent() for t in drawing.legends[0].get_texts()}
        order = sorted(tops, key=lambda name: (-round(tops[name].y0), tops[name].x0))
        assert order == [h.get_label() for h in handles]


def test_colours_of_experts_stand_out_on_both_grounds():
    def luminance(colour):
        c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    for ground in style._THEME["surface"]:
        for colour in style.EXPERTS:
            low, high = sorted((luminance(colour), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 3.0, (colour, ground)
    assert len(set(style.EXPERTS)) == 24 and not set(style.EXPERTS) & {light for light, _ in style._TOKENS.values()}


def test_layers_with_experts_are_explained(out, text):
    assert "L0 and L1: the layers with experts, in order from the input (blocks 1, 3 of the network" in text
    assert "memory (GiB)" in text and '<th scope="col" data-sort="">details</th>' in text


def test_labels_tell_runs_apart(tmp_path):
    assert compare.labels([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert compare.labels([tmp_path / "a" / "x", tmp_path / "b" / "y"]) == ["x", "y"]


@pytest.mark.parametrize("name", ["environment.json", "summary.json", "config.yaml"])
@pytest.mark.parametrize("text", ['{"a": "b', "[1]"])
def test_a_torn_file_is_one_line(tmp_path, name, text):
    Journal(tmp_path / "journal.jsonl").close()
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        getattr(Run.load(tmp_path), name.partition(".")[0])
    assert name in str(error.value) and "\n" not in str(error.value)


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
