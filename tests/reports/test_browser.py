"""The pages in headless Chromium, offline: no error on the console, figures there, tables sort, themes, a phone."""

import json

import numpy as np
import pytest

from moe_cl.reports import build, compare
from moe_cl.reports.run import Run
from tests import browser
from tests.browser import ARTIFACTS, chromium, screenshot
from tests.reports.made import make_run
from tests.reports.test_explain import MADE_OF, sparse  # noqa: F401 (a fixture)

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory, sparse):  # noqa: F811
    from moe_cl.reports import arrays

    folder = tmp_path_factory.mktemp("pages")
    out = make_run(folder / "crmoe", steps=300)
    found = sparse[1] | {"origin": np.array(json.dumps(MADE_OF | {"journal": Run.load(out).id}))}
    arrays.save(out / arrays.NAME, found)
    other = make_run(folder / "crmoe-lr", steps=300, lr=2e-3, seed=1)
    return build.write(out), compare.write([out, other])


@pytest.mark.parametrize(
    ("environment", "root", "outcome"),
    [
        ({"CI": "true"}, False, "Failed"),
        ({"MOE_CL_CI": "1"}, False, "Failed"),
        ({}, True, "Failed"),
        ({}, False, "Skipped"),
    ],
)
def test_ci_does_not_go_without_a_browser(monkeypatch, environment, root, outcome):
    for name in ("CI", "MOE_CL_CI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(browser, "find", lambda: None)
    monkeypatch.setattr(browser, "install", lambda: False)
    monkeypatch.setattr(browser.os, "geteuid", lambda: 0 if root else 1000)
    monkeypatch.setattr(browser.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(BaseException) as caught, chromium():  # pytest's outcomes are no Exceptions
        pass
    assert type(caught.value).__name__ == outcome and "chromium" in str(caught.value)


def console(page):
    return [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def shown(page):
    """Figures that take room on the page."""
    return page.execute_script(
        "return [...document.querySelectorAll('svg.plot')].filter(s => { const b = s.getBoundingClientRect();"
        " return b.width > 200 && b.height > 80; }).map(s => s.dataset.figure)"
    )


def color(page, selector, what="backgroundColor"):
    return page.execute_script(f"return getComputedStyle(document.querySelector('{selector}')).{what}")


def test_a_desktop(pages):
    with chromium(1280, 900) as page:
        page.get(pages[0].as_uri())
        figures = shown(page)
        assert {"loss", "expert_load", "patches_L1", "class_expert_L0", "pca", "attention"} <= set(figures)
        assert len(figures) == page.execute_script("return document.querySelectorAll('svg.plot').length")
        assert page.execute_script("return document.documentElement.scrollWidth") <= 1280
        # every chart of the journal has a legend or one line, and labels with units on both axes
        text = page.execute_script("return document.querySelector('[data-figure=throughput]').textContent")
        assert "images/s" in text and "step" in text
        # the pointer reads a chart
        tip = page.execute_script(
            "const s = document.querySelector('[data-figure=loss_parts]'); s.scrollIntoView({block: 'center'});"
            "const b = s.getBoundingClientRect();"
            "s.dispatchEvent(new PointerEvent('pointermove', {clientX: b.left + b.width / 2, clientY: b.top + 40}));"
            "return s.parentElement.querySelector('.tip').textContent"
        )
        assert tip.startswith("step 1") and "contrastive" in tip and "balance" in tip
        # tables sort, down and up
        for expected in ("300", "50"):
            first = page.execute_script(
                "const t = [...document.querySelectorAll('table')].find(t => t.tHead.textContent.includes('top5'));"
                "t.querySelectorAll('th')[0].click(); return t.tBodies[0].rows[0].cells[0].textContent"
            )
            assert first == expected
        # the theme changes, figures with it
        before = color(page, "body"), color(page, "[data-figure=loss] text", "fill")
        page.execute_script("document.getElementById('theme').click()")
        assert color(page, "body") != before[0] and color(page, "[data-figure=loss] text", "fill") != before[1]
        assert console(page) == []
        page.execute_script("document.getElementById('theme').click()")
        assert screenshot(page, "report-light").stat().st_size > 50_000


def test_dark_mode_follows_the_system(pages):
    with chromium(1280, 900, dark=True) as page:
        page.get(pages[0].as_uri())
        assert color(page, "body") == "rgb(13, 13, 13)" and console(page) == []
        screenshot(page, "report-dark")
    assert (ARTIFACTS / "report-dark.png").is_file()


def test_a_phone(pages):
    with chromium(390, 844, scale=2) as page:
        page.get(pages[0].as_uri())
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        sizes = page.execute_script(
            "return [...document.querySelectorAll('svg.plot text')].map(t => t.getBoundingClientRect().height)"
            ".filter(h => h > 0 && h < 60)"
        )
        assert len(sizes) > 300 and min(sizes) >= 9  # a line's height in CSS pixels: the smallest can be read
        cut = page.execute_script(
            "return [...document.querySelectorAll('#reproduce ~ .card td, #events ~ .card td')].filter(c => {"
            "const b = c.getBoundingClientRect(), w = c.closest('.card').getBoundingClientRect();"
            "return b.width > 0 && b.right > w.right + 1; }).map(c => c.textContent)"
        )
        assert cut == []  # the commit, the system: whole on the card
        assert console(page) == []
        screenshot(page, "report-phone")


def test_a_comparison(pages):
    with chromium(1280, 900) as page:
        page.get(pages[1].as_uri())
        marked = page.execute_script(
            "return [...document.querySelectorAll('#differences ~ .card tr.differs td:first-child')]"
            ".map(cell => cell.textContent)"
        )
        assert {"optim.base_lr", "seed"} == set(marked)
        assert {"loss", "load_entropy"} <= set(shown(page)) and console(page) == []
        screenshot(page, "report-comparison")
