"""The page as a document of blocks, and the one HTML file that it becomes.

No request leaves the page: library, style and data are in the file, and its Content-Security-Policy lets only the one
script run whose digest it names. What a run says is text or JSON there, never markup.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from analysis.report.html import digest, escape, inline, script, script_json
from analysis.report.vega import Chart, Key
from analysis.writing.document import Block, Bullets, Document, Heading, Paragraph, Part, Table

MOST_CODE = 60_000
"""Characters of one block of code: of a longer one the beginning."""
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
"""
_FOOT = """
</main>
<noscript><p class="caution">The charts need JavaScript; the same curves are in plots/*.svg.</p></noscript>
<script>{code}</script>
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class Code(Block):
    """Words of the run as they are: a command line, a log, a configuration; folded under a heading where it has one."""

    words: str
    heading: str = ""


class Page(Document):
    """A document that also holds charts and code, and is written as HTML."""

    def charts(self, charts: Iterable[Chart]) -> None:
        """Add charts; neighbours stand side by side where there is room."""
        self.blocks.extend(charts)

    def code(self, words: str, heading: Part | None = None) -> None:
        """Add words of the run as they are, folded under a heading where there is one."""
        self.blocks.append(Code(words, "" if heading is None else self._take(heading)))

    def html(self, title: str) -> str:
        """Return the page as one HTML file."""
        code = script(_script())
        policy = (
            f"default-src 'none'; script-src {digest(code)}; style-src 'unsafe-inline'; "
            "base-uri 'none'; form-action 'none'"
        )
        head = _HEAD.format(policy=policy, title=escape(title), style=_asset("page.css"))
        parts = [head]
        for charts, blocks in groupby(self.blocks, key=lambda block: isinstance(block, Chart)):
            body = "\n".join(map(_html, blocks))
            parts.append(f'<div class="charts">\n{body}\n</div>\n' if charts else f"{body}\n")
        return "".join([*parts, _FOOT.format(code=code)])


@cache
def _script() -> str:
    """Return Vega-Lite, Vega, vega-embed and what draws the page's charts with them as one script."""
    import vl_convert

    return vl_convert.javascript_bundle(_asset("page.js"))


@cache
def _asset(name: str) -> str:
    return importlib.resources.files("analysis.report").joinpath(name).read_text(encoding="utf-8")


def _html(block: Block) -> str:
    match block:
        case Heading(level, words):
            return f"<h{level}>{inline(words)}</h{level}>"
        case Paragraph(words, caution):
            return f'<p class="caution">{inline(words)}</p>' if caution else f"<p>{inline(words)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{inline(item)}</li>" for item in items) + "\n</ul>"
        case Table():
            return _table(block)
        case Code(words, heading):
            return _code(words, heading)
        case Chart():
            return _chart(block)
    raise TypeError(f"no HTML for {block!r}")


def _table(table: Table) -> str:
    classes = [' class="words"' if words else "" for words in table.of_words]
    lines = []
    for tag, cells in (("th", table.columns), *(("td", row) for row in table.rows)):
        made = (f"<{tag}{kind}>{inline(cell)}</{tag}>" for kind, cell in zip(classes, cells, strict=True))
        lines.append(f"<tr>{''.join(made)}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n{body}\n</table></div>'


def _code(words: str, heading: str) -> str:
    cut = len(words) > MOST_CODE
    made = f"<pre>{escape(words[:MOST_CODE])}{'…' if cut else ''}</pre>"
    if not heading:
        return made
    return f"<details><summary>{inline(heading)}{' (its beginning)' if cut else ''}</summary>{made}</details>"


def _chart(chart: Chart) -> str:
    legend = "".join(map(_key, chart.legend))
    kind = ' class="wide"' if chart.wide else ""
    return (
        f'<figure{kind}><div class="chart" role="img" aria-label="{escape(chart.what)}"></div>'
        f'<script type="application/json">{script_json(chart.spec)}</script>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def _key(key: Key) -> str:
    return f'<li><span style="color:{key.colour}">{key.glyph}</span>{escape(key.words)}</li>'
