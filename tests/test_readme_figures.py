"""Numbers that are typed into READMEs: each is a figure of the kept run that it speaks of, and none stands untested."""

from __future__ import annotations

import csv
import re
from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest

from analysis.pages.answer import answer

ROOT = Path(__file__).parent.parent
OUTPUTS = ROOT / "outputs"
RUNS = {
    "README.md": OUTPUTS / "example-h200",
    "outputs/example-h100/README.md": OUTPUTS / "example-h100",
    "outputs/example-h200/README.md": OUTPUTS / "example-h200",
}
"""Of which run each file speaks."""
NUMBER = r"\d[\d,]*(?:\.\d+)?"
NAMES = re.compile(
    r"[Pp]hi-3(?:-mini-4k)?|H[12]00s?|p95|two|vLLM [\d.]+|driver [\d.]+|\d{4}-\d\d-\d\d|80GB|\(95 %:"
    r"|[Uu]tilization 0\.90|schema version \d|`[^`]*`|\]\([^)]*\)"
)
"""What is called so; versions and dates are those of the manifest."""

COMMITTED, FULL = "committed.phi-3-mini-4k", "utilization.phi-3-mini-4k"
ONE, BEST = "concurrency.phi-3-mini-4k.c1", "concurrency.phi-3-mini-4k.c32"
LAST, LONG = "concurrency.phi-3-mini-4k.c64", "near_full_context.phi-3-mini-4k"
ACCOUNT = "account.ready"


def both(mode: str, one: str, other: str) -> str:
    """Name the sum of two parts of the account at the shortest length."""
    return "+".join(f"{mode}.len512.{ACCOUNT}.{part}_mib" for part in (one, other))


OF_BOTH_CARDS = [
    ("{} servers, {} points, {} min {} s from", ["servers", "points", "minutes", "seconds"]),
    ("{} by the formula and", ["kv.phi-3-mini-4k.formula_bytes_per_token"]),
    ("{} MiB weights", [COMMITTED + f".len512.{ACCOUNT}.weights_mib"]),
    ("no: when ready {} MiB at {} tokens, {} at {}; loaded {} and {}",
     [FULL + ".len512.mem_ready_mib", "512", FULL + ".len4096.mem_ready_mib", "4096",
      FULL + ".len512.mem_loaded_mib", FULL + ".len4096.mem_loaded_mib"]),
    ("how many sequences of {} tokens", ["4096"]),
    ("{} by the engine's count", [FULL + ".len4096.engine_max_concurrency"]),
    ("with {} tokens in flight", [FULL + ".pages.in_flight_tokens"]),
    ("{} are held at once by arithmetic", [FULL + ".len4096.held_at_once"]),
    ("windows of {} tokens", [FULL + ".pages.window_tokens"]),
    ("the last doubling gained {} %", ["concurrency.phi-3-mini-4k.doubling_share_pct"]),
    ("at {} % of the power limit", [ONE + ".power_share_pct"]),
    ("Memory was back at {} MiB", ["memory_left"]),
]  # fmt: skip
"""What both READMEs of runs on two cards say in the same words."""
CLAIMS = {
    "README.md": [
        ("all of it but {} MiB, with CUDA graphs all but {}, at most {} %",
         ["committed.residual_mib", "utilization.residual_mib", "residual_pct"]),
    ],
    "outputs/example-h100/README.md": [
        *OF_BOTH_CARDS,
        ("a bare CUDA context of {}", [COMMITTED + f".len512.{ACCOUNT}.context_mib"]),
        ("the pool, {} of buffers and cache", [both(COMMITTED, "buffers", "cache")]),
        ("{} of graph pools", [FULL + f".len512.{ACCOUNT}.graphs_mib"]),
        ("graph pools, {} of buffers and cache", [both(FULL, "buffers", "cache")]),
        ("at peak too: {} MiB (at most {} %), with CUDA graphs at most {} ({} %)",
         [f"{mode}.residual_{unit}" for mode in ("committed", "utilization") for unit in ("mib", "pct")]),
        ("and {} requests of {} ran", ["near_full_context.phi-3-mini-4k.c64.running_max_highest", "4088"]),
        ("no knee yet at {}: {} tok/s", [BEST + ".concurrency", BEST + ".tok_s"]),
        ("{} to {}) at p95", [BEST + ".tok_s_low", BEST + ".tok_s_high"]),
        ("at p95 {} s ({} to {}) with", [BEST + ".p95_e2e_s", BEST + ".p95_e2e_s_low", BEST + ".p95_e2e_s_high"]),
        ("with {} + {} tokens;", ["concurrency.prompt_tokens", "concurrency.output_tokens"]),
        ("{} % of that throughput", [ONE + ".best_share_pct"]),
        ("limit: {} J a token against {}", [ONE + ".joules_per_output_token", BEST + ".joules_per_output_token"]),
        ("{} tok/s at p95 {} s with {} in flight ({} + {} tokens)",
         ["near_full_context.phi-3-mini-4k.c64.tok_s", "near_full_context.phi-3-mini-4k.c64.p95_e2e_s", "64",
          "near_full_context.prompt_tokens", "near_full_context.output_tokens"]),
    ],
    "outputs/example-h200/README.md": [
        *OF_BOTH_CARDS,
        ("bare CUDA context of {}", [COMMITTED + f".len512.{ACCOUNT}.context_mib"]),
        (", {} of buffers and cache. Utilization", [both(COMMITTED, "buffers", "cache")]),
        ("with CUDA graphs: {} of their pools, {} of buffers and cache",
         [FULL + f".len512.{ACCOUNT}.graphs_mib", both(FULL, "buffers", "cache")]),
        ("at peak too: {} MiB ({} and {} % of memory at {} and {} tokens, {} and {} at the longer two)",
         ["committed.residual_mib",
          *(COMMITTED + f".len{length}.{ACCOUNT}.residual_pct" for length in (512, 1024)), "512", "1024",
          *(COMMITTED + f".len{length}.{ACCOUNT}.residual_pct" for length in (2048, 4096))]),
        ("with CUDA graphs at most {} ({} %), of which {} came with the capture",
         ["utilization.residual_mib", "utilization.residual_pct", FULL + f".len512.{ACCOUNT}.with_graphs_mib"]),
        ("with p95 below {} s", ["slo.p95_e2e_s"]),
        ("{} requests of {} + {} tokens: {} tok/s",
         ["concurrency.phi-3-mini-4k.slo_held", "concurrency.prompt_tokens", "concurrency.output_tokens",
          BEST + ".tok_s"]),
        ("{} to {}) at p95 {} s", [BEST + ".tok_s_low", BEST + ".tok_s_high", BEST + ".p95_e2e_s"]),
        ("s; {} give {} at {} s", ["concurrency.phi-3-mini-4k.slo_undecided", LAST + ".tok_s", LAST + ".p95_e2e_s"]),
        ("{} of {} + {} tokens: {} tok/s at p95 {} s; throughput",
         [LONG + ".c2.concurrency", "near_full_context.prompt_tokens", "near_full_context.output_tokens",
          LONG + ".c2.tok_s", LONG + ".c2.p95_e2e_s"]),
        ("scaling above {} and up to {} (of the levels tested at {} or {}: {} and {} tok/s",
         ["8", "32", "16", "32", LONG + ".c16.tok_s", LONG + ".c32.tok_s"]),
        ("more than {} was not tried, and the last doubling still gained {} %",
         ["32", LONG + ".doubling_share_pct"]),
        ("{} used {} % of the pool", ["32", LONG + ".c32.kv_usage_max_pct"]),
        ("cap, at {} with {} % of its limit", ["32", LONG + ".c32.power_share_pct"]),
        ("{} % of the best throughput", [ONE + ".best_share_pct"]),
        ("limit: {} J a token against {}", [ONE + ".joules_per_output_token", LAST + ".joules_per_output_token"]),
        ("at {} in flight tok/s", ["neighbours.c74267affb1ec7f7.concurrency"]),
        ("changed by -{} % (-{} to +{})",
         [f"-neighbours.c74267affb1ec7f7.tok_s_{bound}_pct" for bound in ("share", "low")]
         + ["neighbours.c74267affb1ec7f7.tok_s_high_pct"]),
    ],
}  # fmt: skip
"""Names of the numbers; `a+b`: their sum; `<`: rounded down; `-`: sign in the phrase; a plain number: a setting."""


def figures(run: Path) -> dict[str, float]:
    """Return figures.csv by name, and what of the tables has no figure."""
    with (run / "figures.csv").open() as file:
        found = {row["name"]: row["value"] for row in csv.DictReader(file)}
    points, sessions = pd.read_parquet(run / "points.parquet"), pd.read_parquet(run / "sessions.parquet")
    started, ended = (sessions[c].map(datetime.fromisoformat) for c in ("started_at", "ended_at"))
    took = round((ended.max() - started.min()).total_seconds())
    facts: dict[str, object] = {
        "servers": len(sessions), "points": len(points), "minutes": took // 60, "seconds": took % 60,
        "memory_left": (sessions.mem_after_stop_bytes - sessions.mem_baseline_bytes).abs().max() / 2**20,
    }  # fmt: skip
    for mode in ("committed", "utilization"):
        for unit in ("mib", "pct"):
            facts[f"{mode}.residual_{unit}"] = largest(found, mode, unit)
    facts["residual_pct"] = max(float(str(facts[f"{mode}.residual_pct"])) for mode in ("committed", "utilization"))
    for purpose in ("concurrency", "near_full_context"):
        row = points[points.purpose == purpose].iloc[0]
        facts |= {f"{purpose}.{of}_tokens": row[f"{of}_tokens"] for of in ("prompt", "output")}
    return {
        name: float(str(value))
        for name, value in (found | facts).items()
        if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", str(value))
    }


def largest(found: dict[str, str], mode: str, unit: str) -> float:
    """Return the residual that is largest of all lengths and moments."""
    pattern = re.compile(rf"{mode}\..*\.account\.\w+\.residual_{unit}")
    return max(abs(float(value)) for name, value in found.items() if pattern.fullmatch(name))


def text_of(file: str) -> str:
    """Return what a README says of the run, on one line: the caption of the project's; all of the run's own but the
    command, which is indented."""
    lines = (ROOT / file).read_text().splitlines()
    text = " ".join(" ".join(line for line in lines if not line.startswith("    ")).split())
    return text if file.startswith("outputs") else text[text.index("*The first lines") : text.index("[This run]")]


def meant(name: str, figure: dict[str, float]) -> float:
    if name.isdigit():
        return float(name)
    value = sum(figure[part] for part in name.lstrip("<-").split("+"))
    return float(int(value)) if name[0] == "<" else -value if name[0] == "-" else value


def pattern(phrase: str) -> str:
    """Return the phrase with a group for each of its numbers."""
    return re.escape(phrase).replace(r"\{\}", f"({NUMBER})")


@pytest.mark.parametrize("file", CLAIMS)
def test_numbers_of_a_readme_are_figures_of_the_kept_run(file: str) -> None:
    text, figure = text_of(file), figures(RUNS[file])
    for phrase, names in CLAIMS[file]:
        found = re.search(pattern(phrase), text)
        assert found is not None, f"{file} does not say: {phrase}"
        for number, value in zip(found.groups(), (meant(name, figure) for name in names), strict=True):
            digits = len(number.partition(".")[2])
            off = abs(float(number.replace(",", "")) - value)
            assert off <= 0.5 * 10**-digits + 1e-9, f"{file}: {phrase}: {number}, not {value}"


def test_the_project_shows_the_first_lines_of_the_kept_runs_answer() -> None:
    shown = (ROOT / "README.md").read_text().partition("```text\n")[2].partition("```")[0].splitlines()
    assert len(shown) >= 5
    assert answer(RUNS["README.md"]).splitlines()[: len(shown)] == shown


HEADLINE = (
    "{} streams on one core at {} % of the ideal load in a closed loop and {} % with Poisson arrivals, p99 gap within "
    "{} ms, at {} and {} of the CPU of `vllm bench serve`, parsing included; {} and {} by the build before in an hour "
    "of slow cores. A level that the client limited says so: {} of {} in {} seeded runs, none falsely."
)
LOOPS = {"Closed loop:": "closed", "Poisson arrivals": "Poisson"}
"""A table's first words on the client's page, and the word for it in that of the aims."""
CLIENT_PAGE = ROOT / "benchmarks" / "client" / "README.md"


def client_table(page: str, loop: str) -> dict[tuple[str, str], list[float]]:
    """Return the first table of a loop: the numbers of a row by streams and client."""
    rows, streams = {}, ""
    for line in page[page.index(f"\n{loop}") :].partition("|---:|")[2].partition("\n\n")[0].splitlines()[1:]:
        cells = [cell.strip(" *`%").replace(",", "") for cell in line.strip("|").split("|")]
        streams = cells[0] or streams
        rows[streams, cells[1]] = [float(cell) for cell in cells[2:]]
    return rows


def aims(page: str, aim: str, loop: str) -> list[list[str]]:
    """Return what came of an aim in a loop, by hour: the figures of each cell."""
    rows = page[page.index(f"| {aim}") :].splitlines()
    cells = next(row.split("|")[3:-1] for row in rows if row.split("|")[2].strip() == LOOPS[loop])
    return [[figure.strip(" *") for figure in cell.split(",")] for cell in cells]


def is_quotient(share: str, one: float, other: float) -> bool:
    """Whether a share is that of two figures of which a table has one decimal."""
    low, high = (one - 0.05) / (other + 0.05), (one + 0.05) / (other - 0.05)
    return low - 0.005 <= float(share) <= high + 0.005


def test_what_the_readme_says_of_the_client_is_what_was_measured() -> None:
    found = re.search(pattern(HEADLINE), " ".join((ROOT / "README.md").read_text().split()))
    assert found is not None, f"README.md does not say: {HEADLINE}"
    streams, closed, poisson, gap, closed_cpu, poisson_cpu, slow_closed, slow_poisson, called, limits, runs = (
        found.groups()
    )
    page = CLIENT_PAGE.read_text()
    gating = rf"of {runs}, [\d.]+ %\*\* \([^)]*\): of {limits} limits {called} were called"
    assert re.search(gating, " ".join(page.split()))
    said = zip(LOOPS, (closed, poisson), (closed_cpu, poisson_cpu), (slow_closed, slow_poisson), strict=True)
    for loop, share, cpu, slow_cpu in said:
        _, _, _, reached, _, p99, true_p99, *_ = client_table(page, loop)[streams, "ours"]
        assert float(share) == reached
        assert round(abs(p99 - true_p99), 1) <= float(gap)
        now, slow, _ = aims(page, "with all parsing at most 0.45", loop)
        assert (now[1], slow[1]) == (cpu, slow_cpu)


@pytest.mark.parametrize("loop", LOOPS)
def test_what_came_of_the_clients_aims_is_what_its_tables_say(loop: str) -> None:
    page = CLIENT_PAGE.read_text()
    table = client_table(page, loop)
    ours, peers = ([table[size, who] for size in ("256", "512", "1024")] for who in ("ours", "vllm bench serve"))
    for aim, column in (("CPU in the window at most 0.35", 0), ("with all parsing at most 0.45", 2)):
        for share, own, peer in zip(aims(page, aim, loop)[0], ours, peers, strict=False):
            assert is_quotient(share, own[column], peer[column])
    parsing = [float(re.match(r"[\d.]+", told)[0]) for told in aims(page, "parsing at most 2 µs", loop)[0]]  # type: ignore[index]
    assert parsing == [own[1] for own in ours]
    reached, gap, ttft = aims(page, "512 streams: 98 %", loop)[0]
    assert float(reached.removesuffix(" %")) == ours[1][3]
    assert float(gap) == pytest.approx(abs(ours[1][5] - ours[1][6]))
    assert float(ttft) == pytest.approx(ours[1][7] - ours[1][8])
    assert aims(page, "1,024 streams", loop)[0][0].startswith(f"{ours[2][3]} %")


@pytest.mark.parametrize("file", CLAIMS)
def test_no_number_of_a_readme_stands_untested(file: str) -> None:
    text = text_of(file)
    tested = {place for name in NAMES.finditer(text) for place in range(*name.span())}
    for phrase, _ in CLAIMS[file]:
        found = re.search(pattern(phrase), text)
        assert found is not None
        tested |= {found.start(n + 1) for n in range(len(found.groups()))}
    assert [number[0] for number in re.finditer(NUMBER, text) if number.start() not in tested] == []
