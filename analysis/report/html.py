"""Words and data on their way into HTML, inert whatever they hold: nothing that a run says becomes markup or script."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from typing import Any

_MARKDOWN = re.compile(
    r"\\(?P<literal>.)"
    r"|`(?P<code>[^`]+)`"
    r"|(?<![\w*])\*\*(?P<strong>(?:\\.|[^*\\])+)\*\*(?![\w*])"
    r"|(?<![\w*])\*(?P<em>(?:\\.|[^*\\])+)\*(?![\w*])"
    r"|(?P<entity>&(?:lt|gt|amp);)"
    r"|(?P<other>[<>&\"'])"
)
"""What `analysis.writing.document` and `analysis.writing.figures.quote` write of Markdown, and no more of it."""
DIGITS = 5
"""Significant digits of numbers in charts: more than a screen has pixels for."""


def escape(words: str) -> str:
    """Return words of a run as text of a page, also as an attribute's value."""
    return html.escape(words.encode("utf-8", "replace").decode("utf-8"))


def inline(words: str) -> str:
    """Return a block's Markdown as HTML: emphasis, code and escapes; everything else is text."""
    return _MARKDOWN.sub(_one, words)


def _one(match: re.Match[str]) -> str:
    kind, words = match.lastgroup, match[match.lastgroup or 0]
    if kind == "entity":
        return words
    if kind in ("code", "strong", "em"):
        return f"<{kind}>{inline(words)}</{kind}>"
    return escape(words)


def script_json(value: Any) -> str:
    """Return JSON for a script element: ASCII, and without `<`, `>` and `&`, so that nothing in it can end the element.

    A number that is none (NaN, infinite) becomes null; the others keep `DIGITS` significant digits.
    """
    text = json.dumps(_rounded(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value


def script(code: str) -> str:
    """Return a library's or our own code as a script element's content: it must not end the element."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", code, flags=re.IGNORECASE)


def digest(code: str) -> str:
    """Return the source expression by which a Content-Security-Policy allows exactly this script (CSP Level 2, 4.2)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
