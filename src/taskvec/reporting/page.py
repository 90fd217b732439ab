"""The page of a report: one HTML file with its data, its script and the chart library inside.

Nothing is loaded from elsewhere, and a content policy forbids it. Names from users reach the page
as escaped text, or inside JSON in which `<`, `>` and `&` are written as escapes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, singledispatch
from html import escape
from importlib.resources import files
from typing import Any

from taskvec.extras import require
from taskvec.reporting.charts import theme
from taskvec.reporting.document import ReportData
from taskvec.reporting.sections import (
    Charts,
    Chips,
    Code,
    Live,
    ReportSection,
    TableBlock,
    Words,
)

# The charts' expressions are compiled in the page.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src data: blob:; base-uri 'none'; form-action 'none'"
)
LICENSE = "vega, vega-lite and vega-embed: (c) University of Washington Interactive Data Lab, BSD-3"


def page(
    document: ReportData, sections: Sequence[ReportSection], refreshes: float | None = None
) -> str:
    """The HTML of a report.

    Args:
        document: Embedded whole.
        sections: What is shown.
        refreshes: Seconds after which it loads itself again; None: never.

    Raises:
        MissingExtraError: vl-convert is not installed.
    """
    specs: list[Any] = []
    body = "".join(_section(section, specs) for section in sections)
    drawn = {"config": theme("currentColor"), "specs": specs}
    links = "".join(f'<a href="#{s.id}">{escape(s.title)}</a>' for s in sections)
    again = f'<meta http-equiv="refresh" content="{refreshes:g}">\n' if refreshes else ""
    title = escape(f"{document.title}: taskvec report")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
{again}<title>{title}</title>
<style>{_file("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{escape(document.title)}</h1>
<p>taskvec {escape(document.version)}
<button type="button" id="download-data">Download the data (JSON)</button></p>
<nav aria-label="Sections">{links}</nav>
</header>
<main id="main">{body}</main>
<noscript><p>Charts need JavaScript; words and tables do not.</p></noscript>
<script type="application/json" id="document">{_embedded(document.model_dump_json())}</script>
<script type="application/json" id="specs">{_embedded(_json(drawn))}</script>
<script>/* {LICENSE} */
(() => {{ {_library()} }})();</script>
<script>{_file("layers.js")}</script>
<script>{_file("page.js")}</script>
</body>
</html>
"""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _embedded(text: str) -> str:
    r"""JSON in a script element, which no text in it can end.

    >>> _embedded('"</script>"')
    '"\\u003c/script\\u003e"'
    """
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _file(name: str) -> str:
    return (files("taskvec.reporting") / "assets" / name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    code: str = require("vl_convert", "report").javascript_bundle()
    # No text of the bundle may end the element that it stands in.
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _section(section: ReportSection, specs: list[Any]) -> str:
    blocks = "".join(_block(block, specs) for block in section.blocks)
    return (
        f'<section id="{section.id}" aria-labelledby="{section.id}-title">'
        f'<h2 id="{section.id}-title">{escape(section.title)}</h2>{blocks}</section>'
    )


@singledispatch
def _block(block: Any, specs: list[Any]) -> str:
    raise TypeError(type(block).__name__)


@_block.register
def _(block: Words, specs: list[Any]) -> str:
    return f"<p{' class=lead' if block.is_lead else ''}>{escape(block.text)}</p>"


@_block.register
def _(block: Chips, specs: list[Any]) -> str:
    chips = "".join(
        f'<li><a class="chip" href="#{chip.place}">{escape(chip.text)}</a></li>'
        for chip in block.chips
    )
    return f'<ul class="chips" aria-label="Warnings">{chips}</ul>'


@_block.register
def _(block: Code, specs: list[Any]) -> str:
    code = (
        f'<div class="code"><button type="button" class="copy">Copy</button>'
        f"<pre tabindex=0>{escape(block.text)}</pre></div>"
    )
    title = escape(block.title)
    if block.is_long:
        return f"<details><summary>{title}</summary>{code}</details>"
    return f'<p class="label">{title}</p>{code}'


@_block.register
def _(block: Charts, specs: list[Any]) -> str:
    panels = []
    for chart in block.charts:
        about = f"<figcaption>{escape(chart.about)}</figcaption>" if chart.about else ""
        wide = " wide" if "usermeta" in chart.spec else ""
        panels.append(
            f'<figure class="panel{wide}"><h3>{escape(chart.title)}</h3>'
            f'<div class="chart" data-spec="{len(specs)}" role="img" '
            f'aria-label="{escape(chart.title)}"></div>{about}</figure>'
        )
        specs.append(chart.spec)
    return f'<div class="panels">{"".join(panels)}</div>'


@_block.register
def _(block: TableBlock, specs: list[Any]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in block.head)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in block.rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(block.title)}">'
        f"<table><caption>{escape(block.title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if isinstance(value, (int, float)):
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        return f'<td class="number">{text}</td>'
    return f"<td>{escape('–' if value is None else str(value))}</td>"


@_block.register
def _(block: Live, specs: list[Any]) -> str:
    places = {name: len(specs) + i for i, name in enumerate(block.specs)}
    specs += block.specs.values()
    specs.append({**block.config, "specs": places})
    return f'<div class="live" data-live="{block.kind}" data-config="{len(specs) - 1}"></div>'
