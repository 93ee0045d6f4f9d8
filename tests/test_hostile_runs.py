"""Run directories from elsewhere: nothing of them is executed, marks up a page, or is written outside them."""

import contextlib
import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt

from analysis import AnalysisError, reduce
from analysis.pages.answer import answer
from analysis.writing.files import write_csv
from contract.rows import PointRow
from orchestrator.problems import ConfigError
from orchestrator.resume import experiments_of
from orchestrator.store import Store
from tests import synthetic_run as synthetic
from tests.configs import raw

WORDS = [
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "![x](http://evil.test/x.png) [y](javascript:alert(1)) <http://evil.test>",
    "| a | b |\n| --- | --- |\n# heading\n\n[x]: http://evil.test\n\n[x]",
    "=HYPERLINK(\"http://evil.test\")",
    "\x1b]0;title\x07\x1b[2J\u202e../../etc/passwd\x00",
    "`code` **bold** ~~gone~~ &lt;b&gt; $(touch x) ${HOME}",
]  # fmt: skip
FORMULA = re.compile(r"[=@\t\r]|[+-](?![\d.]|$)")


def hostile_rows(words: str) -> list[PointRow]:
    shape = replace(synthetic.GPU, model=words, device_name=words)
    rows = [replace(row, vllm_version=words, throttle_reasons=[words]) for row in synthetic.rows(shape)]
    lost = {"concurrency-c4-r0", "committed-1024"}
    return [synthetic.failed(row, words, words) if row.point_id in lost else row for row in rows]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)


def tags_of(markdown: str) -> set[str]:
    """Return the elements of a page as a viewer shows it that passes HTML through."""
    reader = Tags()
    reader.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))
    return reader.found


@pytest.mark.parametrize("words", WORDS)
def test_words_of_a_run_are_words_in_every_artifact(tmp_path: Path, words: str) -> None:
    harmless = tmp_path / "harmless"
    synthetic.write_run(harmless, hostile_rows("a name"))
    usual = {path.name: tags_of(path.read_text()) for path in reduce(harmless) if path.suffix == ".md"}
    run = tmp_path / "run"
    synthetic.write_run(run, hostile_rows(words))
    written = reduce(run)
    pages = [path for path in written if path.suffix == ".md"]
    assert {path.name for path in pages} == set(usual)
    for page in pages:
        assert tags_of(page.read_text()) <= usual[page.name], page
        assert page.read_text().isprintable() or not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", page.read_text())
    for path in (path for path in written if path.suffix == ".csv"):
        with path.open(newline="") as file:
            assert not [cell for row in csv.reader(file) for cell in row if FORMULA.match(cell)], path
    for path in (path for path in written if path.suffix == ".svg"):
        elements = {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()}
        assert not elements & {"script", "image", "foreignObject", "a", "iframe"}, path
        assert "evil.test" not in "".join(re.findall(r'(?:href|src)="[^"]*"', path.read_text()))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        print(answer(run))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", said.getvalue())
    assert all(path.resolve().is_relative_to(run.resolve()) for path in written)
    assert {path.name for path in tmp_path.iterdir()} == {"harmless", "run"}


def test_shards_are_data_whatever_is_pickled_in_them(tmp_path: Path) -> None:
    """pyarrow before 14.0.1 unpickled types of a schema's metadata (CVE-2023-47248)."""
    run = synthetic.write_run(tmp_path / "run", synthetic.rows()[:2])
    path = next(path for path in run.glob("shards/*/*.parquet") if path.name != "session.parquet")
    table = pq.ParquetFile(path).read()
    pickled = f"cos\nsystem\n(S'touch {tmp_path / 'trap'}'\ntR.".encode()
    marks = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled}
    fields = [field.with_metadata(marks) if field.name == "model" else field for field in table.schema]
    pq.write_table(pa.Table.from_arrays(table.columns, schema=pa.schema(fields)), path)
    with contextlib.suppress(AnalysisError):
        reduce(run)
    assert not (tmp_path / "trap").exists()


# --- going on with it ---


def stored(directory: Path, **changes: object) -> Store:
    directory.mkdir(exist_ok=True)
    (directory / "manifest.json").write_text(json.dumps({"experiments": [raw("kv", engine="sim", **changes)]}))
    return Store(directory)


@pytest.mark.parametrize("where", ["shards", "logs", "manifest.json.tmp", "shards/s"])
def test_a_run_with_links_is_not_gone_on_with(tmp_path: Path, where: str) -> None:
    store = stored(tmp_path / "run")
    store.refuse_links()
    link = store.directory / where
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="is a link"):
        store.refuse_links()


def test_a_manifest_does_not_choose_the_cluster(tmp_path: Path) -> None:
    store = stored(tmp_path / "run", cluster__address="evil.test:6379")
    with pytest.raises(ConfigError, match=r"name it, cluster.address=evil.test:6379"):
        experiments_of(store, [], {})
    (own,) = experiments_of(store, [], {"cluster.address": "auto"})
    assert own.cluster.address == "auto"
    assert experiments_of(stored(tmp_path / "run"), [], {})[0].cluster.address == "local"


@pytest.mark.parametrize(
    "flags",
    [
        {"trust_remote_code": True},
        {"worker_cls": "evil.Worker"},
        {"seed": "--trust-remote-code"},
        {"worker_c": "evil.W"},
    ],
)
def test_a_manifest_does_not_name_code(tmp_path: Path, flags: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"server\.extra_args"):
        experiments_of(stored(tmp_path / "run", server__extra_args=flags), [], {})


# --- spreadsheets ---


def cells(path: Path) -> list[str]:
    """Return the first row under the heading."""
    with path.open(newline="") as file:
        return list(csv.reader(file))[1]


@pytest.mark.parametrize("cell", ["-0.5", "+12.0 %", "-3 MiB", "-1e-05", "-", "1,024", "a name", ""])
def test_numbers_and_words_stay_as_they_are_in_csv(tmp_path: Path, cell: str) -> None:
    assert cells(write_csv(tmp_path / "x.csv", ["a", "b"], [[cell, "x"]])) == [cell, "x"]


@pytest.mark.parametrize("cell", ["=1+1", "@SUM(A1)", "-1+cmd|' /C calc'!A0", "+HYPERLINK(1)", "\t=1"])
def test_what_a_spreadsheet_would_compute_is_text(tmp_path: Path, cell: str) -> None:
    assert cells(write_csv(tmp_path / "x.csv", ["a"], [[cell]])) == [f"'{cell}"]
