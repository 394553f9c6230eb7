"""One HTML file with everything in it: figures, tables, script; nothing is fetched, so it opens offline."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_cl.reports import style
from moe_cl.reports.style import Picture

HERE = Path(__file__).parent
LONG = 20  # letters of a word that may be broken, so that a narrow window does not cut it off


def escape(text: Any) -> str:
    """Text for inside HTML."""
    return html.escape(str(text), quote=True)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    classes: Sequence[str] = (),
    sort: bool = True,
    strong: Sequence[Sequence[bool]] = (),
) -> str:
    """A table that sorts. Cells: numbers (set right, floats with 4 digits), text, or (shown, value to sort by).

    ``classes``: a CSS class for each row. ``strong``: which cells are bold.
    """
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    mark = ' data-sort=""' if sort and len(rows) > 1 else ""
    head = "".join(
        f'<th scope="col"{mark}{" class=n" if right else ""}>{escape(name)}</th>'
        for name, right in zip(columns, numeric, strict=True)
    )
    body = []
    for i, row in enumerate(rows):
        bold = strong[i] if strong else [False] * len(row)
        cells = "".join(_cell(cell, right, b) for cell, right, b in zip(row, numeric, bold, strict=True))
        body.append(f"<tr{f' class={classes[i]}' if i < len(classes) and classes[i] else ''}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _is_number(cell: Any) -> bool:
    value = cell[1] if isinstance(cell, tuple) else cell
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(cell: Any, right: bool, bold: bool) -> str:
    shown, value = cell if isinstance(cell, tuple) else (cell, cell)
    if isinstance(shown, float):
        shown = f"{shown:.4f}" if abs(shown) < 10 else f"{shown:.1f}" if abs(shown) < 1e4 else f"{shown:,.0f}"
    elif isinstance(shown, int) and not isinstance(shown, bool):
        shown = f"{shown:,}"
    key = f' data-value="{escape(value)}"' if right and value is not None else ""
    long = any(len(word) > LONG for word in str(shown).split())
    kind = " ".join(["n"] * right + ["best"] * bold + ["long"] * long)
    return f'<td{key} class="{kind}">{escape("–" if shown is None else shown)}</td>'


def card(picture: Picture) -> str:
    """A figure with its title and what it says."""
    caption = f"<p>{escape(picture.caption)}</p>" if picture.caption else ""
    return (
        f'<figure class="card{" wide" if picture.wide else ""}" id="fig-{picture.name}">'
        f'<h3>{escape(picture.title)}</h3>{caption}<div class="frame">{picture.svg}</div></figure>'
    )


def grid(pictures: Sequence[Picture], boxes: Sequence[str] = (), kind: str = "grid") -> str:
    """Figures and other cards side by side as far as the window is wide; "" if there are none.

    ``kind``: ``grid`` in rows, ``masonry`` in columns (cards of very different heights).
    """
    inner = "".join([*(card(p) for p in pictures), *boxes])
    return f'<div class="{kind}">{inner}</div>' if inner else ""


def box(content: str) -> str:
    """Anything else in a card."""
    return f'<div class="card">{content}</div>'


def folded(summary: str, content: str) -> str:
    """Content that opens when its summary is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """What matters, large."""
    inner = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in values)
    return f'<div class="tiles">{inner}</div>'


def command(text: str) -> str:
    """A command line with a button that copies it."""
    return f'<div class="copy"><pre>{escape(text)}</pre><button data-copy type="button">copy</button></div>'


def page(
    title: str, subtitle: str, sections: Sequence[tuple[str, str, str]], pictures: Sequence[Picture], status: str = "",
    lead: str = "",
) -> str:  # fmt: skip
    """The whole page. ``sections``: (heading, what it is about, inner HTML), empty ones left out."""
    sections = [s for s in sections if s[2]]
    links = "".join(f'<a href="#{_anchor(h)}">{escape(h)}</a>' for h, _, _ in sections)
    body = "".join(
        f'<h2 id="{_anchor(h)}">{escape(h)}</h2><p>{escape(about)}</p>{inner}' for h, about, inner in sections
    )
    hover = json.dumps({p.name: p.hover for p in pictures if p.hover}, separators=(",", ":")).replace("<", "\\u003c")
    pill = f'<span class="pill {escape(status)}">{escape(status.lower())}</span>' if status else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><link rel="icon" href="data:,">
<style>{style.css()}
{(HERE / "page.css").read_text()}</style></head>
<body><header><div><div><h1>{escape(title)}{pill}</h1><p class="sub">{escape(subtitle)}</p></div>
<button id="theme" type="button" aria-label="change between light and dark">light / dark</button></div></header>
<nav><div>{links}</div></nav>
<main>{lead}{body}</main>
<footer>Made by <code>python -m moe_cl report</code>. Everything is in this file.</footer>
<script type="application/json" id="hover">{hover}</script>
<script>{(HERE / "page.js").read_text()}</script>
</body></html>
"""


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")
