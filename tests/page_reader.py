"""Reads report.html as a browser does, as far as tests need it: its prose, its charts, and whatever it might fetch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

FETCHING = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background", "ping", "manifest"}
VOID = {"meta", "link", "img", "br", "hr", "input", "base", "source", "embed"}


@dataclass
class PageReader(HTMLParser):
    """What a page holds once parsed."""

    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    """Tag, name, value."""
    words: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    """Text with the tags around it."""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append((tuple(self.open), data))

    def text(self, *without: str) -> str:
        """Return the text outside of these elements."""
        return " ".join(words for around, words in self.words if not set(around) & set(without))


def read_page(page: str) -> PageReader:
    """Return the parsed page; an element that is not closed in order is an error."""
    reader = PageReader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def prose(page: str) -> str:
    """Return what the page says in words: not its charts (data), its code (the run's own words) and its head."""
    return read_page(page).text("figure", "pre", "head", "script")


def charts(page: str) -> list[dict[str, Any]]:
    """Return the specification of every chart, with its data."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return [json.loads(one) for one in found]


def external(page: str) -> list[str]:
    """Return every address that the page would have a browser fetch, beside its own parts (`#`)."""
    reader = read_page(page)
    found = [value for _, name, value in reader.attributes if name.rpartition(":")[2] in FETCHING]
    styles = [words for around, words in reader.words if around[-1:] == ("style",)]
    styles += [value for _, name, value in reader.attributes if name == "style"]
    for style in styles:
        found += re.findall(r"@import[^;]*|url\([^)]*\)", style)
    return [address for address in found if not address.startswith("#")]
