"""Every number on every page is a registered figure, and every figure can be recomputed from the Parquet tables.

The auditor below shares no code with analysis: it knows the names of figures and reads the tables with pandas.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest

from analysis import reduce
from analysis.writing.document import Document, phrase
from analysis.writing.figures import count, quote, write_figures
from contract.rows import ClientRow, MemoryAccount
from tests import synthetic_run as synthetic
from tests.kv_audit import EnvelopeAudit, Layout
from tests.model_files import published
from tests.page_reader import prose
from workers.load.keeping_up import keeping_up

MIB, GIB = 2**20, 2**30
NAMES_WITH_DIGITS = re.compile(r"(?<![A-Za-z0-9])(?:p50|p95|p99|e2e|E2EL)(?![A-Za-z0-9])|2\*\*20")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]\d+)?")
CONSTANTS = {
    "rule.linear_r_squared": 0.99,
    "rule.linear_residual_pct": 5,
    "rule.step_share_pct": 1,
    "rule.estimates_agree_pct": 1,
    "rule.estimates_close_pct": 0.1,
    "rule.headroom_pct": 90,
    "rule.steady_in_flight_pct": 95,
    "rule.within_peak_pct": 5,
    "rule.still_gains_pct": 10,
    "rule.confidence_pct": 95,
    "rule.between_starts_pct": 10,
    "rule.above_p95_pct": 5,
    "rule.kv_near_full_pct": 95,
    "rule.drift_limit_pct": 5,
    "rule.false_alarms_pct": 5,
    "rule.context_step_tokens": 1024,
    "rule.cuda_segment_mib": 2,
    "rule.host_scatter_mib": 8,
    "rule.tutorial_util_low_pct": 25,
    "rule.tutorial_util_high_pct": 30,
    "rule.headroom": 0.9,
    "rule.p99_needs": 101,
    "rule.keeps_up_pct": 90,
    "rule.tutorial_doubling_low": 8,
    "rule.tutorial_doubling_high": 16,
    "unit.mib_bytes": 2**20,
}


def spoiled(shape: synthetic.Shape) -> list[synthetic.PointRow]:
    """Return rows with failures of every kind, a step in memory, cache hits, preemptions and others on the card."""
    lost = {
        "committed-2048",
        "batching-c8-r1",
        "concurrency-c4-r0",
        "batching-c16-r0",
        "batching-c16-r1",
        "batching-c16-r2",
    }
    made = []
    for row in synthetic.rows(replace(shape, extra_ready_bytes={1024: 96 * MIB, 2048: 290 * MIB, 4096: 290 * MIB})):
        if row.point_id in lost:
            row = synthetic.failed(row, "out_of_memory", "tried to allocate 3 GiB")
        elif row.point_id == "utilization-4096":
            row = synthetic.failed(row, "kv_too_small", "the estimated maximum model length is 3968", "kv_too_small")
            row = replace(row, engine_estimated_max_model_len=3968)
        elif row.purpose == "batching" and row.concurrency == 4:
            row = replace(row, prefix_hit_ratio=0.031, preemptions=3, failed=2, client_wait_share=0.31)
            row = replace(row, token_count_difference=10 * (row.repeat or 0))
            row = replace(row, foreign_processes=[f"pid {70 + (row.repeat or 0)} on GPU-0: 300 MiB"])
            row = replace(row, throttle_reasons=["power brake", "power cap"][: row.repeat])
            row = replace(row, client_lag_s=0.013 + (row.repeat or 0) / 1000, server_hz=1.6 - (row.repeat or 0) / 10)
            late = ClientRow(2, 0.2, gap_p99_raised_s=0.009, ttft_p95_raised_s=0.003, slip_p99_s=0.0025)
            late = replace(late, e2e_p95_raised_s=0.031, tpot_p95_raised_s=0.0011)
            row = replace(row, clients=[ClientRow(2, 0.1), replace(late, slip_p99_s=0.0025 + (row.repeat or 0) / 1000)])
            if row.repeat:  # the first is of before schema version 12
                row = replace(row, gap_p99_raised_s=0.004 + row.repeat / 1000, ttft_p95_raised_s=0.0024)
                row = replace(row, ttft_p99_raised_s=0.19, e2e_p95_raised_s=0.0, e2e_p99_raised_s=0.087)
                row = replace(row, tpot_p95_raised_s=0.0003)
            row = replace(row, p99_connect_s=0.04 + (row.repeat or 0) / 100)
            row = replace(row, warmup_stable=False, warmup_tok_s=[1.0, 2.0, 4.0, 8.0][: 4 - (row.repeat or 0)])
            row = replace(row, asked_s=30.0, stopped_by="requests", steady_completed=17 + (row.repeat or 0))
        elif row.purpose == "concurrency" and row.concurrency == 16:
            row = replace(row, power_limit_w=None, energy_j=None, foreign_processes=["pid 7 on GPU-0: 12 MiB"])
            row = replace(row, token_count_difference=-3)
        elif row.point_id == "utilization-1024":
            row = replace(row, foreign_processes=["pid 7 on GPU-0: 12 MiB", "pid 8 on GPU-0: unknown memory"])
        elif row.point_id == "committed-1024":
            row = replace(row, mem_baseline_bytes=2_000 * MIB, warmup_reached_batch=False)
            row = replace(row, mem_ready_bytes=(row.mem_ready_bytes or 0) + 1_996 * MIB)
            row = replace(row, mem_loaded_bytes=(row.mem_loaded_bytes or 0) + 1_996 * MIB)
            row = replace(row, mem_tree_bytes=19_000 * MIB)
            row = replace(row, foreign_processes=["pid 7 on GPU-0: 12 MiB", "pid 7 on GPU-0: 14 MiB"])
        made.append(row)
    return made


def repeated(saturation: float, **at_32: object) -> list[synthetic.PointRow]:
    """Return a sweep of three repeats a level, and what the server showed at its highest level."""
    shape = replace(synthetic.GPU, saturation=saturation)
    made = [synthetic.load_row(shape, "concurrency", c, r) for c in shape.sweep_levels for r in range(3)]
    made = synthetic.changed(made, lambda row: True, max_num_seqs=at_32.get("max_num_seqs"))
    return synthetic.changed(made, lambda row: row.concurrency == 32, **at_32)


def anchor(n: int, tok_s: float) -> synthetic.PointRow:
    row = synthetic.load_row(synthetic.GPU, "anchor", 8, n)
    return replace(row, tok_s=tok_s, started_at=f"2026-01-02T03:{4 + n:02}:00Z")


def objectives() -> list[synthetic.PointRow]:
    """Return a sweep of three repeats: at one level they disagree, one is of failed requests; and its anchor."""
    made = [synthetic.load_row(synthetic.GPU, "concurrency", c, r) for c in (1, 8, 16, 24, 32) for r in range(3)]
    made += [anchor(n, tok_s) for n, tok_s in enumerate((3000.0, 3030.0, 2800.0, 2950.0))]
    return [*made, synthetic.failed(synthetic.load_row(synthetic.GPU, "concurrency", 64, 0), "load_error_rate")]


def in_company(neighbours_cost: float, control: int = 2) -> list[synthetic.PointRow]:
    """Return a sweep beside another session, its anchor (the last reading alone already) and its control."""
    made = [synthetic.load_row(synthetic.GPU, "concurrency", c, r) for c in (1, 8, 16) for r in range(2)]
    made += [anchor(n, tok_s * (1 - neighbours_cost)) for n, tok_s in enumerate((3000.0, 3030.0, 2980.0))]
    made = [replace(row, co_running_sessions=["other"]) for row in made] + [anchor(3, 3020.0)]
    alone = [synthetic.load_row(synthetic.GPU, "control", 8, n) for n in range(control)]
    return made + [replace(row, tok_s=2990.0 + 20 * (row.repeat or 0)) for row in alone]


FULL = synthetic.family("qwen2.5-1.5b", synthetic.GPU)


def envelope() -> list[synthetic.PointRow]:
    """Return cells that agree, one that does not, one that failed and two that were pruned."""
    made = [synthetic.envelope_row(FULL, 1024, 8), synthetic.envelope_row(FULL, 512, 16)]
    made += [synthetic.envelope_row(FULL, 1024, 9, preemptions=3)]
    made += [synthetic.envelope_row(FULL, 512, 17), synthetic.envelope_row(FULL, 1024, 4)]
    made += [synthetic.envelope_row(FULL, 1024, 32, waiting_max=24, kv_usage_max=0.99)]
    lost, one = synthetic.envelope_row(FULL, 512, 40), synthetic.envelope_row(FULL, 512, 1)
    decided = synthetic.failed(one, "", "all fit: 8 x 1024 tokens did", "pruned")
    return [*made, synthetic.failed(lost, "engine_dead"), replace(decided, failure_class=None)]


SLIDING = synthetic.family("tiny-sliding", synthetic.CPU, lengths=(512, 1024, 2048, 4096, 8192))
GEMMA = synthetic.family(
    "gemma-3-4b", synthetic.GPU, lengths=(512, 2048, 4096, 16384), batched={"committed": 2048, "utilization": 8192}
)
MLA = synthetic.family("deepseek-v2-lite", synthetic.GPU, gpus=2)
WINDOWS = synthetic.family("phi-3-mini-4k", synthetic.GPU)
LINEAR = synthetic.family(
    "qwen3-next-cut", synthetic.GPU, simulated=True, engine="sim", device="sim", device_name="SIM"
)


def about_kv(shape: synthetic.Shape) -> list[synthetic.PointRow]:
    """Return memory points, near-full levels and a sweep: what the notes on KV read."""
    return [row for row in synthetic.rows(shape) if row.purpose not in ("comparison", "batching")]


def surprising(shape: synthetic.Shape) -> list[synthetic.PointRow]:
    """Return rows whose near-full levels do not do what the arithmetic says, at lengths that the server counted."""
    changes: dict[int, dict[str, object]] = {
        4: {"preemptions": 2, "kv_usage_max": 0.41},
        8: {"preemptions": None},
        16: {"waiting_capacity_max": 2, "kv_usage_max": 0.99, "running_max": 15},
        32: {"preemptions": 0, "waiting_max": 0, "kv_usage_max": 0.7, "running_max": 32},
    }
    made = []
    for row in about_kv(shape):
        if row.purpose == "near_full_context":
            row = replace(row, mean_prompt_tokens=3999.4 + (row.concurrency or 0) / 100, mean_completion_tokens=63.9)
            row = replace(row, **changes.get(row.concurrency or 0, {}))
        elif row.purpose == "concurrency":
            row = replace(row, max_num_seqs=16)
        made.append(row)
    return made


def open_loop(keeps_up_to: float = 8) -> list[synthetic.PointRow]:
    """Return rates of three repeats, whose statistics are those of their requests; beyond `keeps_up_to` too much."""
    made = []
    for rate in (1, 4, 8, 16):
        for repeat in range(3):
            row = synthetic.load_row(synthetic.GPU, "rate", rate, repeat)
            found = keeping_up(row.requests)
            assert found is not None
            row = replace(row, concurrency=None, arrivals="poisson, 30 s", request_rate=float(rate), sweep="rate")
            row = replace(row, **asdict(found) | {"keeps_up": rate <= keeps_up_to})
            made.append(replace(row, offered_qps=1.01 * rate, most_in_flight=2 * rate + repeat))
    return made


def nearly_full() -> list[synthetic.PointRow]:
    """Return memory, a sweep and near-full levels of three repeats, on a pool sized for fewer than the target."""
    made = [row for row in synthetic.rows() if row.purpose in ("kv_scaling", "concurrency")]
    for level in (4, 8, 16):
        row = replace(synthetic.ladder_row(synthetic.GPU, level), sequences=8)
        for repeat in range(3):
            one = synthetic.loaded(synthetic.GPU, row, level, 2 * level + 4, jitter=20 + 0.2 * repeat)
            made.append(replace(one, point_id=f"{row.point_id}-r{repeat}", repeat=repeat))
    return made


def with_steps(rows: list[synthetic.PointRow]) -> list[synthetic.PointRow]:
    """Return rows in which the engine's steps grow with the level, and prompts are what the server counted."""
    return [replace(r, server_step_mean_tokens=1.5 * (r.concurrency or 1), mean_prompt_tokens=12.25) for r in rows]


def cut_off() -> list[synthetic.PointRow]:
    """Return a sweep that two points lack of, whose steady parts are far quicker than the whole runs."""
    return [replace(row, steady_p95_e2e_s=0.01 + (row.repeat or 0) / 1000) for row in repeated(0.3)[:-2]]


def bounds_apart(rows: list[synthetic.PointRow]) -> list[synthetic.PointRow]:
    """Return rows whose repeats fall into several buckets of the server's histograms."""
    return [replace(row, server_ttft_p95_le_s=(0.25, 0.5, 0.75)[row.repeat or 0]) for row in rows]


MANIFESTS: dict[str, dict[str, Any]] = {
    "gpu": {"slo": {"p95_e2e_s": 0.25}, "cost": {"gpu_hour": 2.5}},
    "two cards": {"slo": {"p95_e2e_s": 0.16, "p95_ttft_s": 0.0225}, "cost": {"gpu_hour": 4}},
    "simulated": {"slo": {"p95_tpot_s": 0.0025}, "cost": {"gpu_hour": 2.5}},
    "spoiled": {"slo": {"p95_e2e_s": 0.25}},
    "repeated": {"slo": {"p95_e2e_s": 5, "p95_ttft_s": 0.5, "p95_tpot_s": 0.1}, "cost": {"gpu_hour": 1}},
    "open loop": {"slo": {"p95_e2e_s": 0.3}, "cost": {"gpu_hour": 3}},
    "cpu, few": {"slo": {"p95_e2e_s": 10}, "cost": {"gpu_hour": 3}},
    "sweep alone": {"slo": {"p95_ttft_s": 0.01}},
    "no power": {"slo": {"p95_e2e_s": 0.05}},
    "objectives": {"slo": {"p95_ttft_s": 0.3, "p95_tpot_s": 0.00405}},
    "straddling": {"slo": {"p95_e2e_s": 0.0651}},
    "nearly full": {"slo": {"p95_e2e_s": 0.25, "p95_ttft_s": 0.5}},
    "cut off": {
        "slo": {"p95_e2e_s": 0.0651},
        "status": "interrupted",
        "sessions": [
            {
                "id": "session-load",
                "model": {"config": None},
                "points": [{"id": row.point_id} for row in repeated(0.3)],
            }
        ],
    },
}
"""Objectives and prices of the runs that have them."""
RUNS = {
    "objectives": objectives(),
    "envelope": envelope(),
    "in company": in_company(0.2),
    "in company, at no cost": in_company(0.0),
    "sliding": about_kv(SLIDING),
    "sliding, two batches": surprising(GEMMA),
    "mla, two cards": about_kv(MLA),
    "linear, simulated": about_kv(LINEAR),
    "linear, cpu": about_kv(synthetic.family("tiny-linear", synthetic.CPU)),
    "window of every layer": about_kv(WINDOWS),
    "gpu": synthetic.rows(),
    "spoiled": spoiled(synthetic.GPU),
    "two cards": synthetic.rows(replace(synthetic.GPU, gpus=2)),
    "older account": synthetic.rows(),
    "cpu": synthetic.rows(synthetic.CPU),
    "simulated": synthetic.rows(replace(synthetic.GPU, simulated=True, engine="sim", device="sim", device_name="SIM")),
    "few": [r for r in synthetic.rows() if r.point_id in ("committed-512", "committed-1024", "concurrency-c8-r0")],
    "cpu, few": synthetic.short_cpu_rows(),
    "cut": synthetic.changed(synthetic.rows(), lambda row: True, model_cut="4 of 32 layers", moe=True),
    "saturated": synthetic.rows(replace(synthetic.GPU, saturation=0.3)),
    "sweep alone": [r for r in synthetic.rows(replace(synthetic.GPU, saturation=0.3)) if r.purpose == "concurrency"],
    "repeated": bounds_apart(with_steps(repeated(0.3, max_num_seqs=16, running_max=16, waiting_max=9))),
    "cut off": cut_off(),
    "windows, load alone": [row for row in about_kv(WINDOWS) if row.purpose == "concurrency"],
    "straddling": repeated(0.3),
    "nearly full": nearly_full(),
    "open loop": open_loop(),
    "open loop, no objective": open_loop(),
    "repeated, border": repeated(3.5, preemptions=2, waiting_capacity_max=3, kv_usage_max=0.97),
    "host too slow": synthetic.rows(replace(synthetic.GPU, gpu_util_pct=27.0)),
    "drawn": synthetic.changed(
        synthetic.rows(),
        lambda row: row.kind == "load",
        api="chat",
        prompt_lengths="lognormal of mean 512 and std 400 from 64 to 4096",
        output_lengths="uniform from 8 to 64",
        shared_prefix="8 shared prefixes of 256 tokens",
    ),
    "short windows": synthetic.changed(
        synthetic.rows(replace(synthetic.GPU, limit_tok_s=100 * synthetic.GPU.limit_tok_s)),
        lambda row: row.kind == "load",
        api="chat",
        mean_prompt_tokens=14.5,
        text_cost_assumed=True,
        prefix_hit_ratio=0.1,
        prefix_shared_ratio=0.125,
    ),
    "no power": synthetic.changed(synthetic.rows(), lambda row: True, power_w=None, energy_j=None),
}


CONFIGS = {
    "envelope": FULL.config,
    "sliding": SLIDING.config,
    "sliding, two batches": GEMMA.config,
    "mla, two cards": MLA.config,
    "linear, simulated": LINEAR.config,
    "linear, cpu": published("tiny-linear"),
    "window of every layer": WINDOWS.config,
    "windows, load alone": WINDOWS.config,
}
"""What the manifest holds of the models whose layers differ."""

MANIFEST = {
    "argv": ["python", "-m", "orchestrator", "+sweep=capacity", "seed=7"],
    "created_at": "2026-01-02T03:04:04+00:00",
    "schema_version": 4,
    "python": "3.12.3",
    "versions": {"vllm": "0.25.1", "torch": "2.11.0"},
    "experiments": [{"seed": 7}],
}


ALL_PARTS = synthetic.account_of


def older(row: synthetic.PointRow) -> list[MemoryAccount]:
    """Return an account by workers that did not read what is outside torch, and were not asked when loaded."""
    return [replace(part, **synthetic.NOT_READ_INSIDE) for part in ALL_PARTS(row) if part.moment != "loaded"]


@pytest.fixture(scope="module", params=sorted(RUNS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    left_behind = {"session-c1024": 700 * MIB, "session-u2048": 90 * MIB} if request.param == "spoiled" else None
    with patch.object(synthetic, "account_of", older) if request.param == "older account" else nullcontext():
        run_dir = synthetic.write_run(tmp_path_factory.mktemp("run"), RUNS[request.param], left_behind)
    target = (
        {"concurrency": 20, "context_tokens": 3000}
        if request.param == "spoiled"
        else {"concurrency": 16, "context_tokens": 4096}
    )
    sessions = synthetic.planned(RUNS[request.param], CONFIGS.get(request.param))
    manifest = MANIFEST | {"target": target, "sessions": sessions} | MANIFESTS.get(request.param, {})
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    with patch("analysis.artifacts.write_plots", return_value=[]):  # no figures in them, and they take the time
        reduce(run_dir)
    return run_dir


def registered(run: Path) -> list[dict[str, str]]:
    with (run / "figures.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_number_on_a_page_is_a_registered_figure(run: Path) -> None:
    pages = [*run.glob("*.md"), run / "report.html"]
    assert len(pages) > 1
    for page in pages:
        texts = {row["text"] for row in registered(run) if row["file"] == page.name}
        known = {number for text in texts for number in NUMBER.findall(text)}
        words = page.read_text()
        left = NAMES_WITH_DIGITS.sub("", prose(words) if page.suffix == ".html" else words)
        for text in sorted((t for t in texts if not NUMBER.fullmatch(t)), key=len, reverse=True):
            left = left.replace(text, " ")
        assert set(NUMBER.findall(left)) <= known, page.name


def test_every_figure_is_recomputed_from_the_tables(run: Path) -> None:
    auditor = Auditor(run)
    rows = registered(run)
    assert len(rows) > 20
    for row in rows:
        expected = auditor.value(row["name"])
        if isinstance(expected, str):
            assert row["value"] == expected, row["name"]
        elif expected is None or np.isnan(expected):
            assert row["value"] == "", row["name"]
        else:
            assert float(row["value"]) == pytest.approx(expected, rel=1e-6, abs=1e-6), row["name"]


def test_text_of_a_figure_is_its_value_rounded(run: Path) -> None:
    for row in registered(run):
        number = re.fullmatch(r"([+-]?[\d,]+(?:\.\d+)?(?:e[+-]\d+)?)(?: %|x)?", row["text"])
        if number and re.fullmatch(r"[-\d.e+]+", row["value"]):
            shown = number[1].replace(",", "")
            value = float(row["value"])
            digits = len(shown.split(".")[1].split("e")[0]) if "." in shown else 0
            exponent = int(shown.split("e")[1]) if "e" in shown else 0
            assert abs(float(shown) - value) <= 0.5000001 * 10 ** (exponent - digits), row


def _worst_client_ms(rows: pd.DataFrame, column: str) -> float:
    return max(1000 * client[column] for clients in rows.clients for client in clients if client[column] is not None)


@functools.cache
def student_t(probability: float, df: int) -> float:
    """By numbers: nothing of analysis."""
    x = np.linspace(0, 400, 2_000_001)
    density = (1 + x**2 / df) ** (-(df + 1) / 2)
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    area = np.cumsum(density) - (density + density[0]) / 2  # trapezoids
    return float(np.interp(probability - 0.5, area * scale * (x[1] - x[0]), x))


class Auditor:
    """Recomputes figures by their names from points.parquet and requests.parquet."""

    def __init__(self, run: Path) -> None:
        self.points = pd.read_parquet(run / "points.parquet")
        self.requests = pd.read_parquet(run / "requests.parquet")
        self.sessions = pd.read_parquet(run / "sessions.parquet").set_index("session_id")
        self.run = run
        self.manifest = json.loads((run / "manifest.json").read_text())
        self.target, self.slo = self.manifest["target"], self.manifest.get("slo", {})
        self.gpu_hour = self.manifest.get("cost", {}).get("gpu_hour")
        self.config = next((session["model"]["config"] for session in self.manifest["sessions"]), None)
        self.ranks = max(int(self.points.gpus.iloc[0]), 1)
        self.cases: list[tuple[str, Callable[..., float | str | None]]] = [
            (r"target\.(\w+)", lambda key: self.target[key]),
            (r"(?:envelope\.(?:len|c)|question\.)(\d+)", float),
            (r"slo\.(\w+)", lambda key: self.slo[key]),
            (r"cost\.gpu_hour", lambda: self.gpu_hour),
            (r"rule\.bucket_([\d.]+)", float),
            (r"neighbours\.([^.]+)\.(alone|beside)\.(\w+)", self.company),
            (r"neighbours\.([^.]+)\.(tok_s|p95_e2e_s)_(share|low|high)_pct", self.neighbour),
            (r"neighbours\.[^.]+\.title", self.title),
            (r"neighbours\.[^.]+\.concurrency", lambda: self.anchors_of("session-load").concurrency.iloc[0]),
            (r"anchor\.([^.]+)\.(?:r(\d+)\.)?(\w+)", self.anchor),
            (r"cells\.[^.]+\.(?:len|c)(\d+)", float),
            (r"cells\.[^.]+\.len(\d+)\.c(\d+)\.(\w+)", self.cell),
            (r"cells\.[^.]+\.(\w+)", self.cells),
            (r"(\w+)\.[^.]+\.slo_(held|broke|undecided|ratio)", self.border),
            (r"(\w+)\.[^.]+\.noise_(meets|undecided|misses)", self.standing),
            (r"op\.[^.]+\.(\w+)", self.subject),
            (r"cut\.([^.]+)\.(model|words)", self.cut),
            (r"run\.(\w+)", self.of_the_run),
            (r"lost\.points", lambda: float((~self.points.status.isin(["measured", "pruned"])).sum())),
            (r"manifest\.(\w+)", lambda key: str(self.manifest[key])),
            (r"manifest\.versions\.(\d+)\.(package|version)", self.package),
            (r"server\.(.+)\.(\w+)", self.server),
            (r"report\.(\w+)\.bin_s", self.bin_s),
            (r"load\.gpu_util_(lowest|highest)_pct", self.gpu_util),
            (r"(load|memory)\.telemetry_hz", lambda kind: self.watched(kind).telemetry_hz.median()),
            (r"(load|memory)\.telemetry_lowest_hz", lambda kind: self.watched(kind).telemetry_hz.min()),
            (r"(load|memory)\.sampling_cpu_pct", lambda kind: 100 * self.watched(kind).sampling_cpu_share.max()),
            (r"point\.(.+)\.(.+)\.(outcome|message|model|purpose|max_model_len|concurrency|points|alike)", self.lost),
            (r"kv\.[^.]+\.envelope(?:\.pool(\d+))?\.len(\d+)\.c(\d+)[._](\w+)", self.envelope_cell),
            (r"kv\.[^.]+\.envelope(?:\.pool(\d+))?\.(\w+)", lambda p, w: self.envelope(p).value(w, self.target)),
            (r"kv\.[^.]+\.(\w+)(\.error_pct)?", self.kv),
            (r"(committed|utilization)\.[^.]+\.pages\.len(\d+)\.(\w+)", self.page),
            (r"(committed|utilization)\.[^.]+\.pages\.([\w.]+)", self.pages),
            (r"(committed|utilization)\.[^.]+\.len(\d+)\.engine_(sequence_mib|difference_pct)", self.held),
            (
                r"(committed|utilization)\.[^.]+\.len(\d+)\.account\.(ready|loaded|peak)\.(?:card(\d+)\.)?(\w+)",
                self.account,
            ),
            (r"(committed|utilization)\.[^.]+\.len(\d+)\.(?:account\.)?(foreign_process\w*)", self.on_the_card),
            (r"committed\.[^.]+\.len(\d+)\.(ready|loaded)\.moved\.(\w+)_mib", self.moved_to),
            (r"committed\.[^.]+\.(ready|loaded)\.moved\.(\w+)_mib", self.moved_over_all),
            (r"committed\.[^.]+\.(ready|loaded)\.(\w+)(\.error_pct)?", self.line),
            (r"committed\.[^.]+\.len(\d+)\.(?:(ready|loaded)\.)?(\w+)", self.committed),
            (r"committed\.[^.]+\.(stairs|formula_intervals|formula_mean_bytes_per_token|block_tokens)", self.stairs),
            (r"committed\.[^.]+\.sequences", lambda: self.points.sequences[self.points["mode"] == "committed"].iloc[0]),
            (r"utilization\.[^.]+\.len(\d+)\.(\w+)", self.utilization),
            (r"(committed|utilization)\.[^.]+\.account\.cards_apart_mib", self.cards_apart),
            (r"utilization\.[^.]+\.mem_(ready|loaded)_range(?:\.(\w+))?_mib", self.range),
            (r"utilization\.[^.]+\.(\w+)", self.flat),
            (r"(\w+)\.[^.]+\.c(\d+)\.change_from_(\d+)\.(tok_s|p95_e2e_s)_(?:(low|high)_)?pct", self.change),
            (r"(\w+)\.[^.]+\.c(\d+)\.from_other_table\.p95_e2e_s_(?:(low|high)_)?pct", self.from_twin),
            (r"(\w+)\.[^.]+\.[cr]([\d.]+)\.(?:(ratio)\.)?(\w+)", self.level),
            (r"(\w+)\.[^.]+\.(\w+)", self.load),
        ]

    def value(self, name: str) -> float | str | None:
        if name in CONSTANTS:
            return CONSTANTS[name]
        for pattern, compute in self.cases:
            if match := re.fullmatch(pattern, name):
                return compute(*match.groups())
        raise AssertionError(f"no way to recompute {name}")

    # --- rows ---

    @functools.cache  # noqa: B019
    def memory(self, mode: str) -> pd.DataFrame:
        rows = self.points[(self.points.purpose == "kv_scaling") & (self.points["mode"] == mode)]
        return rows[rows.status == "measured"].set_index("max_model_len").sort_index()

    @functools.cache  # noqa: B019 - an auditor lives for one test
    def levels(self, purpose: str) -> pd.DataFrame:
        rows = self.points[(self.points.purpose == purpose) & (self.points.status == "measured")].copy()
        for point_id, requests in self.requests.groupby("point_id"):
            at = rows.index[rows.point_id == point_id]
            ok = requests[requests.ok]
            if len(at):  # statistics again, from the requests themselves
                rows.loc[at, "mean_e2e_s"] = ok.e2e_s.mean()
                rows.loc[at, "p95_e2e_s"] = np.percentile(ok.e2e_s, 95)
                rows.loc[at, "p50_ttft_s"] = np.percentile(ok.ttft_s, 50)
                rows.loc[at, "tok_s"] = ok.completion_tokens.sum() / rows.duration_s[at].iloc[0]
                rows.loc[at, "qps"] = len(ok) / rows.duration_s[at].iloc[0]
                rows.loc[at, "total_tok_s"] = rows.tok_s[at] + ok.prompt_tokens.sum() / rows.duration_s[at].iloc[0]
                for column in ("ttft_s", "tpot_s"):
                    rows.loc[at, f"p95_{column}"] = np.percentile(ok[column], 95)
                good = ok
                for column, limit in self.slo.items():
                    good = good[good[column.removeprefix("p95_")] <= limit]
                rows.loc[at, "goodput_qps"] = len(good) / rows.duration_s[at].iloc[0]
        if purpose == "rate":
            rows["concurrency"] = rows.request_rate
            for point_id, requests in self.requests.groupby("point_id"):
                sent = requests[requests.ok].sort_values("sent_s", kind="stable")
                n, at = len(sent) // 4, rows.index[rows.point_id == point_id]
                if len(at):
                    first, last, apart = (
                        sent[:n].mean(numeric_only=True),
                        sent[-n:].mean(numeric_only=True),
                        len(sent) - n,
                    )
                    rows.loc[at, "sent_qps"] = apart / (last.sent_s - first.sent_s)
                    rows.loc[at, "ended_qps"] = apart / (last.sent_s + last.e2e_s - first.sent_s - first.e2e_s)
        return rows

    @functools.cache  # noqa: B019
    def medians(self, purpose: str) -> pd.DataFrame:
        return self.levels(purpose).groupby("concurrency").median(numeric_only=True)

    # --- figures ---

    def first(self) -> pd.Series[Any]:
        return self.points[self.points.status == "measured"].iloc[0]

    def version(self) -> str:
        return f"vLLM {self.first().vllm_version}"

    def cut(self, slug: str, what: str) -> str:
        named = self.points[self.points.model.str.lower().str.replace(r"[^a-z0-9]+", "-", regex=True) == slug]
        return str(named["model" if what == "model" else "model_cut"].iloc[0])

    def of_the_run(self, what: str) -> float | str:
        rows = set(zip(self.points.session_id, self.points.point_id, strict=True))
        planned = {(s["id"], p["id"]) for s in self.manifest["sessions"] for p in s.get("points", ())}
        return {
            "id": str(self.points.run_id.iloc[0]),
            "points": float(len(self.points)),
            "measured": float((self.points.status == "measured").sum()),
            "planned": float(len(planned)),
            "planned_with_row": float(len(planned & rows)),
            "known": float(len(planned | rows)),
            "seeds": ", ".join(f"{seed:.0f}" for seed in sorted(self.points.seed.dropna().unique())),
        }[what]

    def package(self, number: str, what: str) -> str:
        return list(self.manifest["versions"].items())[int(number)][what == "version"]

    def server(self, session: str, what: str) -> float | str:
        columns = ["device_name", "vllm_version", "torch_version", "driver_version", "python_version"]
        words = self.sessions[columns].fillna("")
        alike = self.sessions[(words == words.loc[session]).all(axis=1)]
        if what == "servers":
            return float(len(alike))
        if what == "cards":
            return float(len({(row.node, device) for row in alike.itertuples() for device in row.device_ids}))
        return str(words.loc[session, what])

    def bin_s(self, table: str) -> float:
        starts = pd.to_datetime(self.points.set_index(["session_id", "point_id"]).started_at)
        samples = pd.read_parquet(self.run / f"{table}.parquet")
        at = samples.join(starts, on=["session_id", "point_id"])
        seconds = (at.started_at - starts.min()).dt.total_seconds() + at.t_s
        return max(1.0, float(seconds.max() - seconds.min()) / 300)

    def memory_left(self, row: pd.Series[Any]) -> float:
        assert np.isnan(row.memory_back_s)
        left = row.mem_after_stop_bytes - row.mem_baseline_bytes
        return float((left - row.mem_left_to_others_bytes) / MIB)

    def watched(self, kind: str = "load") -> pd.DataFrame:
        return self.points[(self.points.kind == kind) & (self.points.status == "measured")]

    def gpu_util(self, which: str) -> float:
        seen = self.watched().gpu_util_pct
        return float(seen.min() if which == "lowest" else seen.max())

    def lost(self, session: str, point: str, what: str) -> float | str:
        row = self.points[(self.points.session_id == session) & (self.points.point_id == point)].iloc[0]
        if what == "outcome":
            alone = row.failure_class in (None, row.status) or pd.isna(row.failure_class)
            return str(row.status) if alone else f"{row.status}: {row.failure_class}"
        if what == "message":
            return str(row.failure_message)
        if what == "alike":
            return float(((self.points.status == row.status) & (self.points.failure_class == row.failure_class)).sum())
        if what == "points":
            same = self.points[(self.points.status != "measured") & (self.points.purpose == row.purpose)]
            same = same[same.max_model_len == row.max_model_len]
            if not np.isnan(row.concurrency):
                same = same[same.concurrency == row.concurrency]
            return float((same.failure_class == row.failure_class).sum())
        return row[what] if isinstance(row[what], str) else float(row[what])

    @functools.cache  # noqa: B019
    def envelope(self, pool: str | None) -> EnvelopeAudit:
        return EnvelopeAudit(self.points, pool, self.config)

    def envelope_cell(self, pool: str | None, tokens: str, at_once: str, what: str) -> float:
        return self.envelope(pool).cell(int(tokens), int(at_once), what)

    def layout(self, mode: str) -> Layout:
        assert self.config is not None
        return Layout(self.config, self.memory(mode).iloc[0])

    def page(self, mode: str, tokens: str, what: str) -> float:
        return self.layout(mode).at(int(tokens), what)

    def pages(self, mode: str, what: str) -> float:
        if what == "max_num_batched_tokens":
            return float(self.memory(mode).max_num_batched_tokens.iloc[0])
        if what == "held":
            alike = self.layout("committed").flight == self.layout("utilization").flight
            modes = ("committed", "utilization") if alike else (mode,)
            return float(sum(self.memory(each).formula_max_concurrency.notna().sum() for each in modes))
        return self.layout(mode).figure(what)

    def held(self, mode: str, length: str, what: str) -> float:
        row = self.memory(mode).loc[int(length)]
        size = self.ranks * row.engine_kv_bytes / row.engine_max_concurrency
        return float(size / MIB if what == "sequence_mib" else 100 * (size / row.formula_bytes_per_sequence - 1))

    def stairs(self, what: str) -> float:
        rows = self.memory("committed")
        if what == "block_tokens":
            return self.layout("committed").block if self.config else float(rows.engine_block_size.iloc[0])
        size, block = rows.formula_bytes_per_sequence, self.ranks * rows.engine_kv_bytes / rows.engine_num_blocks
        mean = np.polyfit(size.index, size.to_numpy(), 1)[0]
        line = (mean * size.index.to_series().diff() * rows.sequences).iloc[1:]
        departs = (size.diff() * rows.sequences).iloc[1:] - line
        found = departs.abs() > np.maximum(0.01 * line.abs(), block.iloc[1:])
        return float({"stairs": found.sum(), "formula_intervals": len(line)}.get(what, mean))

    def kv(self, what: str, error: str | None) -> float | str | None:
        if what.startswith("context_step"):
            return 1024 * self.growth(2**20 if what.endswith("past_mib") else 0) / MIB
        if what == "narrowest_window_tokens":
            return float(self.layout("utilization").window)
        both = pd.concat([self.memory("committed"), self.memory("utilization")]).sort_index(kind="stable")
        known = both.formula_bytes_per_sequence.groupby(level=0).first()
        own = self.memory("committed").formula_bytes_per_sequence
        known = own if len(own) > 1 else known
        formula = np.polyfit(known.index, known.values, 1)[0]
        engine = self.engine_row().engine_bytes_per_token
        model = self.points.model.iloc[0]
        values: dict[str, float | str | None] = {
            "formula_bytes_per_token": formula,
            "engine_bytes_per_token": engine,
            "formula_marginal_bytes_per_token": both.formula_bytes_per_token.iloc[-1],
            "estimates_beside_formula": 1 + 2 * (len(self.memory("committed")) > 1),
            "estimates_apart": self.apart(formula),
            "estimates_furthest_pct": self.furthest(formula),
            "label": model,
            "title": self.title(),
            "version": self.version(),
        }
        if self.config:
            layout = self.layout("utilization")
            ends = None if layout.window is None else float(layout.window - 1 + layout.flight)
            values |= {"window_ends_tokens": ends, "block_tokens": layout.block}
        value = values[what]
        if error and what == "engine_bytes_per_token":
            return 100 * self.engine_error()
        if error:
            assert isinstance(value, float)
            return 100 * (value / formula - 1)
        return value

    def growth(self, tokens: int) -> float:
        """Bytes of a further token, by a request that only decodes."""
        layout = self.layout("utilization" if len(self.memory("utilization")) else "committed")
        before, after = (layout.decoding(tokens + n * layout.block) for n in (1, 2))
        return (after - before) / layout.block

    def engine_row(self) -> pd.Series[Any]:
        both = pd.concat([self.memory("committed"), self.memory("utilization")]).sort_index(kind="stable")
        told = both[both.engine_bytes_per_token.notna()]
        longest = told[told.index == told.index.max()]
        exact = longest[longest["mode"] == "committed"]
        return (exact if len(exact) else longest).iloc[0]

    def engine_error(self) -> float:
        row = self.engine_row()
        sequence = self.ranks * row.engine_kv_bytes / row.engine_max_concurrency
        return float(sequence / row.formula_bytes_per_sequence - 1)

    def apart(self, formula: float) -> float:
        return sum(abs(error) > 0.01 for error in self.errors(formula))

    def furthest(self, formula: float) -> float:
        return 100 * max(self.errors(formula), key=abs)

    def errors(self, formula: float) -> list[float]:
        slopes = [self.line(word, "slope_bytes_per_token", None) or formula for word in ("ready", "loaded")]
        return [*(value / formula - 1 for value in slopes), self.engine_error()]

    def title(self) -> str:
        row = self.first()
        device = f"{row.gpus} x {row.device_name}" if row.gpus > 1 else row.device_name
        device = f"CPU backend ({row.device_name})" if row.device == "cpu" else device
        device = f"simulated {row.device_name}" if row.simulated else device
        return ", ".join(
            [
                row.model,
                device,
                *(["simulated"] if row.simulated and "simulated" not in device else []),
                "dummy weights",
                *(["MoE: routing and speed not representative"] if row.moe else []),
                *([f"cut: {row.model_cut}"] if isinstance(row.model_cut, str) else []),
            ]
        )

    @functools.cache  # noqa: B019
    def deltas(self, word: str) -> pd.DataFrame:
        rows = self.memory("committed")
        made = pd.DataFrame({"delta": rows[f"mem_{word}_bytes"].diff(), "tokens": rows.index.to_series().diff()})
        made["expected"] = rows.formula_bytes_per_sequence.diff() * rows.sequences
        made["sequences"] = rows.sequences
        made["departure"] = made.delta - made.expected
        unit = 8 * MIB if rows.device.iloc[0] == "cpu" else 2 * MIB
        floor = self.ranks * (rows.engine_kv_bytes / rows.engine_num_blocks + unit)
        made["grain"] = floor
        made["step"] = made.departure.abs() > np.maximum(floor, 0.01 * made.expected.abs())
        return made.iloc[1:]

    def line(self, word: str, what: str, error: str | None) -> float | None:
        rows = self.memory("committed")
        x, y = rows.index.to_numpy(float), rows[f"mem_{word}_bytes"].to_numpy(float)
        if len(x) < 2:
            return None
        slope, intercept = np.polyfit(x, y, 1)
        pools = np.polyfit(x, self.ranks * rows.engine_kv_bytes.to_numpy(float), 1)[1]
        residuals = y - (intercept + slope * x)
        deltas = self.deltas(word)
        per_token = slope / rows.sequences.iloc[0]
        if error:
            return float(self.kv_error(per_token))
        return float(
            {
                "slope_bytes_per_token": per_token,
                "intercept_mib": intercept / MIB,
                "pools_intercept_mib": pools / MIB,
                "besides_pool_mib": (intercept - pools) / MIB,
                "r_squared": 1 - (residuals**2).sum() / ((y - y.mean()) ** 2).sum(),
                "max_residual_mib": abs(residuals).max() / MIB if abs(residuals).max() > 1 else 0.0,
                "lengths": len(x),
                "intervals": len(deltas),
                "steps": deltas.step.sum(),
                "grain_mib": deltas.grain.max() / MIB,
                "largest_departure_mib": deltas.departure.loc[deltas.departure.abs().idxmax()] / MIB,
            }[what]
        )

    def kv_error(self, value: float) -> float:
        formula = self.kv("formula_bytes_per_token", None)
        assert isinstance(formula, float)
        return 100 * (value / formula - 1)

    def on_the_card(self, mode: str, length: str, what: str) -> float | str:
        rows = self.at("kv_scaling", "max_model_len", int(length))
        return self.words(rows[rows["mode"] == mode], what)

    def at(self, purpose: str, column: str, place: int) -> pd.DataFrame:
        return self.points[(self.points.purpose == purpose) & (self.points[column] == place)]

    @staticmethod
    def words(rows: pd.DataFrame, what: str) -> float | str:
        """What stands in a list column of these rows: reasons, or the first process and how many further ones."""
        if what == "throttle_reasons":
            return " and ".join(sorted({word for words in rows.throttle_reasons.dropna() for word in words}))
        seen = [word for words in rows.foreign_processes.dropna() for word in words]
        return seen[0] if what == "foreign_process" else float(len({word.split(":")[0] for word in seen}) - 1)

    def committed(self, length: str, word: str | None, what: str) -> float:
        at = int(length)
        rows = self.memory("committed")
        if what == "max_model_len":
            return at
        row = rows.loc[at] if at in rows.index else None
        if row is None:
            return float("nan")
        if what == "memory_left_mib":
            return self.memory_left(row)
        if what.startswith(("mem_ready", "mem_loaded", "mem_baseline", "mem_tree")):
            return float(row[what.replace("_mib", "_bytes")] / MIB)
        if what in ("block_mib", "engine_block_size"):
            return float(
                self.ranks * row.engine_kv_bytes / row.engine_num_blocks / MIB if what == "block_mib" else row[what]
            )
        if what == "formula_bytes_per_token":
            sizes = rows.formula_bytes_per_sequence
            return float((sizes.diff() / sizes.index.to_series().diff()).loc[at])
        change = self.deltas(word or "ready").loc[at]
        return float(
            {
                "delta_ready_mib": change.delta / MIB,
                "delta_formula_mib": change.expected / MIB,
                "bytes_per_token_ready": change.delta / (change.tokens * change.sequences),
                "departure_pct": 100 * change.departure / change.expected,
                "step_delta_mib": change.delta / MIB,
                "step_expected_mib": change.expected / MIB,
                "step_departure_mib": change.departure / MIB,
                "step_departure_pct": 100 * change.departure / change.expected,
            }[what]
        )

    def cards(self, mode: str, length: str, moment: str) -> pd.DataFrame:
        session = self.memory(mode).loc[int(length)].session_id
        return pd.DataFrame([row for row in self.sessions.account[session] if row["moment"] == moment])

    def account(self, mode: str, length: str, moment: str, card: str | None, what: str) -> float | str:
        capture = self.sessions.graph_capture_bytes[self.memory(mode).loc[int(length)].session_id]
        if what == "graph_capture_gib":
            return float(capture / GIB)
        if what == "card":
            return f"GPU {card}"
        cards = every = self.cards(mode, length, moment)
        if card is not None:
            cards = every[every.device_id == f"GPU-{card}"]
        sums = cards.drop(columns=["moment", "device_id"]).astype(float).sum()
        parts = {
            "used": sums.used_bytes,
            "context": sums.context_bytes,
            "weights": sums.weights_bytes,
            "kv": sums.kv_bytes,
            "graphs": sums.graph_pool_bytes,
            "buffers": sums.buffer_bytes,
            "cache": sums.cached_bytes,
            "libraries": float(self.sessions.library_bytes.dropna().iloc[0]) * len(cards),
        }
        parts["residual"] = 2 * parts["used"] - sum(parts.values())
        in_torch = sum(parts[name] for name in ("weights", "kv", "graphs", "buffers", "cache"))
        parts["end_difference"] = sums.outside_bytes - parts["used"] + in_torch
        if cards.outside_now_bytes.notna().all():
            came = sums.outside_now_bytes - sums.outside_at_init_bytes
            went = capture - sums.graph_pool_bytes if len(every) == 1 else math.nan
            parts["with_graphs"] = went if sums.graph_pool_bytes else 0
            known = 0 if np.isnan(parts["with_graphs"]) else parts["with_graphs"]
            parts["since"] = came - parts["libraries"] - known
            parts["neither"] = parts["residual"] + parts["libraries"] - came
        if what == "residual_pct":
            return float(100 * abs(parts["residual"]) / parts["used"])
        return float(parts[what.removesuffix("_mib")] / MIB)

    def cards_apart(self, mode: str) -> float:
        used = [
            self.cards(mode, length, moment).used_bytes
            for length in self.memory(mode).index
            for moment in ("ready", "loaded", "peak")
        ]
        return float(max(held.max() - held.min() for held in used) / MIB)

    def range(self, word: str, what: str | None) -> float:
        column = self.memory("utilization")[f"mem_{word}_bytes"].dropna()
        if what is None:
            return (column.max() - column.min()) / MIB
        return self.part_moved("utilization", column.idxmin(), column.idxmax(), word, what)

    def part_moved(self, mode: str, shorter: int, longer: int, word: str, what: str) -> float:
        if what == "before":
            baselines = self.memory(mode).mem_baseline_bytes
            return float(baselines[longer] - baselines[shorter]) / MIB
        part = what if what != "kv_beyond_formula" else "kv"
        moment = word if len(self.cards(mode, str(shorter), word)) else "peak"
        before, after = (self.account(mode, str(at), moment, None, f"{part}_mib") for at in (shorter, longer))
        return after - before

    def moved(self, shorter: int, longer: int, word: str, what: str) -> float:
        rows = self.memory("committed")
        formula = rows.formula_bytes_per_sequence * rows.sequences / MIB
        beyond = formula[longer] - formula[shorter] if what == "kv_beyond_formula" else 0
        return self.part_moved("committed", shorter, longer, word, what) - beyond

    def moved_to(self, length: str, word: str, what: str) -> float:
        lengths = list(self.memory("committed").index)
        return self.moved(lengths[lengths.index(int(length)) - 1], int(length), word, what)

    def moved_over_all(self, word: str, what: str) -> float:
        lengths = self.memory("committed").index
        return self.moved(lengths[0], lengths[-1], word, what)

    def utilization(self, length: str, what: str) -> float | str:
        rows = self.memory("utilization")
        if what == "max_model_len":
            return int(length)
        if what == "engine_estimated_max_model_len":
            refused = self.points[(self.points["mode"] == "utilization") & (self.points.max_model_len == int(length))]
            return float(refused.engine_estimated_max_model_len.min())
        if int(length) not in rows.index:
            return float("nan")
        row = rows.loc[int(length)]
        if what == "gpu_memory_utilization":
            return f"{row.gpu_memory_utilization:g}"
        if what == "memory_left_mib":
            return self.memory_left(row)
        if what == "pool_gib":
            return float(self.ranks * row.engine_kv_bytes / GIB)
        if what == "held_at_once":
            return self.holds(row, int(length))
        return float(row[what.replace("_mib", "_bytes")] / MIB if what.endswith("_mib") else row[what])

    def flat(self, what: str) -> float | str:
        ready = self.memory("utilization").mem_ready_bytes / MIB
        if what.startswith("mem_loaded"):
            return self.flat_of(what, "mem_loaded", self.memory("utilization").mem_loaded_bytes / MIB)
        if what.startswith("mem_ready"):
            return self.flat_of(what, "mem_ready", ready)
        if what == "gpu_memory_utilization":
            return f"{self.memory('utilization').gpu_memory_utilization.max():g}"
        slope, intercept = np.polyfit(ready.index, ready.to_numpy(), 1)
        residuals = ready - (intercept + slope * ready.index)
        return float(
            {
                "slope_bytes_per_token": slope * MIB,
                "r_squared": 1 - (residuals**2).sum() / ((ready - ready.mean()) ** 2).sum(),
                "max_residual_mib": residuals.abs().max(),
            }[what]
        )

    def flat_of(self, what: str, prefix: str, column: pd.Series[float]) -> float:
        cpu = self.points.device.iloc[0] == "cpu"
        return float(
            {
                "lengths": len(column),
                "lowest_mib": column.min(),
                "highest_mib": column.max(),
                "flat_limit_mib": 0.05 * column.max() if cpu else 10 * self.ranks,
            }[what.removeprefix(f"{prefix}_")]
        )

    def joules(self, rows: pd.DataFrame) -> float:
        tokens = self.requests[self.requests.ok].groupby("point_id").completion_tokens.sum()
        return float((rows.energy_j / rows.point_id.map(tokens)).median())

    def watts(self, rows: pd.DataFrame) -> pd.Series[float]:
        return (rows.energy_j / rows.duration_s).fillna(rows.power_w)

    def level(self, purpose: str, concurrency: str, ratio: str | None, what: str) -> float | str:
        at = float(concurrency) if purpose == "rate" else int(concurrency)
        if what.startswith(("foreign", "throttle")):
            return self.words(self.at(purpose, "concurrency", at), what)
        if what in ("concurrency", "request_rate"):
            return at
        if what == "unmeasured":
            rows = self.points[(self.points.purpose == purpose) & (self.points.concurrency == at)]
            return float((rows.status != "measured").sum())
        medians, rows = self.medians(purpose), self.levels(purpose)
        own = rows[rows.concurrency == at]
        if not len(own):
            return float("nan")
        before = own[own.gap_p99_raised_s.isna()]
        lower = medians[medians.index < at]
        first, here = medians.iloc[0], medians.loc[at]
        tok_s = medians.tok_s
        previous = lower.iloc[-1] if len(lower) else None
        derived: dict[str, Callable[[], float]] = {
            "repeats": lambda: len(own),
            "repeats_with_others": lambda: float(own.foreign_processes.map(lambda seen: seen is not None).sum()),
            "requests": lambda: own.num_requests.sum(),
            "completed_fewest": lambda: own.completed.min(),
            "failed_requests": lambda: own.failed.sum(),
            "tok_s_spread_pct": lambda: 100 * (own.tok_s.max() - own.tok_s.min()) / here.tok_s,
            "client_lag_ms": lambda: 1000 * own.client_lag_s.max(),
            "connect_p99_ms": lambda: 1000 * own.p99_connect_s.max(),
            "gap_p99_raised_ms": lambda: 1000 * own.gap_p99_raised_s.max(),
            "ttft_p95_raised_ms": lambda: 1000 * own.ttft_p95_raised_s.max(),
            "ttft_p99_raised_ms": lambda: 1000 * own.ttft_p99_raised_s.max(),
            "e2e_p99_raised_ms": lambda: 1000 * own.e2e_p99_raised_s.max(),
            "tpot_p95_raised_ms": lambda: 1000 * own.tpot_p95_raised_s.max(),
            "client_gap_p99_raised_ms": lambda: _worst_client_ms(before, "gap_p99_raised_s"),
            "client_ttft_p95_raised_ms": lambda: _worst_client_ms(before, "ttft_p95_raised_s"),
            "client_e2e_p95_raised_ms": lambda: _worst_client_ms(before, "e2e_p95_raised_s"),
            "client_tpot_p95_raised_ms": lambda: _worst_client_ms(before, "tpot_p95_raised_s"),
            "client_slip_p99_ms": lambda: _worst_client_ms(own, "slip_p99_s"),
            "server_hz_lowest": lambda: own.server_hz[
                (own.server_hz * own.duration_s).round() < own.duration_s // 0.5
            ].min(),
            "warmup_rounds": lambda: own.warmup_tok_s.map(len).max(),
            "ran_out_after_s": lambda: own.duration_s.min(),
            "asked_s": lambda: own.asked_s.iloc[0],
            "shortest_s": lambda: own.duration_s.min(),
            "steady_completed_fewest": lambda: own.steady_completed.min(),
            "steady_tok_s_off_pct": lambda: 100 * (here.steady_tok_s / here.tok_s - 1),
            "steady_p95_e2e_s_off_pct": lambda: 100 * (here.steady_p95_e2e_s / here.p95_e2e_s - 1),
            "prompt_tokens_off_pct": lambda: 100 * (here.mean_prompt_tokens / own.prompt_tokens.iloc[0] - 1),
            "prefix_shared_pct": lambda: 100 * own.prefix_shared_ratio.max(),
            "client_wait_pct": lambda: 100 * own.client_wait_share.max(),
            "prefix_hit_pct": lambda: 100 * own.prefix_hit_ratio.max(),
            "token_count_difference": lambda: own.token_count_difference.abs().max(),
            "kv_usage_max_pct": lambda: 100 * own.kv_usage_max.max(),
            "kv_usage_max": lambda: own.kv_usage_max.max(),
            "p95_ratio": lambda: here.p95_e2e_s / previous.p95_e2e_s,
            "gain_over_one": lambda: here.tok_s / first.tok_s,
            "best_share_pct": lambda: 100 * here.tok_s / tok_s.max(),
            "anchor_drift_pct": lambda: float(self.anchor(own.session_id.iloc[0], None, "drift_pct")),
            "power_w": lambda: self.watts(own).median(),
            "power_share_pct": lambda: 100 * (self.watts(own) / own.power_limit_w).median(),
            "joules_per_output_token": lambda: self.joules(own),
            "generated_per_step": lambda: (own.server_generation_tokens / own.server_steps).median(),
            "p95_over_lowest": lambda: here.p95_e2e_s / first.p95_e2e_s,
            "prompt_tokens_sent": lambda: (
                here.prompt_tokens if np.isnan(here.mean_prompt_tokens) else here.mean_prompt_tokens
            ),
            "price_output": lambda: self.price(own) / here.tok_s,
            "price_total": lambda: self.price(own) / here.total_tok_s,
            "sequential_share_pct": lambda: 100 * first.tok_s / here.tok_s,
            "speedup_tok_s": lambda: here.tok_s / first.tok_s,
            "slowdown_mean_e2e": lambda: here.mean_e2e_s / first.mean_e2e_s,
        }
        if what in KneeAudit.OF_A_LEVEL:
            return self.knee(purpose).of_level(at, what)
        if ratio:
            return float(here[what] / first[what])
        if what.startswith("room_") or what == "target_holds":
            return self.room(own, own.most_in_flight.max() if purpose == "rate" else at, what)
        if what.endswith("_highest"):
            return float(own[what.removesuffix("_highest")].max())
        if what.endswith("_p95_le_s"):
            return float(own[what].max())
        return float(derived[what]() if what in derived else here[what])

    def price(self, rows: pd.DataFrame) -> float:
        return float(self.gpu_hour * rows.gpus.iloc[0] / 3600 * 1e6)

    def holds(self, row: pd.Series[Any], tokens: int) -> float:
        """Requests that a server's pool holds at once, by counting up; without a config, of one rate."""
        pool = self.ranks * row.engine_kv_bytes * (1 - 1 / row.engine_num_blocks)
        if self.config is None:
            return float(
                pool
                * row.engine_block_size
                / row.engine_block_size
                // (
                    row.formula_bytes_per_sequence
                    - (math.ceil(row.max_model_len / row.engine_block_size) - math.ceil(tokens / row.engine_block_size))
                    * row.engine_block_size
                    * row.formula_bytes_per_token
                )
            )
        layout = Layout(self.config, row)
        return float(next(n for n in range(10**6) if layout.at_once(n + 1, tokens) > pool))

    def room(self, rows: pd.DataFrame, requests: float, what: str) -> float:
        """What the level's server has of KV, counted in blocks: those of a length, less at every block's worth."""
        row = rows.iloc[0]
        block = row.engine_block_size * row.formula_bytes_per_token
        pool = max(row.gpus, 1) * row.engine_kv_bytes * (1 - 1 / row.engine_num_blocks)
        layout = Layout(self.config, row) if self.config else None

        def request(tokens: float) -> float:
            fewer = np.ceil(row.max_model_len / row.engine_block_size) - np.ceil(tokens / row.engine_block_size)
            return float(row.formula_bytes_per_sequence - fewer * block)

        def need(n: float, tokens: float) -> float:
            return n * request(tokens) if layout is None else layout.at_once(int(n), int(tokens))

        def holds(tokens: float) -> float:
            n = int(pool / need(1, tokens))
            return float(next(more for more in range(n, 10**6) if need(more + 1, tokens) > pool))

        held = need(requests, row.prompt_tokens + row.output_tokens)
        return float(
            {
                "room_pool_gib": lambda: pool / GIB,
                "room_held_gib": lambda: held / GIB,
                "room_free_gib": lambda: (pool - held) / GIB,
                "room_requests": lambda: requests,
                "room_further": lambda: holds(row.prompt_tokens + row.output_tokens) - requests,
                "room_would_run": lambda: min(
                    max(0, row.max_num_seqs - requests), holds(row.prompt_tokens + row.output_tokens) - requests
                ),
                "target_holds": lambda: holds(self.target["context_tokens"]),
            }[what]()
        )

    def from_twin(self, purpose: str, at: str, bound: str | None) -> float:
        """From the other table's level to this one's, with the noise of both."""
        here, there = self.knee(purpose), self.knee("batching" if purpose == "concurrency" else "concurrency")
        change = here.means.p95_e2e_s[int(at)] - there.means.p95_e2e_s[int(at)]
        if bound is not None:
            noises = [here.noise_at(of.purpose, int(at), "p95_e2e_s") for of in (here, there)]
            half = here.welch(noises[0], here.n[int(at)], noises[1], there.n[int(at)])
            change += half * (1 if bound == "high" else -1)
        return float(100 * np.expm1(change))

    def change(self, purpose: str, upper: str, lower: str, column: str, bound: str | None) -> float:
        audit = self.knee(purpose)
        change = audit.means[column][int(upper)] - audit.means[column][int(lower)]
        if bound is not None:
            noises = [audit.noise_at(purpose, int(at), column) for at in (upper, lower)]
            half = audit.welch(noises[0], audit.n[int(upper)], noises[1], audit.n[int(lower)])
            change += half * (1 if bound == "high" else -1)
        return float(100 * np.expm1(change))

    def subject(self, what: str) -> float | str:
        if what in ("title", "version"):
            return self.title() if what == "title" else self.version()
        loads = self.points[self.points.purpose.isin(["concurrency", "batching", "near_full_context", "rate"])]
        measured = loads[loads.status == "measured"]
        if what == "model_limit_tokens":
            return float(self.config["max_position_embeddings"] if self.config else "nan")
        if sized := re.fullmatch(r"pool_sequences_of_(\d+)", what):
            return self.pool_sequences(int(sized[1]), measured)
        double, n = 2 * self.target["context_tokens"], self.target["concurrency"]
        if len(self.memory("committed")) + len(self.memory("utilization")):
            audit = self.envelope(None)
            need, pool = audit.need(double, n), audit.size
            pool *= 1 - 1 / audit.row.engine_num_blocks
            holds = next(k for k in range(10**6) if audit.need(double, k + 1) > pool)
        else:
            row = measured.iloc[0]
            pool = self.ranks * row.engine_kv_bytes * (1 - 1 / row.engine_num_blocks)
            if self.config is None:
                need = n * double * row.formula_bytes_per_token
                holds = int(pool // (need / n))
            else:
                need, holds = Layout(self.config, row).at_once(n, double), self.holds(row, double)
        return float(
            {
                "double_context_tokens": double,
                "double_need_gib": need / GIB,
                "double_room_gib": pool / GIB,
                "double_share_pct": 100 * need / pool,
                "double_holds": holds,
            }[what]
        )

    def pool_sequences(self, tokens: int, loads: pd.DataFrame) -> float:
        """Full-length sequences, as the engine counts them, that the pool of a server as it is configured holds."""
        taken = self.memory("utilization")
        row = (taken if len(taken) else loads[loads.sequences.isna()]).iloc[0]
        pool = self.ranks * row.engine_kv_bytes * (1 - 1 / row.engine_num_blocks)
        one = Layout(self.config, row).sequence(tokens) if self.config else tokens * row.formula_bytes_per_token
        return float(pool // one)

    def load(self, purpose: str, what: str) -> float | str:
        row = self.points[(self.points.purpose == purpose) & (self.points.status == "measured")].iloc[0]
        if what == "title":
            return self.title()
        if what == "version":
            return self.version()
        if what == "lengths":
            chat = "chat, " if row.api == "chat" else ""
            mean = " on average" if isinstance(row.prompt_lengths, str) else ""
            return f"{chat}{row.prompt_tokens:.0f} + {row.output_tokens:.0f} tokens{mean}"
        if what == "predicted_kv_concurrency":
            return float(row.engine_max_concurrency)
        if what == "gpu_memory_utilization":
            return f"{row.gpu_memory_utilization:g}"
        if what == "label":
            return str(row.model)
        if what == "request_tokens":
            return float(row.prompt_tokens + row.output_tokens)
        if what == "predicted_requests":
            return self.holds(row, int(row.prompt_tokens + row.output_tokens))
        if what == "levels_in_both":
            return float(len(self.medians("batching").index.intersection(self.medians(purpose).index)))
        if what in ("bend_p95_ratio", "bend_tok_s_ratio"):
            at = self.knee(purpose).blow_up()
            after = min(level for level in self.medians(purpose).index if level > at[-1])
            of = self.medians(purpose)["p95_e2e_s" if what == "bend_p95_ratio" else "tok_s"]
            return float(of[after] / of[at[0]])
        if what == "steady_knee_range":
            return self.knee(purpose, "steady_").range()
        if what in KneeAudit.OF_A_CURVE:
            return self.knee(purpose).of_curve(what)
        value = row[what]
        return value if isinstance(value, str) else float(value)

    # --- objectives and envelope ---

    def border(self, purpose: str, what: str) -> float | str:
        rows = self.points[self.points.purpose == purpose]
        rows = rows[(rows.status == "measured") | (rows.failure_class == "load_error_rate")]
        met = pd.Series(True, rows.index)
        for name, limit in self.slo.items():
            met &= (rows[name] <= limit) if limit else True
        if purpose == "rate":
            met &= rows.keeps_up.map(lambda verdict: pd.isna(verdict) or bool(verdict))
        shares = met.groupby(rows["request_rate" if purpose == "rate" else "concurrency"]).mean()
        broke = shares.index[shares == 0].min()
        held = shares.index[(shares == 1) & ~(shares.index > broke)].max()
        torn = shares.index[(shares > 0) & (shares < 1) & (shares.index > held) & ~(shares.index > broke)]
        if what == "undecided":
            return ", ".join(f"{level:g}" for level in torn)
        return float({"held": held, "broke": broke, "ratio": broke / held}[what])

    def standing(self, purpose: str, what: str) -> str:
        """Levels by whether the intervals of all objectives lie below them, across, or one above."""
        audit = self.knee(purpose)
        found: dict[str, list[float]] = {"meets": [], "undecided": [], "misses": []}
        for at in audit.means.index:
            sides = {
                (audit.of_level(at, f"{c}_low") > s, audit.of_level(at, f"{c}_high") > s) for c, s in self.slo.items()
            }
            behind = set(self.levels(purpose).keeps_up[self.levels(purpose).concurrency == at])
            missed = (True, True) in sides or (purpose == "rate" and behind == {False})
            open_ = (False, True) in sides or (purpose == "rate" and behind != {True})
            found["misses" if missed else "undecided" if open_ else "meets"].append(at)
        return ", ".join(f"{at:g}" for at in found[what])

    def anchor(self, session: str, reading: str | None, what: str) -> float | str:
        rows = self.points[(self.points.purpose == "anchor") & (self.points.session_id == session)].set_index("repeat")
        if reading is not None:
            column = what.removesuffix("_change_pct")
            if what == "repeat":
                return float(reading)
            value, first = rows[column][int(reading)], rows[column][0]
            return float(value if column == what else 100 * (value / first - 1))
        values = {"title": self.title(), "concurrency": rows.concurrency[0], "readings": len(rows)}
        values["beside"] = (rows.co_running_sessions.map(len) > 0).sum()
        return values[what] if what in values else self.drift(rows)[what]

    def drift(self, rows: pd.DataFrame) -> dict[str, float]:
        """Every step and the line by numpy's least squares, levels as columns of the design."""
        load = self.points[(self.points.session_id == rows.session_id[0]) & (self.points.status == "measured")]
        load = load[load.purpose.isin(["batching", "concurrency"])]
        at = [pd.to_datetime(each.started_at, format="ISO8601").astype("int64") / 1e9 for each in (rows, load)]
        log = [np.log(each.tok_s) for each in (rows, load)]
        courses = [lambda t: (t - at[0].iloc[0]) / (at[0].iloc[-1] - at[0].iloc[0])]
        for i in range(len(rows) - 1 if len(rows) > 2 else 0):
            ends = at[0].iloc[i], at[0].iloc[i + 1]
            courses.append(lambda t, e=ends: t.map(lambda x: 0.0 if x <= e[0] else 1.0 if x >= e[1] else np.nan))
        found = []
        for course in courses:
            squares, df, slopes = 0.0, 0, []
            for each, t, y, names in zip(
                (rows, load), at, log, ("session_id", ["purpose", "concurrency"]), strict=True
            ):
                x = course(t)
                keep = x.notna()
                level = each[keep].groupby(names).ngroup()
                design = np.column_stack([x[keep], pd.get_dummies(level).astype(float)])
                solution = np.linalg.lstsq(design, y[keep], rcond=None)[0]
                squares += float(((y[keep] - design @ solution) ** 2).sum())
                df += max(int(keep.sum()) - level.nunique() - 1, 0)
                slopes.append((solution[0], x.var(ddof=0) * len(x)))
            slope, across = slopes[0]
            half = student_t(1 - 0.025 / len(courses), df) * math.sqrt(squares / df / across)
            found.append((abs(slope) / half, slope, half))
        _, slope, half = max(found)
        bounds = {"drift_pct": slope, "drift_low_pct": slope - half, "drift_high_pct": slope + half}
        return {name: float(100 * np.expm1(value)) for name, value in bounds.items()}

    def anchors_of(self, session: str) -> pd.DataFrame:
        rows = self.points[self.points.purpose.isin(["anchor", "control"]) & (self.points.session_id == session)]
        return rows[rows.status == "measured"]

    def company(self, session: str, kind: str, what: str) -> float:
        rows = self.anchors_of(session)
        rows = rows[(rows.co_running_sessions.map(len) > 0) == (kind == "beside")]
        return float(len(rows) if what == "readings" else np.exp(np.log(rows[what]).mean()))

    def neighbour(self, session: str, column: str, which: str) -> float:
        """Student's interval for two samples, of logarithms."""
        rows = self.anchors_of(session)
        beside = rows.co_running_sessions.map(len) > 0
        one, other = np.log(rows[column][~beside]), np.log(rows[column][beside])
        change = other.mean() - one.mean()
        if which != "share":
            df = len(rows) - 2
            pooled = (one.var(ddof=0) * len(one) + other.var(ddof=0) * len(other)) / df
            margin = student_t(0.975, df) * math.sqrt(pooled * (1 / len(one) + 1 / len(other)))
            change += margin if which == "high" else -margin
        return float(100 * np.expm1(change))

    def cells(self, what: str) -> float | str:
        rows = self.points[self.points.purpose == "envelope"]
        if what in ("title", "version"):
            return self.title() if what == "title" else self.version()
        measured = rows[rows.status == "measured"]
        pool = rows.engine_num_blocks.max() - 1
        fits = measured.concurrency * np.ceil((measured.prompt_tokens + measured.output_tokens) / 16) <= pool
        full = (measured.waiting_max > 0) & (measured.kv_usage_max >= 0.95)
        full &= measured.running_max < measured.concurrency
        seen = (measured.preemptions == 0) & ~full
        counts = {
            "cells": len(rows),
            "judged": len(measured),
            "pruned": (rows.status == "pruned").sum(),
            "agree": (fits == seen).sum(),
            "pool_blocks": pool,
            "max_model_len": rows.max_model_len.iloc[0],
            "engine_block_size": rows.engine_block_size.max(),
        }
        return float(counts[what])

    def cell(self, length: str, concurrency: str, what: str) -> float | str:
        rows = self.points[(self.points.purpose == "envelope") & (self.points.concurrency == int(concurrency))]
        (at,) = rows.index[rows.prompt_tokens + rows.output_tokens == int(length)]
        row, pool = rows.loc[at], self.points.engine_num_blocks.max() - 1
        if what == "reason":
            return str(row.failure_message)
        derived = {
            "context_tokens": float(length),
            "need_blocks": row.concurrency * math.ceil(int(length) / 16),
            "need_pct": 100 * row.concurrency * math.ceil(int(length) / 16) / pool,
            "kv_usage_max_pct": 100 * row.kv_usage_max,
        }
        return float(derived[what] if what in derived else row[what])

    @functools.cache  # noqa: B019
    def knee(self, purpose: str, window: str = "") -> KneeAudit:
        twins = [other for other in ("batching", "concurrency") if purpose in ("batching", "concurrency")]
        rows = [self.levels(name) for name in (purpose, *(twins or [purpose]))]
        if window:
            rows = [each.assign(tok_s=each[f"{window}tok_s"], p95_e2e_s=each[f"{window}p95_e2e_s"]) for each in rows]
        return KneeAudit(rows[0], pd.concat(rows[1:]))


class KneeAudit:
    """The knee again: t by integration, smoothing by the max-min formula, the set by trying heights of the peak."""

    OF_A_LEVEL = (
        *(
            f"{column}_{what}"
            for column in ("tok_s", "p95_e2e_s", "p95_ttft_s", "p95_tpot_s")
            for what in ("mean", "low", "high", "next")
        ),
        "tok_s_smoothed",
        "marginal_tok_s_per_s",
    )
    OF_A_CURVE = (
        *("tok_s_noise_pct", "p95_noise_pct", "noise_df", "knee_levels", "blow_up_levels", "read_off"),
        *("knee_range", "knee_untested"),
        *("read_off_blow_up", "repeated_up_to", "doubling_share_pct", "doubling_low_pct", "doubling_high_pct"),
    )

    def __init__(self, rows: pd.DataFrame, with_twins: pd.DataFrame) -> None:
        columns = ["tok_s", "p95_e2e_s", "p95_ttft_s", "p95_tpot_s"]
        logs = pd.concat([rows[["concurrency"]], np.log(rows[columns])], axis=1)
        logs["ratio"] = logs.p95_e2e_s - logs.tok_s
        self.medians = rows.groupby("concurrency").median(numeric_only=True)
        self.means, self.n = logs.groupby("concurrency").mean(), logs.groupby("concurrency").size()
        every = np.log(with_twins[columns]).assign(ratio=lambda log: log.p95_e2e_s - log.tok_s)
        cells = every.groupby([with_twins.purpose, with_twins.concurrency])
        self.cells, self.purpose = cells, rows.purpose.iloc[0] if len(rows) else ""
        self.df = int(cells.size().sum() - len(cells))
        self.repeated = [at for (_, at), n in cells.size().items() if n > 1]
        self.sd = (
            np.sqrt(((every - cells.transform("mean")) ** 2).sum() / self.df) if self.df else every.iloc[0] * np.nan
        )

    def t(self, probability: float) -> float:
        return student_t(probability, self.df)

    def noise_at(self, purpose: str, at: int, column: str) -> tuple[float, int]:
        """The standard deviation of one repeat at a level and its degrees of freedom, by Bartlett's test."""
        known = self.cells[column].agg(["var", "count"]).query("count > 1")
        df, pool = known["count"] - 1, self.sd[column] ** 2
        if (purpose, at) not in known.index or len(known) < 2 or not pool:
            return math.sqrt(pool), self.df
        statistic = (self.df * math.log(pool) - df @ np.log(known["var"])) if known["var"].min() else math.inf
        scale = 1 + ((1 / df).sum() - 1 / self.df) / (3 * (len(df) - 1))
        k = len(df) - 1
        if statistic / scale <= k * (1 - 2 / (9 * k)) ** 3:
            return math.sqrt(pool), self.df
        own, of_it = int(df[purpose, at]), known["var"][purpose, at]
        alone = (math.sqrt((of_it * own + pool) / (own + 1)), own + 1)
        return max(alone, (math.sqrt(pool), self.df), key=lambda n: n[0] * student_t(0.975, n[1]))

    @staticmethod
    def welch(one: tuple[float, int], n: int, other: tuple[float, int], m: int) -> float:
        """Half the interval of a difference of two means."""
        a, b = one[0] ** 2 / n, other[0] ** 2 / m
        df = one[1] if one == other or not a * b else int((a + b) ** 2 / (a**2 / one[1] + b**2 / other[1]))
        return float(student_t(0.975, df) * math.sqrt(a + b))

    @functools.cached_property
    def t_two_sided(self) -> float:
        return self.t(0.975)

    @functools.cached_property
    def t_one_sided(self) -> float:
        return self.t(0.95)

    def of_level(self, at: int, what: str) -> float:
        column, _, bound = what.rpartition("_")
        if what == "tok_s_smoothed":
            return float(np.exp(self.smoothed()[list(self.means.index).index(at)]))
        if what == "marginal_tok_s_per_s":
            return self.marginal(at)
        factor = {"mean": 0.0, "next": math.sqrt(1 + 1 / self.n[at])}.get(bound, self.n[at] ** -0.5)
        sd, df = self.noise_at(self.purpose, at, column) if self.df else (0.0, 1)
        half = student_t(0.975, df) * sd * factor
        return float(np.exp(self.means[column][at] + (-half if bound == "low" else half)))

    def marginal(self, at: int) -> float:
        lower = self.means.index[self.means.index < at]
        if not len(lower):
            return math.nan
        before = self.means.loc[lower[-1]]
        here = self.means.loc[at]
        noise = self.sd.p95_e2e_s * math.sqrt(1 / self.n[at] + 1 / self.n[lower[-1]]) if self.df else 0.0
        if here.p95_e2e_s - before.p95_e2e_s <= (self.t_one_sided * noise if self.df else 0):
            return math.nan
        return float((np.exp(here.tok_s) - np.exp(before.tok_s)) / (np.exp(here.p95_e2e_s) - np.exp(before.p95_e2e_s)))

    def of_curve(self, what: str) -> float | str:
        if what == "knee_levels":
            return self.listed(self.knees())
        if what == "knee_range":
            return self.range()
        if what == "knee_untested":
            return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in self.untested())
        if what == "blow_up_levels":
            return self.listed(self.blow_up())
        if what == "read_off":
            smooth = np.exp(self.smoothed())
            return float(self.means.index[smooth >= 0.95 * smooth.max()][0])
        if what == "read_off_blow_up":
            return float((self.medians.p95_e2e_s / self.medians.tok_s).idxmin())
        if what == "repeated_up_to":
            return float(max(self.repeated))
        if what.startswith("doubling"):
            return self.doubling(what.split("_")[1])
        if what == "noise_df":
            return self.df
        return float(100 * self.sd["tok_s" if what == "tok_s_noise_pct" else "p95_e2e_s"])

    def listed(self, levels: list[int]) -> str:
        words = [str(level) for level in levels]
        places = [list(self.means.index).index(level) for level in levels]
        if len(places) > 2 and places[-1] - places[0] == len(places) - 1:
            return f"{words[0]} to {words[-1]}"
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"

    def doubling(self, which: str) -> float:
        logs, top = self.means.tok_s, self.means.index[-1]
        half = float(np.interp(np.log(top / 2), np.log(logs.index), logs))
        factors = (logs.index == top) - np.array(
            [np.interp(np.log(top / 2), np.log(logs.index), row) for row in np.eye(len(logs))]
        )
        error = math.sqrt(float(factors**2 @ (1 / self.n)))
        margin = self.t_one_sided * self.sd.tok_s * error if self.df else 0.0
        return float(100 * np.expm1(logs[top] - half + {"share": 0, "low": -margin, "high": margin}[which]))

    def monotone(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        def mean(a: int, b: int) -> float:
            return float(np.average(x[a : b + 1], weights=w[a : b + 1]))

        n = len(x)
        return np.array([max(min(mean(a, b) for b in range(i, n)) for a in range(i + 1)) for i in range(n)])

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.means.tok_s.to_numpy(), self.n.to_numpy(float)

    def smoothed(self) -> np.ndarray:
        x, w = self.arrays()
        fits = []
        for cut in range(1, len(x) + 1):
            down = self.monotone(x[cut:][::-1], w[cut:][::-1])[::-1]
            fits.append(np.concatenate([self.monotone(x[:cut], w[:cut]), down]))
        return min(fits, key=lambda fit: float(w @ (x - fit) ** 2))

    def knees(self) -> list[int]:
        x, w = self.arrays()
        nearest = float(w @ (x - self.smoothed()) ** 2)
        tops = np.linspace(x.min(), x.max() + 0.06, 20_001)[:, None]
        floors, found = tops + math.log(0.95), []
        for i, level in enumerate(self.means.index):
            distances = []
            for peak in range(i, len(x)):
                below = np.minimum(self.monotone(x[:i], w[:i]), floors)
                shoulder = np.clip(self.monotone(x[i:peak], w[i:peak]), floors, tops)
                beyond = np.minimum(self.monotone(x[peak + 1 :][::-1], w[peak + 1 :][::-1])[::-1], tops)
                fit = np.concatenate([below, shoulder, tops, beyond], axis=1)
                distances.append(((fit - x) ** 2 @ w).min())
            if min(distances) - nearest <= (self.t_one_sided * self.sd.tok_s) ** 2:
                found.append(int(level))
        return found

    @property
    def highest(self) -> int:
        return self.knees()[-1]

    def below(self) -> int:
        return max((int(at) for at in self.means.index if at < self.knees()[0]), default=0)

    def untested(self) -> list[list[int]]:
        runs: list[list[int]] = []
        for number in sorted({*range(self.below() + 1, self.highest + 1)} - {*self.means.index}):
            if runs and runs[-1][-1] == number - 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        return runs

    def range(self) -> str:
        if not self.untested():
            return f"at concurrency {self.listed(self.knees())}"
        below, top = self.below(), self.highest
        return f"above concurrency {below} and up to {top}" if below else f"up to concurrency {top}"

    def blow_up(self) -> list[int]:
        u, n = self.means.ratio, self.n
        return [
            int(i)
            for i in u.index
            if all(u[i] - u[j] <= self.t_two_sided * self.sd.ratio * math.sqrt(1 / n[i] + 1 / n[j]) for j in u.index)
        ]


def test_typed_number_in_prose_is_refused() -> None:
    with pytest.raises(ValueError, match="a number is typed"):
        phrase("about 4 times")
    with pytest.raises(ValueError, match="a number is typed"):
        Document("a.md").table(["p95_e2e_s"], [["12"]])
    assert phrase("p95_e2e_s in 2**20").text == "p95_e2e_s in 2**20"


def test_figure_that_is_never_said_is_refused() -> None:
    with pytest.raises(ValueError, match="names"):
        phrase("nothing", n=count("n", 1))


def test_one_name_never_stands_for_two_values(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two values"):
        write_figures(tmp_path / "figures.csv", [("a.md", [count("n", 1)]), ("b.md", [count("n", 2)])])


def test_words_from_a_row_cannot_become_markup() -> None:
    assert "<" not in quote("m", "<script>alert(1)</script>").text
    assert quote("m", "a|b\nc`d`").text == "a\\|b c\\`d\\`"
    assert "\x1b" not in quote("m", "\x1b[31mred").text
