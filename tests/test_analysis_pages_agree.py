"""The pages of one run read against each other: the same server, level and standings on all, and no level denied."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import pytest

from analysis import answer, reduce
from contract.rows import PointRow
from tests import synthetic_run as synthetic
from tests.page_reader import prose
from tests.test_analysis_load import with_curve

P95 = {1: 0.20, 4: 0.24, 8: 0.30, 16: 0.45, 32: 0.90}
FLATTENS = with_curve({1: 300.0, 4: 1000.0, 8: 1800.0, 16: 2500.0, 32: 2600.0}, P95)
EARLY = with_curve({1: 300.0, 4: 1200.0, 8: 2000.0, 16: 2020.0, 32: 2030.0}, P95)
RISES = with_curve({1: 300.0, 4: 1100.0, 8: 2100.0, 16: 3500.0, 32: 5000.0}, P95)
MEMORY = synthetic.rows()[:8]
NOTES = "kv_cache_scaling_notes.md"
PICTURES = ("write_plots", "write_timeline", "write_startup")
"""What no word is read from, and takes the time."""
TRAITS = {"len": "max_model_len", "seqs": "max_num_seqs", "tp": "tensor_parallel_size"}
"""What a server is told apart by in a title, and in words."""


def served(rows: list[PointRow], by: str, **columns: object) -> list[PointRow]:
    """The rows as of another server."""
    return [replace(r, session_id=f"{by}-{r.session_id}", point_id=f"{by}-{r.point_id}", **columns) for r in rows]


def batching(rows: list[PointRow]) -> list[PointRow]:
    return [replace(row, purpose="batching", point_id=f"b-{row.point_id}") for row in rows]


def times(factor: float, rows: list[PointRow]) -> list[PointRow]:
    return [replace(row, tok_s=factor * (row.tok_s or 0.0)) for row in rows]


def lost(rows: list[PointRow]) -> list[PointRow]:
    return [synthetic.failed(row, "engine_dead") for row in rows]


def memory_of(rows: list[PointRow]) -> list[PointRow]:
    """Readings of memory of each of these servers."""
    columns = ("model", "gpus", "tensor_parallel_size", "max_num_seqs")
    servers = dict.fromkeys(tuple(getattr(row, column) for column in columns) for row in rows)
    made = [served(MEMORY, f"m{n}", **dict(zip(columns, server, strict=True))) for n, server in enumerate(servers)]
    return [row for some in made for row in some]


@dataclass(frozen=True)
class Case:
    """A run, and what its pages must all say."""

    rows: list[PointRow]
    slo: float | None
    chosen: dict[str, int]
    """The level of each operating point, by what the title of its server must hold."""
    levels: int = 5
    """How many were measured of each server."""
    curves: int = 1
    """Of how many servers and loads."""
    manifest: bool = True
    says: tuple[str, ...] = ()
    """On operating_point.md."""
    advises: dict[str, str] = field(default_factory=dict)
    """On kv_cache_scaling_notes.md, by what the title of the section must hold, and in no other section."""


CASES = {
    "two servers, an objective": Case(
        [*served(FLATTENS, "a", max_num_seqs=8), *served(RISES, "b", max_num_seqs=256)],
        0.5,
        {"seqs 256": 16},
        curves=2,
        says=("Chosen among 2 servers", "Batch: phi-3-mini-4k, seqs 256: max_model_len 4096, concurrency 32 (5,000"),
    ),
    "two lengths, the second wins": Case(
        [*FLATTENS, *served(RISES, "b", max_model_len=8192)], 0.5, {"len 8192": 16}, curves=2
    ),
    "two servers, both with a knee": Case(
        [*served(EARLY, "a", max_num_seqs=8), *served(FLATTENS, "b", max_num_seqs=256)],
        None,
        {"seqs 256": 16},
        curves=2,
        says=("Chosen among 2 servers that were sent this load.\n",),
    ),
    "two servers, the better still rises": Case(
        [*served(EARLY, "a", max_num_seqs=8), *served(RISES, "b", max_num_seqs=256)],
        None,
        {},
        curves=2,
        says=(
            "a server whose throughput is not known to stop scaling gives more tok/s than any at its knee",
            "phi-3-mini-4k, seqs 8: of the levels tested the lowest that could be the knee is concurrency 8 (2,000",
            "phi-3-mini-4k, seqs 256: there is no knee up to concurrency 32, the highest measured (5,000 tok/s",
            "phi-3-mini-4k, seqs 256: Throughput-focused: concurrency 32, the highest level tested, still rising",
            "Batch: phi-3-mini-4k, seqs 256: max_model_len 4096, concurrency 32 (5,000 tok/s",
        ),
    ),
    "two servers, the better without repeats": Case(
        [
            *served(EARLY, "a", max_num_seqs=8),
            *served([row for row in RISES if row.repeat == 0], "b", max_num_seqs=256),
        ],
        None,
        {},
        curves=2,
        says=(
            "phi-3-mini-4k, seqs 256: where throughput stops scaling is open, and of the levels "
            "measured concurrency 32 gives most (4,975",
        ),
    ),
    "two servers, the slower rises": Case(
        [*served(FLATTENS, "a", max_num_seqs=256), *served(times(1 / 3, RISES), "b", max_num_seqs=8)],
        None,
        {"seqs 256": 16},
        curves=2,
        says=("Of one whose throughput is not known to stop scaling, no level gave more tok/s beyond noise.",),
    ),
    "two servers, no knee on either": Case(
        [*served(RISES, "a", max_num_seqs=256), *served(times(0.5, RISES), "b", max_num_seqs=8)],
        None,
        {},
        curves=2,
        says=(
            "of no server it is known where throughput stops scaling",
            "phi-3-mini-4k, seqs 8: there is no knee up to concurrency 32, the highest measured (2,500 tok/s",
            "phi-3-mini-4k, seqs 256: there is no knee up to concurrency 32, the highest measured (5,000 tok/s",
            "is of one server, phi-3-mini-4k, seqs 256: the one with the highest tok/s, since none was chosen.",
            "Batch: phi-3-mini-4k, seqs 256: max_model_len 4096, concurrency 32 (5,000 tok/s",
        ),
    ),
    "the sweep failed, batching was measured": Case([*batching(FLATTENS), *lost(FLATTENS)], None, {"phi-3": 16}),
    "the same, an objective": Case([*batching(FLATTENS), *lost(FLATTENS)], 0.35, {"phi-3": 8}),
    "the sweep failed but for a level": Case(
        [*batching(FLATTENS), *FLATTENS[:3], *lost(FLATTENS[3:])], None, {"phi-3": 16}
    ),
    "the sweep was cut off after two levels": Case([*batching(FLATTENS), *FLATTENS[:6]], None, {"phi-3": 16}),
    "the same, an objective that the higher levels break": Case(
        [*batching(FLATTENS), *FLATTENS[:6]], 0.35, {"phi-3": 8}
    ),
    "two servers, the sweep of the faster was cut off": Case(
        [
            *served([*batching(RISES), *RISES[:6]], "a", max_num_seqs=256),
            *served(EARLY, "b", max_num_seqs=8),
        ],
        None,
        {},
        curves=2,
        says=(
            "phi-3-mini-4k, seqs 8: of the levels tested the lowest that could be the knee is concurrency 8 (2,000",
            "phi-3-mini-4k, seqs 256: there is no knee up to concurrency 32, the highest measured (5,000 tok/s",
        ),
    ),
    "the sweep of one of two servers failed": Case(
        [
            *served([*batching(EARLY), *lost(EARLY)], "a", max_num_seqs=8),
            *served([*batching(FLATTENS), *FLATTENS], "b", max_num_seqs=256),
        ],
        None,
        {"seqs 256": 16},
        curves=2,
    ),
    "batching of one server, a sweep of another": Case(
        [*served(batching(FLATTENS), "a", max_num_seqs=256), *served(EARLY, "b", max_num_seqs=8)],
        None,
        {"seqs 256": 16},
        curves=2,
    ),
    "one model swept, of another a few levels": Case(
        [*FLATTENS, *served(batching(EARLY), "b", model="tiny")], None, {"phi-3": 16, "tiny": 8}, curves=2
    ),
    "a level that its twin contradicts": Case(
        [*FLATTENS, *(replace(r, p95_e2e_s=0.9) for r in batching(FLATTENS) if r.concurrency == 16)],
        0.5,
        {"phi-3": 8},
        says=("| 2,500 | 0.4500 | 0.4460 to 0.4540 | undecided: missed under another purpose |",),
    ),
    "one GPU and two": Case(
        [*FLATTENS, *served(RISES, "b", gpus=2, tensor_parallel_size=2)],
        0.35,
        {"tp 1": 8, "tp 2": 8},
        curves=2,
        advises={
            "tp 1": "concurrency 16, where throughput has stopped",
            "tp 2": "concurrency 32, the highest level tested",
        },
    ),
    "no manifest": Case(FLATTENS, None, {"phi-3": 16}, manifest=False),
}


@dataclass(frozen=True)
class Pages:
    """What a reader has before them."""

    case: Case
    terminal: str
    report: str
    operating: str
    batching: str
    notes: str

    @property
    def every(self) -> str:
        return "\n".join((self.terminal, self.report, self.operating, self.batching, self.notes))


@pytest.fixture(scope="module", params=sorted(CASES))
def pages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pages:
    case, run = CASES[request.param], tmp_path_factory.mktemp("run")
    rows = [*memory_of(case.rows), *case.rows]
    if case.manifest:
        synthetic.write_run(run, rows)
        manifest = {"argv": ["+sweep=capacity"], "slo": {"p95_e2e_s": case.slo} if case.slo else {}}
        (run / "manifest.json").write_text(json.dumps(manifest))
    else:
        synthetic.write_tables(run, rows)
    with patch.multiple("analysis.artifacts", **dict.fromkeys(PICTURES, lambda *_: [])):
        reduce(run)
    return Pages(
        case,
        answer(run),
        " ".join(prose((run / "report.html").read_text()).split()),
        *((run / name).read_text() for name in ("operating_point.md", "batching_benchmark.md", NOTES)),
    )


def sections(page: str, level: int) -> list[tuple[str, str]]:
    """The headings of a level and what stands under each."""
    parts = re.split(rf"^{'#' * level} (?!#)(.*)$", page, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def section(page: str, heading: str) -> str:
    return next(text for title, text in sections(page, 2) if title == heading)


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    for block in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        yield [dict(zip(head, row, strict=True)) for row in rows]


def blocks(terminal: str) -> list[tuple[str, str]]:
    """The titles of the terminal's answer and the lines under each."""
    parts = re.split(r"^(?! )(.*)$", terminal, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def test_terminal_and_report_put_the_operating_point_under_its_server(pages: Pages) -> None:
    found = {}
    for title, lines in blocks(pages.terminal):
        for level in re.findall(r"^  operating point \(.*?\): (?:.*)concurrency (\d+), ", lines, flags=re.MULTILINE):
            found[title] = int(level)
        for line in filter(None, lines.splitlines()):
            assert " ".join(line.split()) in pages.report
    expected = pages.case.chosen
    assert sorted(found.values()) == sorted(expected.values())
    for words, level in expected.items():
        assert [at for title, at in found.items() if words in title] == [level], found


def test_an_operating_point_that_is_not_known_is_under_no_single_server(pages: Pages) -> None:
    titles = [title for title, lines in blocks(pages.terminal) if re.search(r"operating point .* not known", lines)]
    assert bool(titles) == (not pages.case.chosen)
    assert [title for title in titles if "seqs" in title] == []


def test_operating_point_names_the_same_server_and_level(pages: Pages) -> None:
    found = re.findall(r"\*\*Concurrency (\d+)\*\*.*Server: (.*)\.$", pages.operating, flags=re.MULTILINE)
    assert sorted(int(level) for level, _ in found) == sorted(pages.case.chosen.values())
    for words, level in pages.case.chosen.items():
        trait, _, value = words.partition(" ")
        if trait in TRAITS:
            assert [at for at, server in found if f"{TRAITS[trait]} {value}" in server] == [str(level)]
    for words in pages.case.says:
        assert words in pages.operating


def test_notes_give_the_advice_of_their_own_servers(pages: Pages) -> None:
    advice = {title: text for title, text in sections(pages.notes, 2) if "Throughput-focused: " in text}
    assert advice
    for words, said in pages.case.advises.items():
        assert [title for title, text in advice.items() if said in text] == [t for t in advice if words in t]


def test_every_server_has_a_knee_table_and_a_table_of_limits_of_all_its_measured_levels(pages: Pages) -> None:
    knees = section(pages.batching, "Concurrency sweep: the knee")
    limits = section(pages.batching, "What limits each level")
    in_knees = {
        title: [row["concurrency"] for row in table]
        for title, text in sections(knees, 3)
        for table in tables(text)
        if "smoothed tok_s" in table[0]
    }
    in_limits = {
        title: [row["concurrency"] for row in table if row["verdict"] != "not measured"]
        for title, text in sections(limits, 3)
        for table in tables(text)
    }
    assert in_knees == in_limits
    assert [len(levels) for levels in in_knees.values()] == [pages.case.levels] * pages.case.curves


def test_no_page_denies_that_load_was_measured(pages: Pages) -> None:
    denials = (
        r"no levels? of (?:this )?load\b.*measured|no level was measured|fewer than two levels|"
        r"too few levels|no levels of a closed loop|holds no levels"
    )
    assert re.findall(denials, pages.every, flags=re.IGNORECASE) == []
    assert len(re.findall(r"best throughput: .* at concurrency 32", pages.terminal)) == pages.case.curves


def test_standings_are_those_of_the_operating_point(pages: Pages) -> None:
    if pages.case.slo is None:
        assert "With noise counted" not in pages.every
        return
    told = re.findall(r"With noise counted, as in operating_point.md, (of these levels, .*?)\.(?:\s|$)", pages.batching)
    chosen_from = [table for table in tables(pages.operating) if "purpose" in table[0] and "verdict" in table[0]]
    levels = [
        {row["concurrency"]: re.split(r"[:,]", row["verdict"])[0] for row in rows}
        for table in chosen_from
        for rows in _by_curve(table)
        if {row["verdict"] for row in rows} != {"not measured"} and len(rows) == pages.case.levels
    ]
    as_told = [
        {at: word for word, listed in re.findall(r"(\w+): ([\d, ]+)", words) for at in listed.split(", ")}
        for words in told
    ]
    assert len(as_told) == pages.case.curves
    assert all(standings in levels for standings in as_told), (as_told, levels)
    for words in told:
        assert words in pages.terminal
        assert words in pages.report


def _by_curve(table: list[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    for key in {(row["purpose"], row.get("model")) for row in table}:
        yield [row for row in table if (row["purpose"], row.get("model")) == key]
