"""The screenshots of ``docs/tracking.md``: ``python -m tests.reports.shots REPORT.html COMPARISON.html FOLDER``."""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path

from PIL import Image

from tests.browser import chromium

# bottom of the first COUNT cards (all without COUNT) of the section under the heading #ID, and the heading's top
_RANGE = """
const head = document.getElementById(arguments[0]), next = [...document.querySelectorAll('h2')];
const end = next[next.indexOf(head) + 1];
let cards = [...document.querySelectorAll('.card')].filter(c =>
  (head.compareDocumentPosition(c) & 4) && (!end || (end.compareDocumentPosition(c) & 2)));
if (arguments[1]) cards = cards.slice(0, arguments[1]);
const bottom = Math.max(...cards.map(c => c.getBoundingClientRect().bottom));
return [head.getBoundingClientRect().top + scrollY, bottom + scrollY];
"""


def shot(page, folder: Path, name: str, first: str | None, last: str, cards: int = 0, width: int = 1000) -> None:
    """From the heading ``first`` (None: the page's top) to the end of the first ``cards`` cards under ``last``."""
    top = page.execute_script(_RANGE, first, 0)[0] - 14 if first else 0
    bottom = page.execute_script(_RANGE, last, cards)[1] + 14
    clip = {"x": 0, "y": top, "width": width, "height": bottom - top, "scale": 1}
    options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    data = page.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
    image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    image.save(folder / f"{name}.jpg", quality=82, optimize=True)
    print(name, image.size)


def main(report: Path, comparison: Path, folder: Path) -> None:
    """Whole cards only."""
    for path, width, options, wanted in (
        (report, 1000, {}, [("report-top", None, "training", 2), ("report-router", "router", "router", 6)]),
        (report, 1280, {}, [("report-patches", "router,-looked-into", "router,-looked-into", 0)]),
        (report, 1280, {"dark": True}, [("report-embeddings", "embeddings", "embeddings", 0)]),
        (report, 390, {}, [("report-phone", None, "training", 1)]),
        (comparison, 1000, {}, [("report-comparison", None, "training", 2)]),
    ):
        with chromium(width, 900, **options) as page:
            page.get(path.resolve().as_uri())
            time.sleep(1)
            # the bar of links follows a reader who scrolls; in a picture it would cover what it stands over
            page.execute_script("document.querySelector('nav').style.position = 'static'")
            for name, first, last, cards in wanted:
                shot(page, folder, name, first, last, cards, width)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
