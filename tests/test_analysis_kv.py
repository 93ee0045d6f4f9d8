"""The memory curve: its CSV files, and sentences that change when the data do."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.artifacts import reduce
from analysis.memory.kv_fit import kv_results
from analysis.memory.kv_scaling import write_capacity, write_scaling
from analysis.pages.answer import answer
from analysis.pages.kv_notes import kv_page
from analysis.rows.tables import Tables
from analysis.rows.targets import Targets, read_targets
from contract.rows import MemoryAccount, PointRow, SessionRow
from tests import synthetic_run as synthetic

MIB = 2**20


def memory(shape: synthetic.Shape = synthetic.GPU) -> list[PointRow]:
    return [row for row in synthetic.rows(shape) if row.purpose == "kv_scaling"]


def notes(rows: Iterable[PointRow], targets: Targets | None = None) -> str:
    page = kv_page(synthetic.tables_of(rows), targets or Targets())
    assert page is not None
    return page.text()


def scaling(tmp_path: Path, rows: Iterable[PointRow]) -> list[dict[str, str]]:
    paths = write_scaling(tmp_path, kv_results(synthetic.tables_of(rows).points))
    assert [path.name for path in paths] == ["kv_cache_scaling.csv"]
    return list(csv.DictReader(io.StringIO(paths[0].read_text())))


def test_scaling_csv_has_the_tutorials_columns(tmp_path: Path) -> None:
    rows = scaling(tmp_path, memory())
    assert list(rows[0]) == ["max_model_len", "gpu_mem_used_mb", "delta_mb_from_prev", "bytes_per_token_est", "notes"]
    assert [row["max_model_len"] for row in rows] == ["512", "1024", "2048", "4096"]
    assert [row["gpu_mem_used_mb"] for row in rows] == ["15250", "21394", "33682", "58258"]
    assert [row["delta_mb_from_prev"] for row in rows] == ["", "6144", "12288", "24576"]
    assert [row["bytes_per_token_est"] for row in rows] == ["", "393216", "393216", "393216"]
    assert all("model phi-3-mini-4k; dummy weights; pool of 32 full-length sequences" in row["notes"] for row in rows)


def test_estimate_comes_from_bytes_that_were_not_rounded(tmp_path: Path) -> None:
    rows = synthetic.changed(memory(), lambda r: r.point_id == "committed-1024", mem_ready_bytes=15_250 * MIB + 999_999)
    assert scaling(tmp_path, rows)[1]["bytes_per_token_est"] == str(round(999_999 / (512 * 32)))


def test_cpu_backend_shows_a_decimal_and_no_gpu(tmp_path: Path) -> None:
    rows = scaling(tmp_path, memory(synthetic.CPU))
    assert rows[1]["delta_mb_from_prev"] == "128.0"
    assert all("CPU backend: PSS of the server's process tree, no GPU" in row["notes"] for row in rows)
    assert "Say nothing about a GPU from these numbers" in notes(memory(synthetic.CPU))


def started(device: synthetic.Shape, *ways: str, beside: bool = False) -> list[PointRow]:
    """Return the memory rows of both modes, whose servers were started in these ways from the shortest length on."""
    other = ["other"] if beside else []
    rows = memory(device)
    return [
        replace(row, start=ways[min(device.lengths.index(row.max_model_len), len(ways) - 1)], co_running_sessions=other)
        for row in rows
    ]


@pytest.mark.parametrize(
    ("ways", "beside"), [(("warm", "cold", "warm"), False), (("cold", "warm"), False), (("warm",), True)]
)
def test_a_curve_of_servers_that_share_pages_otherwise_gives_no_difference(
    ways: tuple[str, ...], beside: bool, tmp_path: Path
) -> None:
    rows = started(synthetic.CPU, *ways, beside=beside)
    page, made = notes(rows), scaling(tmp_path, rows)
    assert [row["delta_mb_from_prev"] + row["bytes_per_token_est"] for row in made] == [""] * 4
    assert all(f"started {ways[0]}" in row["notes"] for row in made[:1])
    assert "Line, differences and steps: not known." in page
    assert "Whether memory is flat is not known." in page
    assert "memory slope" not in page
    write_capacity(tmp_path, kv_results(synthetic.tables_of(rows).points))
    assert f"started {ways[0]}" in (tmp_path / "kv_capacity.csv").read_text()


@pytest.mark.parametrize(
    ("device", "ways", "beside"),
    [
        (synthetic.CPU, ("warm",), False),
        (synthetic.CPU, ("cold",), True),
        (synthetic.GPU, ("warm", "cold"), False),
        (synthetic.GPU, ("warm",), True),
    ],
)
def test_a_curve_of_servers_started_alike_or_of_a_card_is_one(
    device: synthetic.Shape, ways: tuple[str, ...], beside: bool, tmp_path: Path
) -> None:
    rows = started(device, *ways, beside=beside)
    assert notes(rows) == notes(memory(device))
    assert scaling(tmp_path, rows) == scaling(tmp_path, memory(device))


def test_failed_length_stays_a_row_and_the_next_names_what_it_is_compared_with(tmp_path: Path) -> None:
    rows = [synthetic.failed(r, "out_of_memory") if r.point_id == "committed-2048" else r for r in memory()]
    made = scaling(tmp_path, rows)
    assert made[2]["gpu_mem_used_mb"] == made[2]["bytes_per_token_est"] == ""
    assert "failed: out_of_memory" in made[2]["notes"]
    assert made[3]["delta_mb_from_prev"] == "36864"
    assert made[3]["bytes_per_token_est"] == "393216"
    assert "difference from 1024" in made[3]["notes"]
    assert "failed: out_of_memory" in notes(rows)


def test_kv_too_small_keeps_the_engines_words_whatever_they_hold(tmp_path: Path) -> None:
    message = 'To serve at least one request, 0.03 GiB "KV" is needed,\nestimated maximum model length is 3968'
    rows = [
        synthetic.failed(r, "kv_too_small", message, "kv_too_small") if r.point_id == "committed-4096" else r
        for r in memory()
    ]
    row = scaling(tmp_path, rows)[3]
    assert (
        'kv_too_small; the engine said: To serve at least one request, 0.03 GiB "KV" is needed, estimated'
        in row["notes"]
    )


def test_a_card_that_another_process_fills_is_named_with_the_next_step(tmp_path: Path) -> None:
    held = {"mem_baseline_bytes": 62_050 * MIB, "foreign_processes": ["pid 7 on GPU-0: 62050 MiB"]}
    rows = [replace(synthetic.failed(row, "free_memory_low"), **held) for row in memory()]  # type: ignore[arg-type]
    page = notes(rows)
    words = (
        "failed: free_memory_low; 62,050 MiB were in use before the start; "
        "another process on the card: pid 7 on GPU-0: 62050 MiB"
    )
    assert page.count(words) == len(rows)
    step = "Next step for `free_memory_low`: end what else holds the card's memory"
    assert step in page.partition("## Not measured")[2]
    (path,) = write_capacity(tmp_path, kv_results(synthetic.tables_of(rows).points))
    assert "62,050 MiB were in use before the start; another process" in path.read_text()
    synthetic.write_run(tmp_path, rows[:1])
    reduce(tmp_path)
    assert step in answer(tmp_path)
    quiet = [replace(row, mem_baseline_bytes=4 * MIB) for row in rows]
    assert "in use before the start" not in notes(quiet)


REFUSED = (
    "ValueError: To serve at least one request with the model's max seq len (4096), (1.51 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (0.82 GiB). Based on the available memory, the estimated "
    "maximum model length is 2208. Try increasing gpu_memory_utilization or decreasing max_model_len when "
    "initializing the engine."
)


def too_long(only: bool = False) -> list[PointRow]:
    """Return rows of which the longest by utilization did not fit; `only`: it alone."""

    def refused(row: PointRow) -> PointRow:
        failed = synthetic.failed(row, "kv_too_small", REFUSED, "kv_too_small")
        return replace(failed, engine_estimated_max_model_len=2208)

    made = [refused(row) if row.point_id == "utilization-4096" else row for row in memory()]
    return [row for row in made if row.point_id == "utilization-4096"] if only else made


@pytest.mark.parametrize("only", [False, True])
def test_the_engines_estimate_for_a_length_that_cannot_fit_is_the_answer(tmp_path: Path, only: bool) -> None:
    rows = too_long(only)
    (path,) = write_capacity(tmp_path, kv_results(synthetic.tables_of(rows).points))
    row = list(csv.DictReader(io.StringIO(path.read_text())))[-1]
    assert row["engine_estimated_max_model_len"] == "2208"
    assert "the longest that fits by the engine's estimate: 2208 tokens" in row["notes"]
    assert "when initializing the engine." in row["notes"]
    sentence = (
        "not one sequence of max_model_len 4096 fits the pool at gpu_memory_utilization 0.9; the longest that would, "
        "by the engine's own estimate: 2208 tokens (no server of that length was measured)"
    )
    assert sentence in notes(rows).partition("### Which max_model_len is safe")[2]
    synthetic.write_run(tmp_path, rows)
    reduce(tmp_path)
    assert sentence in answer(tmp_path)


def test_simulated_stands_in_every_row_and_on_the_page(tmp_path: Path) -> None:
    shape = replace(synthetic.GPU, simulated=True, engine="sim", device="sim", device_name="simulated GPU")
    assert all("simulated" in row["notes"] for row in scaling(tmp_path, memory(shape)))
    paths = write_capacity(tmp_path, kv_results(synthetic.tables_of(memory(shape)).points))
    assert all("simulated" in row["notes"] for row in csv.DictReader(io.StringIO(paths[0].read_text())))
    assert "**simulated**" in notes(memory(shape)).split("##")[0]
    synthetic.assert_every_table_row_says_simulated(notes(memory(shape)))
    lost = [synthetic.failed(row, "start_failed") for row in memory(shape)]
    synthetic.assert_every_table_row_says_simulated(notes(lost))
    assert "simulated" not in notes(memory())


def test_two_models_get_a_file_each(tmp_path: Path) -> None:
    other = replace(synthetic.GPU, model="qwen", bytes_per_token=28_672)
    rows = synthetic.tables_of([*memory(), *memory(other)]).points
    assert [path.name for path in write_scaling(tmp_path, kv_results(rows))] == [
        "kv_cache_scaling.csv",
        "kv_cache_scaling.qwen.csv",
    ]
    assert [path.name for path in write_capacity(tmp_path, kv_results(rows))] == [
        "kv_capacity.csv",
        "kv_capacity.qwen.csv",
    ]
    text = notes([*memory(), *memory(other)])
    assert "393,216" in text
    assert "28,672" in text


def test_point_that_failed_before_its_card_was_known_joins_its_neighbours(tmp_path: Path) -> None:
    rows = [synthetic.failed(r, "ready_timeout") if r.point_id == "committed-512" else r for r in memory()]
    assert rows[0].device_name is None
    assert len(scaling(tmp_path, rows)) == 4


def test_capacity_csv_reads_the_pool(tmp_path: Path) -> None:
    (path,) = write_capacity(tmp_path, kv_results(synthetic.tables_of(memory()).points))
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [row["max_concurrency"] for row in rows] == ["337.66", "168.83", "84.41", "42.21"]
    assert {row["kv_tokens"] for row in rows} == {"172880"}
    assert {row["kv_gib"] for row in rows} == {"63.320"}
    assert {row["gpu_memory_utilization"] for row in rows} == {"0.9"}


def test_straight_line_is_called_linear_without_steps() -> None:
    text = notes(memory())
    assert "roughly linear (ready)? **Yes**: R² 1.000000" in text
    assert "Are there steps (ready)? **None**" in text
    assert "All 3 others agree with the formula within 1 %, and within 0.1 %; the furthest is" in text
    assert "so a memory slope does not test the formula" in text


def test_memory_that_jumps_is_called_a_step() -> None:
    text = notes(memory(replace(synthetic.GPU, extra_ready_bytes={1024: 192 * MIB, 2048: 192 * MIB, 4096: 192 * MIB})))
    assert "Are there steps (ready)? **Yes**, 1 of 3" in text
    assert "512 to 1024: 6,336.0 MiB where the formula has 6,144.0 (+192.0 MiB, +3.1 %)" in text


def test_memory_that_bends_is_not_called_linear() -> None:
    text = notes(memory(replace(synthetic.GPU, extra_ready_bytes={2048: 30_000 * MIB, 4096: 12_000 * MIB})))
    assert "roughly linear (ready)? **No**" in text


def test_steeper_memory_than_the_formula_is_said_to_be_apart() -> None:
    extra = {length: 32 * 40_000 * length for length in synthetic.GPU.lengths}
    text = notes(memory(replace(synthetic.GPU, extra_ready_bytes=extra)))
    assert "433,216 | +10.17 %" in text
    assert "2 of 3 others are further than 1 % from the formula" in text
    assert "agree with the formula" not in text


def test_estimates_that_agree_are_said_to_do_so_no_closer_than_they_do() -> None:
    extra = {length: 32 * 1_000 * length for length in synthetic.GPU.lengths}
    text = notes(memory(replace(synthetic.GPU, extra_ready_bytes=extra)))
    assert "agree with the formula within 1 %, but not within 0.1 %; the furthest is +0.254 % from it." in text


def test_the_only_other_estimate_is_one_and_what_is_missing_is_named() -> None:
    page = notes([row for row in memory() if row.mode == "utilization"])
    assert "The other one (engine) agrees with the formula within 1 %, and within 0.1 %; it is +0.0" in page
    assert "Memory's slope is not known from this run" in page
    assert "others" not in page.split("three estimates")[1].split("###")[0].split("hold the others")[0]
    apart = [replace(row, formula_bytes_per_sequence=2 * (row.formula_bytes_per_sequence or 0)) for row in memory()]
    page = notes([row for row in apart if row.mode == "utilization"])
    assert "The other one (engine) is further than 1 % from the formula." in page
    assert "another number of bytes for a full-length sequence than the formula" in page


def test_one_estimate_agrees_with_nothing() -> None:
    text = notes([replace(memory()[0], engine_bytes_per_token=None)])
    assert "There is one estimate alone, so nothing for it to agree with." in text
    assert "agree with the formula" not in text


def test_two_lengths_do_not_decide_linearity() -> None:
    text = notes([r for r in memory() if r.max_model_len < 2000])
    assert "2 lengths do not decide it" in text
    assert "**Yes**: R²" not in text


def test_all_failed_claims_nothing() -> None:
    text = notes([synthetic.failed(row, "start_failed") for row in memory()])
    assert "**Yes**" not in text
    assert "**flat**" not in text
    assert "failed: start_failed" in text


def test_utilization_mode_is_flat_and_its_slope_is_not_offered() -> None:
    page = notes(memory())
    assert "Memory when *ready* is **flat**: from 73,940 to 73,942 MiB, a range of 2.0 MiB" in page
    assert "Memory when *loaded* is **flat**: from 74,240 to 74,242 MiB, a range of 2.0 MiB" in page
    assert "That is no cost of a KV token: the pool is the same at every length." in page
    grown = [
        replace(r, mem_ready_bytes=(r.mem_ready_bytes or 0) + r.max_model_len * 2**20) if r.mode == "utilization" else r
        for r in memory()
    ]
    assert "Memory when *ready* is **not flat**" in notes(grown)
    assert "Memory when *loaded* is **flat**" in notes(grown)
    cut = [
        replace(r, mem_ready_bytes=(r.mem_ready_bytes or 0) + (20 if r.max_model_len > 512 else 0) * 2**20)
        if r.mode == "utilization"
        else r
        for r in memory()
    ]
    assert "a range of 22.0 MiB over 4 lengths (rule: at most 10 MiB)" in notes(cut)
    assert "Whether the difference is of the length, or from start to start of one server, is not known" in notes(cut)


def at_fixed_utilization(**by_length: dict[int, int]) -> list[PointRow]:
    """Return the memory rows, bytes added to columns of those of a fixed utilization, by length."""
    return [
        replace(
            row, **{column: getattr(row, column) + more.get(row.max_model_len, 0) for column, more in by_length.items()}
        )
        if row.mode == "utilization"
        else row
        for row in memory()
    ]


def test_memory_that_falls_again_is_said_not_to_follow_the_length() -> None:
    """Of one H100 with warm starts: 74,613, 74,613, 74,695 and 74,647 MiB."""
    page = notes(at_fixed_utilization(mem_loaded_bytes={2048: 82 * MIB, 4096: 34 * MIB}))
    assert "Memory when *ready* is **flat**" in page
    assert "Memory when *loaded* is **not flat**: from 74,240 to 74,324 MiB, a range of 84.0 MiB" in page
    assert "It does not follow the length: from 2048 to 4096 tokens it falls by 48.0 MiB" in page
    assert "Loaded, the 84.0 MiB between the servers of 512 and of 2048 tokens are, by the account: cache +84.0" in page
    assert "from start to start" not in page
    grain = notes(at_fixed_utilization(mem_loaded_bytes={1024: 82 * MIB, 2048: 80 * MIB, 4096: 78 * MIB}))
    assert "does not follow the length" not in grain, "a fall that is no more than a segment"


def compiling(monkeypatch: pytest.MonkeyPatch, by_length: dict[int, bool | None]) -> None:
    """Have the servers with CUDA graphs of these lengths compile (True), load, or not tell."""
    known = synthetic.session_of

    def of(row: PointRow) -> SessionRow:
        return replace(known(row), compiled=None if row.enforce_eager else by_length.get(row.max_model_len, True))

    monkeypatch.setattr(synthetic, "session_of", of)


def test_servers_that_compiled_among_others_that_loaded_are_named_as_what_moved_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one H100 with a compile cache that held one length of four."""
    compiling(monkeypatch, {4096: False})
    rows = at_fixed_utilization(
        engine_kv_bytes={4096: 60 * MIB}, mem_ready_bytes={4096: 12 * MIB}, mem_loaded_bytes={4096: 12 * MIB}
    )
    page = notes(rows)
    assert "Memory when *ready* is **not flat**: from 73,940 to 73,954 MiB, a range of 14.0 MiB" in page
    assert "the pool itself differs by 60.0 MiB between these servers." in page
    assert "the pool is the same" not in page
    assert "They differ though the pool does not" not in page
    assert "those of 512, 1024, 2048 tokens compiled their graphs, those of 4096 tokens loaded them" in page
    assert "Those that compiled lie within 2.0 MiB when *ready* and within 2.0 MiB when *loaded*." in page
    assert "Those that loaded lie" not in page
    assert "from start to start" not in page, "the kinds are the cause: within them it is flat"


def test_what_differs_among_servers_that_compiled_is_not_laid_to_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling(monkeypatch, {4096: False})
    page = notes(at_fixed_utilization(mem_loaded_bytes={1024: 82 * MIB, 2048: 84 * MIB, 4096: 144 * MIB}))
    assert "Those that compiled lie within 2.0 MiB when *ready* and within 86.0 MiB when *loaded*." in page
    assert "Whether the difference is of the length, or from start to start of one server, is not known" in page


@pytest.mark.parametrize("told", [True, False])
def test_servers_that_all_compiled_or_all_loaded_are_not_told_apart(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling(monkeypatch, dict.fromkeys(synthetic.GPU.lengths, told))
    page = notes(at_fixed_utilization(mem_ready_bytes={4096: 60 * MIB}))
    assert "**not flat**" in page
    assert "are mixed here" not in page
    assert "Which of these servers compiled" not in page


def test_of_rows_that_do_not_say_who_compiled_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling(monkeypatch, dict.fromkeys(synthetic.GPU.lengths))
    assert "Which of these servers compiled" not in notes(memory()), "flat"
    assert "Which of these servers compiled" in notes(at_fixed_utilization(mem_ready_bytes={4096: 60 * MIB}))


def test_compiling_is_named_of_pools_sized_to_the_length_too(monkeypatch: pytest.MonkeyPatch) -> None:
    known = synthetic.session_of
    monkeypatch.setattr(synthetic, "session_of", lambda row: replace(known(row), compiled=row.max_model_len > 512))
    rows = [replace(row, enforce_eager=False) for row in memory() if row.mode == "committed"]
    assert "those of 1024, 2048, 4096 tokens compiled their graphs, those of 512 tokens loaded them" in notes(rows)


def test_a_pool_that_only_the_log_tells_is_said_to_be_known_to_its_rounding(
    accounts_with: Callable[..., None],
) -> None:
    accounts_with(kv_bytes=None)
    rounded = "as far as the log tells, which gives it to a hundredth of a GiB."
    assert "the pool is the same at every length, " + rounded in notes(memory())
    page = notes(at_fixed_utilization(engine_kv_bytes={4096: 60 * MIB}))
    assert "the pool itself differs by 60.0 MiB between these servers, " + rounded in page
    unknown = [replace(row, engine_kv_bytes=None) for row in memory()]
    assert "how large it was is not known here." in notes(unknown)


@pytest.mark.parametrize(
    ("mode", "words"), [("committed", "holds no utilization rows"), ("utilization", "holds no committed pools")]
)
def test_missing_mode_is_named_with_the_sweep_that_measures_it(mode: str, words: str) -> None:
    text = notes([row for row in memory() if row.mode == mode])
    assert words in text
    assert "`+sweep=kv`" in text


def test_committed_servers_that_are_eager_are_said_to_be() -> None:
    eager = "These servers are eager (`--enforce-eager`)"
    assert notes(memory()).count(eager) == 1
    assert eager not in notes([replace(row, enforce_eager=False) for row in memory()])


def test_safe_length_follows_the_target() -> None:
    assert "**max_model_len 4096** is the longest safe one" in notes(memory(), Targets(16, 4096))
    assert "**max_model_len 2048** is the longest safe one" in notes(memory(), Targets(60, 4096))
    assert "None of the measured lengths leaves room for 1,000" in notes(memory(), Targets(1000, 4096))
    assert "names no target" in notes(memory())


def test_target_is_held_against_the_measured_pool() -> None:
    assert "needs 24.00 GiB of KV, 37.9 % of the pool: **fits**" in notes(memory(), Targets(16, 4096))
    assert "**tight**" in notes(memory(), Targets(40, 4096))
    assert "**waits or preempts**" in notes(memory(), Targets(50, 4096))
    assert "**does not fit**" in notes(memory(), Targets(1, 200_000))


def test_envelope_says_which_pool_it_stands_on() -> None:
    assert "the pool that vLLM took at gpu_memory_utilization 0.9" in notes(memory())
    only_committed = [row for row in memory() if row.mode == "committed"]
    assert "the largest pool this run committed, which is not all that the device can hold" in notes(only_committed)


def test_trade_offs_are_not_known_without_load() -> None:
    assert "`+sweep=knee` measures them" in notes(memory())
    assert "Latency-focused: concurrency up to 8, the lowest that the noise allows" in notes(synthetic.rows())
    assert "Throughput-focused: concurrency 32, the highest level tested, still rising" in notes(synthetic.rows())


def test_trade_offs_of_one_repeat_are_not_known() -> None:
    rows = [row for row in synthetic.rows() if row.purpose in ("kv_scaling", "concurrency")]
    assert "Latency-focused: where latency blows up is not known from this run; `+sweep=concurrency`" in notes(rows)
    assert "Throughput-focused: where throughput stops scaling is not known from this run" in notes(rows)


def other_server(rows: Iterable[PointRow], name: str, **columns: object) -> list[PointRow]:
    """The same rows of another server."""
    ids = [replace(r, session_id=f"{name}-{r.session_id}", point_id=f"{name}-{r.point_id}") for r in rows]
    return synthetic.changed(ids, lambda row: True, **columns)


THROUGHPUT = re.compile(r"Throughput-focused: concurrency 32, [^:]*: ([\d,]+) tok/s")


@pytest.mark.parametrize(
    ("columns", "heading"),
    [
        ({"tensor_parallel_size": 2, "gpus": 2}, "tp 2"),
        ({"kv_cache_dtype": "fp8"}, "fp8"),
        ({"quantization": "fp8"}, "fp8"),
        ({"model_cut": "4 of 32 layers"}, "4 of 32 layers"),
    ],
)
def test_load_advice_is_that_of_servers_like_the_sections_own(columns: dict[str, object], heading: str) -> None:
    faster = synthetic.rows(replace(synthetic.GPU, limit_tok_s=18_000.0))
    text = notes([*synthetic.rows(), *other_server(faster, "other", **columns)])
    of_one, of_other = sorted(text.split("\n## ")[1:], key=lambda section: heading in section.splitlines()[0])
    assert [THROUGHPUT.findall(of_one), THROUGHPUT.findall(of_other)] == [["6,481"], ["12,961"]]
    assert of_one.count("From the levels measured in this run (prompts of 12 tokens") == 1
    assert of_other.count("From the levels measured in this run (prompts of 12 tokens") == 1


def test_load_of_servers_unlike_the_sections_own_is_no_advice_for_it() -> None:
    loads = [row for row in synthetic.rows() if row.purpose != "kv_scaling"]
    text = notes([*memory(), *other_server(loads, "other", tensor_parallel_size=2, gpus=2)])
    assert "fewer than two levels of load were measured of this model served alike" in text
    assert "Throughput-focused" not in text


def test_load_advice_names_the_server_where_there_are_several() -> None:
    loads = [row for row in synthetic.rows() if row.purpose != "kv_scaling"]
    text = notes([*synthetic.rows(), *other_server(loads, "few", max_num_seqs=8)])
    assert "From the levels measured in this run on phi-3-mini-4k, seqs 8 (prompts of 12 tokens" in text
    assert "From the levels measured in this run on phi-3-mini-4k, seqs default (prompts of 12 tokens" in text
    assert len(THROUGHPUT.findall(text)) == 2


def test_load_advice_stands_where_the_memory_points_never_learned_their_card() -> None:
    lost = [synthetic.failed(row, "start_failed") for row in memory()]
    text = notes([*lost, *(row for row in synthetic.rows() if row.purpose != "kv_scaling")])
    assert THROUGHPUT.findall(text) == ["6,481"]


def test_dummy_mixture_of_experts_is_cautioned() -> None:
    assert "mixture of experts" not in notes(memory())
    assert "mixture of experts with dummy weights" in notes(synthetic.changed(memory(), lambda r: True, moe=True))


def test_speed_of_a_dummy_mixture_of_experts_is_disowned_in_every_row(tmp_path: Path) -> None:
    rows = synthetic.changed(memory(), lambda r: True, moe=True)
    (path,) = write_capacity(tmp_path, kv_results(synthetic.tables_of(rows).points))
    made = [*scaling(tmp_path, rows), *csv.DictReader(io.StringIO(path.read_text()))]
    assert all("dummy weights; MoE: routing and speed not representative" in row["notes"] for row in made)
    trained = synthetic.changed(rows, lambda r: True, dummy_weights=False)
    assert not any("MoE" in row["notes"] for row in scaling(tmp_path, trained))


def test_the_cost_of_watching_real_cards_is_told() -> None:
    text = notes(memory())
    assert "Each card was sampled 9.4 times a second (median of the windows; 9.4 in the lowest)." in text
    assert "took at most 2.10 % of one core" in text
    for elsewhere in (synthetic.CPU, replace(synthetic.GPU, simulated=True, engine="sim", device="sim")):
        rows = synthetic.changed(memory(elsewhere), lambda r: True, telemetry_hz=1.0, sampling_cpu_share=0.03)
        assert "times a second" not in notes(rows)


@pytest.mark.parametrize("status", ["measured", "failed"])
def test_memory_that_did_not_come_back_is_named(tmp_path: Path, status: str) -> None:
    def left(size: int, memory_back_s: float | None = None, to_others: int | None = 0) -> Tables:
        points = synthetic.tables_of(
            [synthetic.failed(r, "oom") if status == "failed" and r.max_model_len == 1024 else r for r in memory()]
        ).points
        stopped = {
            "memory_back_s": memory_back_s,
            "mem_after_stop_bytes": 4 * MIB + size,
            "mem_baseline_bytes": 4 * MIB,
            "mem_left_to_others_bytes": to_others,
        }
        return Tables(tuple(replace(p, **stopped) if p.max_model_len == 1024 else p for p in points), ())

    words = "memory did not come back after the stop: 612 MiB above the baseline"
    tables = left(612 * MIB)
    page = kv_page(tables, Targets())
    assert page is not None
    assert page.text().count(words) == 2
    for write in (write_scaling, write_capacity):
        (path,) = write(tmp_path, kv_results(tables.points))
        told = [row["max_model_len"] for row in csv.DictReader(io.StringIO(path.read_text())) if words in row["notes"]]
        assert told == ["1024"]
    for quiet in (left(612 * MIB, memory_back_s=0.4), left(3 * MIB)):
        page = kv_page(quiet, Targets())
        assert page is not None
        assert "did not come back" not in page.text()
    others = kv_page(left(612 * MIB, to_others=606 * MIB), Targets())
    assert others is not None
    assert others.text().count("after the stop others held 606 MiB more of the cards than before it") == 2
    untold = kv_page(left(612 * MIB, to_others=None), Targets())
    assert untold is not None
    assert untold.text().count("612 MiB above the baseline stayed in use after the stop: its own or another's") == 2
    for page in (others, untold):
        assert "did not come back" not in page.text()


def test_page_without_a_formula_still_reads() -> None:
    gone = {"formula_bytes_per_token": None, "formula_bytes_per_sequence": None, "formula_max_concurrency": None}
    text = notes(synthetic.changed(memory(), lambda r: True, **gone), Targets(16, 4096))
    assert "The formula is not known for this model" in text
    assert "393,216" in text


def test_hybrid_model_is_not_given_one_rate() -> None:
    rows = [replace(r, formula_bytes_per_token=100_000.0) for r in memory()]
    assert "at the longest length a further token costs 100,000 bytes" in notes(rows)


def test_no_memory_rows_no_numbers() -> None:
    page = kv_page(synthetic.tables_of(synthetic.rows()[8:]), Targets())
    assert page.figures == []
    assert "it holds no readings of memory" in page.text()


def test_targets_come_from_the_manifest_if_they_are_there(tmp_path: Path) -> None:
    assert read_targets(tmp_path) == Targets()
    for text in ("{", "[]", '{"target": 3}', '{"target": {"concurrency": "many", "context_tokens": true}}'):
        (tmp_path / "manifest.json").write_text(text)
        assert read_targets(tmp_path) == Targets()
    (tmp_path / "manifest.json").write_text('{"target": {"concurrency": 16, "context_tokens": 4096}}')
    assert read_targets(tmp_path) == Targets(16, 4096)


# --- the account ---


def test_a_step_is_explained_by_the_part_of_the_account_that_moved() -> None:
    page = notes(memory(replace(synthetic.GPU, extra_ready_bytes=dict.fromkeys((1024, 2048, 4096), 96 * MIB))))
    assert (
        "- 512 to 1024: 6,240.0 MiB where the formula has 6,144.0 (+96.0 MiB, +1.6 %); by the account: cache +96.0 MiB"
        in page
    )
    assert "| 1024 | +6,240.0 | 6,144.0 | +0.0 | +6,144.0 | +0.0 | +0.0 | +96.0 | +0.0 | +0.0 | +0.0 |" in page


def test_a_departure_that_is_no_step_is_explained_where_memory_tells_it_apart() -> None:
    page = notes(memory(replace(synthetic.GPU, extra_ready_bytes={2048: 24 * MIB, 4096: 24 * MIB})))
    assert "Are there steps (ready)? **None**" in page
    told = page.partition("No step, but more than memory can be told apart by (ready):")[2].partition("\n\nAre there")[
        0
    ]
    assert told.strip().splitlines() == [
        "- 1024 to 2048: 12,312.0 MiB where the formula has 12,288.0 (+24.0 MiB, +0.2 %); "
        "by the account: cache +24.0 MiB; more of what activations freed, or of what rounding to whole "
        "segments adds, stays in torch's cache"
    ]
    assert "No step, but" not in notes(memory())
    assert "No step, but" not in notes(memory(replace(synthetic.GPU, extra_ready_bytes={4096: 2 * MIB})))


def test_memory_by_process_stands_beside_that_of_the_cards_where_it_is_known() -> None:
    rows = [replace(row, mem_tree_bytes=(row.mem_loaded_bytes or 0) - 9 * MIB) for row in memory()]
    page = notes(rows)
    assert page.count("| ready MiB | loaded MiB | by process MiB |") == 2
    assert "| 512 | 15,250 | 15,252 | 15,243 |" in page
    assert "*By process*" in page
    assert "so it does not check *loaded*" not in page
    assert "y process" not in notes(memory())
    early = [replace(row, mem_tree_bytes=(row.mem_ready_bytes or 0) - 9 * MIB) for row in memory()]
    assert "its memory, as in every row here, so it does not check *loaded*." in notes(early)


def test_the_decision_stands_before_what_it_rests_on() -> None:
    text = notes(memory(), Targets(16, 4096))
    assert text.index("### Which max_model_len is safe") < text.index("### Pool sized to the length")


def test_power_of_random_weights_is_disowned_on_cards_alone() -> None:
    words = "Power and energy depend on the data"
    assert words in notes(memory())
    assert words not in notes(memory(synthetic.CPU))


@pytest.fixture
def accounts_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace columns of all accounts."""

    def change(**columns: int | None) -> None:
        known = synthetic.account_of
        monkeypatch.setattr(synthetic, "account_of", lambda row: [replace(part, **columns) for part in known(row)])

    return change


def row_of(page: str, start: str) -> str:
    return next(row for row in page.splitlines() if row.startswith(start))


def test_the_residual_is_what_no_probe_and_not_torchs_allocator_tells() -> None:
    page = notes(memory())
    assert page.count("| moment | memory | weights | KV pool | graph pools | buffers | cache | CUDA context |") == 2
    assert page.count(" | CUDA context | torch and cuBLAS | residual | share |") == 2
    assert row_of(page, "| 512 | ready | 15,246.0 |").endswith(" | 527.0 | 158.0 | +73.0 | 0.48 % |")
    assert page.count(" | 527.0 | 158.0 | +361.0 | 0.49 % |") == 3 * 4
    assert (
        "**Residual**, what no probe and not torch's allocator tells: at most +361.0 MiB, and at most 0.49 % of the "
        "memory at a moment." in page
    )
    assert "came or went unseen" not in page


def test_the_workers_own_readings_divide_the_residual_and_explain_none_of_it() -> None:
    page = notes(memory())
    assert page.count("| moment | residual | with graph capture | otherwise since | neither |") == 2
    assert row_of(page, "| 512 | ready | +73.0 |") == "| 512 | ready | +73.0 | +0.0 | +70.0 | +3.0 |"
    assert page.count(" | +361.0 | +339.8 | +18.2 | +3.0 |") == 3 * 4
    assert "they divide the residual and explain none of it" in page
    assert "bare context (+3.0 MiB where it is furthest from that)" in page
    assert "NVML still had what lay outside torch's allocator (the driver" in page
    assert "where the two differ most, -1.0 MiB." in page
    assert "is missing" not in page
    assert "No probe told what torch and cuBLAS take" not in page


def test_a_server_of_several_cards_has_its_account_card_by_card() -> None:
    page = notes(memory(replace(synthetic.GPU, gpus=2)))
    assert page.count(" | 1,054.0 | 316.0 | +722.0 |") == page.count(" | 1,054.0 | 316.0 | +146.0 |") == 3 * 4
    assert page.count("| max_model_len | moment | card | memory | weights |") == 2
    assert row_of(page, "| 512 | ready | GPU 0 | 7,627.0 | 7,289.0 |").endswith(" | 527.0 | 158.0 | +73.0 | 0.96 % |")
    assert row_of(page, "| 512 | ready | GPU 1 | 7,619.0 | 7,289.0 |").endswith(" | 527.0 | 158.0 | +73.0 | 0.96 % |")
    assert page.count("Two cards of one server are never further apart than 8.0 MiB of memory.") == 2
    assert "open their communicators (NCCL) before that look" in page
    alone = notes(memory())
    assert "| card |" not in alone
    assert "communicators" not in alone


def test_of_several_workers_the_log_does_not_tell_what_came_with_graphs() -> None:
    page = notes(memory(replace(synthetic.GPU, gpus=2)))
    assert page.count(" | +722.0 | – | +716.0 | +6.0 |") == 3 * 4
    assert page.count(" | +146.0 | +0.0 | +140.0 | +6.0 |") == 3 * 4
    assert "Where *with graph capture* is missing the log does not tell it" in page


def test_graphs_that_the_log_does_not_tell_of_came_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    known = synthetic.session_of
    monkeypatch.setattr(synthetic, "session_of", lambda row: replace(known(row), graph_capture_bytes=None))
    assert notes(memory()).count(" | +361.0 | – | +358.0 | +3.0 |") == 3 * 4


def test_without_a_probe_the_context_is_in_the_residual(accounts_with: Callable[..., None]) -> None:
    accounts_with(context_bytes=None)
    page = notes(memory())
    assert row_of(page, "| 512 | ready | 15,246.0 |").endswith(" | – | 158.0 | +600.0 | 3.94 % |")
    assert row_of(page, "| 512 | ready | +600.0 |").endswith(" | +0.0 | +70.0 | +530.0 |")
    assert "Where no probe told the CUDA context it is in the residual." in page
    assert "checks one thing only" not in page, "without a context there is nothing to check it by"


def test_a_context_that_one_probe_did_not_tell_is_no_step_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(row: PointRow) -> list[MemoryAccount]:
        changes = {"context_bytes": None} if row.max_model_len == 1024 else {}
        return [replace(part, **changes) for part in known(row)]

    known = synthetic.account_of
    monkeypatch.setattr(synthetic, "account_of", told)
    page = notes(memory(replace(synthetic.GPU, extra_ready_bytes=dict.fromkeys((1024, 2048, 4096), 96 * MIB))))
    assert "(+96.0 MiB, +1.6 %); by the account: cache +96.0 MiB" in page
    assert "CUDA context +" not in page
    assert "CUDA context -" not in page
    assert "| 1024 | +6,240.0 | 6,144.0 | +0.0 | +6,144.0 | +0.0 | +0.0 | +96.0 | – | +0.0 | +0.0 |" in page


def test_a_step_outside_torch_is_told_as_one_and_not_as_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def grown(row: PointRow) -> list[MemoryAccount]:
        more = 96 * MIB if row.max_model_len > 512 else 0
        return [
            replace(
                part,
                outside_now_bytes=(part.outside_now_bytes or 0) + more,
                cached_bytes=(part.cached_bytes or 0) - more,
            )
            for part in known(row)
        ]

    known = synthetic.account_of
    monkeypatch.setattr(synthetic, "account_of", grown)
    page = notes(memory(replace(synthetic.GPU, extra_ready_bytes=dict.fromkeys((1024, 2048, 4096), 96 * MIB))))
    assert (
        "by the account: residual +96.0 MiB; it lies outside torch's allocator: the driver, a library or a process of "
        "others took it" in page
    )
    assert "at most +457.0 MiB" in page


def test_what_was_on_the_card_before_one_of_two_servers_is_named_as_what_moved() -> None:
    rows = synthetic.changed(
        memory(),
        lambda row: row.point_id == "committed-1024",
        mem_baseline_bytes=204 * MIB,
        mem_ready_bytes=(15_250 + 6_144 + 200) * MIB,
        mem_loaded_bytes=(15_252 + 6_144 + 200) * MIB,
    )
    page = notes(rows)
    assert "(+200.0 MiB, +3.3 %); by the account: what was there before the server +200.0 MiB" in page
    assert "| 1024 | +6,144.0 | 6,144.0 | +0.0 | +6,144.0 | +0.0 |" in page


LADDER_BYTES = 600 * MIB
"""What a later load takes of a card."""


def with_a_later_load(row: PointRow, moments: tuple[str, ...]) -> list[MemoryAccount]:
    """Return an account of these moments, whose peak at the longest length a later load has raised."""
    more = {"peak": LADDER_BYTES if row.max_model_len == 4096 else 0}
    known = [part for part in synthetic.account_of(row) if part.moment in moments]
    return [
        replace(
            part,
            used_bytes=(part.used_bytes or 0) + more.get(part.moment, 0),
            cached_bytes=(part.cached_bytes or 0) + more.get(part.moment, 0),
        )
        for part in known
    ]


def loaded_range(moments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, **loaded: int) -> str:
    """Return what a page says of the loaded memory's range, 4,096 tokens the highest."""
    rows = synthetic.changed(memory(), lambda row: row.point_id == "utilization-4096", **loaded)
    accounts = {f"session-{row.point_id[0]}{row.max_model_len}": with_a_later_load(row, moments) for row in rows}
    monkeypatch.setattr(synthetic, "account_of", lambda row: accounts[row.session_id])
    return next((line for line in notes(rows).splitlines() if line.startswith("Loaded, the ")), "")


def test_what_loaded_memory_is_made_of_is_told_by_the_account_of_that_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    highest = (synthetic.utilization_row(synthetic.GPU, 4096).mem_loaded_bytes or 0) + 3 * MIB
    said = "Loaded, the 5.0 MiB between the servers of 512 and of 4096 tokens are, by the account: cache +5.0 MiB."
    assert loaded_range(("ready", "loaded", "peak"), monkeypatch, mem_loaded_bytes=highest) == said


def test_what_no_single_part_is_large_enough_for_is_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what the parts are said to make adds up to the whole."""
    known, more = synthetic.account_of, 4 * MIB // 5

    def of(row: PointRow) -> list[MemoryAccount]:
        buffers = more if row.max_model_len == 4096 and row.mode == "utilization" else 0
        return [
            replace(
                part,
                cached_bytes=(part.cached_bytes or 0) - buffers,
                buffer_bytes=(part.buffer_bytes or 0) + buffers,
            )
            for part in known(row)
        ]

    monkeypatch.setattr(synthetic, "account_of", of)
    highest = (synthetic.utilization_row(synthetic.GPU, 4096).mem_loaded_bytes or 0) + more + 3 * MIB
    page = notes(synthetic.changed(memory(), lambda row: row.point_id == "utilization-4096", mem_loaded_bytes=highest))
    said = "between the servers of 512 and of 4096 tokens are, by the account: cache +5.0 MiB, the rest +0.8 MiB."
    assert said in page


def test_a_peak_that_another_load_has_raised_tells_nothing_of_loaded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    highest = (synthetic.utilization_row(synthetic.GPU, 4096).mem_loaded_bytes or 0) + 3 * MIB
    assert loaded_range(("ready", "peak"), monkeypatch, mem_loaded_bytes=highest) == ""


def test_a_peak_that_rose_as_loaded_memory_did_tells_of_it_where_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = synthetic.account_of
    monkeypatch.setattr(synthetic, "account_of", lambda row: [p for p in known(row) if p.moment != "loaded"])
    assert (
        "Loaded, the 2.0 MiB between the servers of 512 and of 2048 tokens are, by the account: cache +2.0 MiB."
        in notes(memory())
    )


def test_without_a_probe_of_the_libraries_they_are_in_the_residual_and_the_page_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = synthetic.session_of
    monkeypatch.setattr(synthetic, "session_of", lambda row: replace(known(row), library_bytes=None))
    page = notes(memory())
    assert "| torch and cuBLAS |" not in page
    assert row_of(page, "| 512 | ready | 15,246.0 |").endswith(" | 527.0 | +231.0 | 1.52 % |")
    assert row_of(page, "| 512 | ready | +231.0 |").endswith(" | +0.0 | +228.0 | +3.0 |")
    assert "No probe told what torch and cuBLAS take of a card, so that is in the residual, too" in page


def test_one_probe_of_a_run_tells_for_all_servers_on_such_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    known = synthetic.session_of

    def of_the_first(row: PointRow) -> SessionRow:
        told = row.max_model_len == 512 and row.mode == "utilization"
        return replace(known(row), library_bytes=synthetic.LIBRARY_BYTES if told else None)

    monkeypatch.setattr(synthetic, "session_of", of_the_first)
    assert notes(memory()).count(" | 527.0 | 158.0 | ") == 3 * 8
    assert "; read on one card of a kind, taken for each |" in notes(memory())


def test_a_server_has_the_probe_of_its_own_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes tell apart; one where no probe told has what another told."""
    known, nodes = synthetic.session_of, {512: "a", 1024: "b", 2048: "b", 4096: "c"}

    def of(row: PointRow) -> SessionRow:
        told = {512: 158 * MIB, 1024: 160 * MIB} if row.mode == "utilization" else {}
        return replace(known(row), node=nodes[row.max_model_len], library_bytes=told.get(row.max_model_len))

    monkeypatch.setattr(synthetic, "session_of", of)
    page = notes(memory())
    found = [
        (at, told)
        for at in nodes
        for told in ("158.0", "160.0")
        if f" | 527.0 | {told} | " in row_of(page, f"| {at} | ready | ")
    ]
    assert found == [(512, "158.0"), (1024, "160.0"), (2048, "160.0"), (4096, "158.0")]


def test_libraries_that_take_more_than_came_since_the_first_look_were_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = synthetic.session_of
    monkeypatch.setattr(synthetic, "session_of", lambda row: replace(known(row), library_bytes=300 * MIB))
    page = notes(memory())
    assert row_of(page, "| 512 | ready | 15,246.0 |").endswith(" | 527.0 | 300.0 | -69.0 | 0.45 % |")
    assert row_of(page, "| 512 | ready | -69.0 |").endswith(" | +0.0 | -72.0 | +3.0 |")


def test_of_rows_before_version_7_when_the_residual_came_is_not_known(accounts_with: Callable[..., None]) -> None:
    accounts_with(**synthetic.NOT_READ_INSIDE)
    page = notes(memory())
    assert row_of(page, "| 512 | ready | 15,246.0 |").endswith(" | 527.0 | 158.0 | +73.0 | 0.48 % |")
    assert "When the residual came is not known from this run" in page
    assert "the engine saw 0.66 GiB go (its log)" in page
    assert "where the two differ most, -1.0 MiB." in page
    assert "otherwise since" not in page


def test_a_server_that_did_not_give_its_memory_back_has_no_cross_check(accounts_with: Callable[..., None]) -> None:
    accounts_with(outside_bytes=None)
    page = notes(memory())
    assert "A cross-check" not in page
    assert row_of(page, "| 512 | ready | 15,246.0 |").endswith(" | +73.0 | 0.48 % |")


def test_a_run_whose_workers_have_read_in_part_has_dashes_where_they_have_not(monkeypatch: pytest.MonkeyPatch) -> None:
    known = synthetic.account_of

    def mixed(row: PointRow) -> list[MemoryAccount]:
        columns = synthetic.NOT_READ_INSIDE if row.max_model_len == 512 else {}
        return [replace(part, **columns) for part in known(row)]

    monkeypatch.setattr(synthetic, "account_of", mixed)
    page = notes(memory())
    assert row_of(page, "| 512 | ready | +73.0 |").endswith(" | +0.0 | – | – |")
    assert row_of(page, "| 1024 | ready | +73.0 |").endswith(" | +0.0 | +70.0 | +3.0 |")
    assert "| 1024 | +6,144.0 | 6,144.0 | +0.0 | +6,144.0 | +0.0 | +0.0 | +0.0 | +0.0 | +0.0 | +0.0 |" in page


def test_a_run_without_accounts_says_that_none_was_made() -> None:
    page = notes(memory(synthetic.CPU))
    assert "Not known from this run: no row of a server holds an account of its memory" in page
    assert "by the account" not in page
