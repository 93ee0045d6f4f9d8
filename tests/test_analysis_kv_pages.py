"""Page functions and the headroom envelope: what the notes say when model, engine and measured levels change."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from analysis import reduce
from analysis.advice.rules import rules_of_thumb
from analysis.memory.envelope_cells import Expected
from analysis.memory.envelope_grid import envelope_grids
from analysis.memory.envelope_plot import draw_envelope
from analysis.memory.kv_envelope import Envelope, Fit, envelopes, fit_of
from analysis.memory.kv_fit import kv_results
from analysis.memory.kv_pages import pages_of
from analysis.memory.pages_plot import stairs
from analysis.pages.envelope_sweep import envelope_page, summary
from analysis.pages.kv_notes import kv_page
from analysis.pages.operating_page import operating_page
from analysis.rows.manifest import read_configs
from analysis.rows.targets import Slo, Targets
from contract.kv import kv_layout
from contract.rows import PointRow
from tests import synthetic_run as synthetic
from tests.model_files import published

MIB = 2**20
SLIDING = synthetic.family("tiny-sliding", synthetic.CPU, lengths=(512, 1024, 2048, 4096, 8192))
MLA = synthetic.family("tiny-mla", synthetic.CPU)
LINEAR = synthetic.family("tiny-linear", synthetic.CPU)


def memory(shape: synthetic.Shape) -> list[PointRow]:
    make = (synthetic.committed_row, synthetic.utilization_row)
    return [row(shape, length) for row in make for length in shape.lengths]


def ladder(shape: synthetic.Shape, **at: dict[str, Any]) -> list[PointRow]:
    """Return memory points and near-full levels on a pool of 16 sequences; `c32={...}` changes a level."""
    rows = [synthetic.ladder_row(shape, level) for level in shape.ladder]
    changed = [replace(row, **at.get(f"c{row.concurrency}", {})) for row in rows]
    return [*memory(shape), *changed]


def notes(rows: list[PointRow], config: dict[str, Any] | None, targets: Targets | None = None) -> str:
    page = kv_page(synthetic.tables_of(rows, config), targets or Targets())
    assert page is not None
    return page.text()


def section(text: str, heading: str) -> str:
    return text.split(f"### {heading}")[1].split("\n### ")[0]


def pages_section(rows: list[PointRow], config: dict[str, Any] | None) -> str:
    return section(notes(rows, config), "What one sequence keeps, by group of layers")


# --- page functions ---


def test_each_group_of_layers_is_a_row_with_where_it_stops_growing() -> None:
    text = pages_section(memory(SLIDING), SLIDING.config)
    assert "| sliding window | 5 | 512 a token | 2559 | K and V of the window and of tokens in flight |" in text
    assert "| full attention | 1 | 512 a token | always grows | K and V of every token |" in text
    assert "| 2559 | 105 (6.56) | 20 (1.25) | 7.81 | – | – | the window stops growing here |" in text
    assert "| 2687 | 105 (6.56) | 21 (1.31) | 7.88 | – | – | past the kink |" in text
    assert "| 4096 | 105 (6.56) | 32 (2.00) | 8.56 | 8.56 | +0.00 % | measured |" in text
    assert "Lengths were measured on both sides of the kink at 2559 tokens." in text
    assert "gives for 10 servers, none of which was fitted: **agrees**" in text


def test_a_latent_is_one_rate_and_a_state_is_constant_in_enlarged_blocks() -> None:
    text = pages_section(memory(MLA), MLA.config)
    assert "| latent attention (MLA) | 4 | 1,152 a token | always grows |" in text
    assert "a token costs the same at any length: 4,608 bytes" in text
    text = pages_section(memory(LINEAR), LINEAR.config)
    assert "| linear attention | 3 | 268,288 a sequence | does not grow | a state of constant size |" in text
    assert "each with a page of 640 tokens. It was enlarged until a page of attention is as large as a state" in text
    assert "| 640 | 3 (0.94) | 1 (0.31) | 1.25 |" in text
    assert "| 641 | 3 (0.94) | 2 (0.62) | 1.56 |" in text


def test_servers_that_differ_in_tokens_in_flight_have_a_page_function_each() -> None:
    shape = replace(SLIDING, batched={"committed": 768, "utilization": 2048})
    text = pages_section(memory(shape), shape.config)
    assert "#### Pools sized to the length, max_num_batched_tokens 768" in text
    assert "#### Pools at a fixed gpu_memory_utilization, max_num_batched_tokens 2048" in text
    assert text.count("1279") >= 1
    assert text.count("2559") >= 1


def test_a_kink_that_was_not_passed_is_not_called_measured() -> None:
    text = pages_section(memory(replace(SLIDING, lengths=(512, 1024, 2048))), SLIDING.config)
    assert "No length was measured a block past the kink at 2559 tokens; `+sweep=kv`" in text
    text = pages_section(memory(replace(SLIDING, lengths=(4096, 8192))), SLIDING.config)
    assert "No length was measured below the kink at 2559 tokens" in text
    short = {**published("tiny-sliding"), "max_position_embeddings": 2600}
    text = pages_section(memory(replace(SLIDING, lengths=(512, 2048))), short)
    assert "The end of growth at 2559 tokens bends nothing: the longest length that the model takes is 2600." in text


def engine(row: PointRow, share: float) -> PointRow:
    return replace(row, engine_max_concurrency=(row.engine_max_concurrency or 0) / (1 + share))


@pytest.mark.parametrize(("share", "word"), [(0.004, "**agrees**"), (0.03, "**departs**")])
def test_an_engine_that_departs_is_said_to(share: float, word: str) -> None:
    rows = [engine(row, share) if row.max_model_len == 2048 else row for row in memory(SLIDING)]
    text = pages_section(rows, SLIDING.config)
    assert f"{word}, the largest difference is +{100 * share:.2f} %, at 2048 tokens" in text


def test_a_pool_known_only_roughly_proves_nothing() -> None:
    rows = synthetic.changed(memory(SLIDING), lambda row: True, formula_max_concurrency=None)
    assert "it is arithmetic alone" in pages_section(rows, SLIDING.config)


def test_a_simulator_is_not_evidence_for_the_formula_it_uses() -> None:
    shape = synthetic.family("qwen3-next-cut", synthetic.GPU, simulated=True, engine="sim", device="sim")
    text = notes(memory(shape), shape.config)
    assert "The simulator takes its figures from this very formula, so that they agree shows nothing." in text
    assert "**agrees**" not in text
    synthetic.assert_every_table_row_says_simulated(text)


UNKNOWN = "Not known from this run: its manifest holds no config of this model"


@pytest.mark.parametrize(
    "config",
    [None, {"num_hidden_layers": "many"}, {"layer_types": 3}, published("tiny"), {**published("tiny"), "head_dim": []}],
)
def test_a_config_that_is_missing_foreign_or_of_another_model_gives_no_page_function(config: Any) -> None:
    assert UNKNOWN in pages_section(memory(SLIDING), config)


def test_rows_of_another_formula_give_no_page_function() -> None:
    rows = synthetic.changed(memory(SLIDING), lambda row: True, formula_bytes_per_sequence=7 * MIB)
    assert UNKNOWN in pages_section(rows, SLIDING.config)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"sessions": 3}', '{"sessions": [1, {"id": 2, "model": {"config": {}}}]}']
)
def test_a_foreign_manifest_has_no_configs(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert read_configs(tmp_path) == {}


@given(end=st.integers(1, 60_000), block=st.sampled_from([16, 128, 640]))
def test_stairs_go_through_the_formula(end: int, block: int) -> None:
    layout = kv_layout(published("tiny-sliding"), device="cpu", block_size=block)
    x, y = stairs(end, block, layout.bytes_per_sequence)
    assert x[-1] == end
    assert x == sorted(x)
    for tokens, size in list(zip(x, y, strict=True))[1 if x[0] == 0 else 0 :: 2 if x[0] == 0 else 1]:
        assert size * MIB == layout.bytes_per_sequence(tokens)


# --- steps and stairs ---


def test_stairs_of_the_formula_are_named_with_what_makes_them() -> None:
    text = notes(memory(SLIDING), SLIDING.config)
    assert "4 of 4 of its differences leave the mean of 1,124 bytes per token" in text
    assert "- 2048 to 4096: 1,152 bytes per token; a sliding window stops growing at 2559 tokens" in text
    assert "- 4096 to 8192: 512 bytes per token; windowed layers no longer grow" in text
    assert "Is it roughly linear (ready)? **No**" in text
    assert "which means nothing where memory is no line" in text
    text = notes(memory(LINEAR), LINEAR.config)
    assert (
        "- 2048 to 4096: 480 bytes per token; counted in whole blocks of 640 tokens, enlarged until an attention page "
        "is as large as a state"
    ) in text
    assert "The formula itself has no stair over these lengths" in notes(memory(MLA), MLA.config)


def test_an_engine_whose_layers_differ_is_held_against_the_formula_at_its_own_length() -> None:
    """Its figure is a mean over a sequence, in which states and windows weigh: no rate, and no disagreement."""
    for shape in (LINEAR, SLIDING):
        text = section(notes(memory(shape), shape.config), "Bytes per KV token: three estimates")
        (row,) = (line for line in text.splitlines() if line.startswith("| engine"))
        assert row.startswith("| engine: pool bytes / its KV tokens at max_model_len")
        assert row.endswith("| +0.00 % |")
        assert "the figure is a mean" in text
        assert "The engine reserves another number" not in text
    longest = max(SLIDING.lengths)
    rows = [
        replace(row, engine_max_concurrency=(row.engine_max_concurrency or 0) / 1.2)
        if row.max_model_len == longest
        else row
        for row in memory(LINEAR) + memory(SLIDING)
        if row.model == SLIDING.model
    ]
    text = section(notes(rows, SLIDING.config), "Bytes per KV token: three estimates")
    assert "(committed) | 1,1" not in text
    assert "| +20.00 % |" in text
    assert "The engine reserves another number of bytes for a full-length sequence than the formula" in text


def test_why_the_formula_is_not_one_rate_is_named_by_what_lies_within_the_lengths() -> None:
    def why(shape: synthetic.Shape, config: dict[str, Any] | None) -> str:
        text = section(notes(memory(shape), config), "Bytes per KV token: three estimates")
        return next((line for line in text.splitlines() if "not one rate" in line), "")

    assert why(SLIDING, SLIDING.config).endswith(", since a sliding window stops growing at 2559 tokens.")
    assert why(LINEAR, LINEAR.config).endswith("over lengths that are counted in whole blocks of 640 tokens.")
    assert "window" not in why(LINEAR, LINEAR.config)
    assert "recurrent" not in why(LINEAR, LINEAR.config)
    assert "not known from this run, which does not hold the model's config" in why(LINEAR, None)
    assert why(MLA, MLA.config) == ""
    below = replace(SLIDING, lengths=(512, 1000, 2000))
    assert "window" not in why(below, below.config), "it ends past the longest"


def test_stairs_are_found_without_a_config_but_their_window_is_not_named() -> None:
    text = notes(memory(SLIDING), None)
    assert "- 2048 to 4096: 1,152 bytes per token\n" in text
    assert "a sliding window stops growing" not in text


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({512: 288 * MIB, 1024: 0}, "cache -288.0 MiB; KV tensors lie in segments that activations had freed"),
        ({1024: 288 * MIB, 2048: 288 * MIB, 4096: 288 * MIB}, "cache +288.0 MiB; more of what activations freed"),
    ],
)
def test_a_step_is_named_with_its_mechanism(extra: dict[int, int], words: str) -> None:
    assert words in notes(memory(replace(synthetic.GPU, extra_ready_bytes=extra)), None)


def test_a_step_without_an_account_has_no_named_cause() -> None:
    text = notes(memory(replace(synthetic.CPU, extra_ready_bytes={2048: 90 * MIB, 4096: 90 * MIB})), None)
    assert "+35.2 %); its cause is not known from this run: the CPU backend's memory is not accounted for" in text
    assert "torch takes memory" not in text


def test_the_slope_at_a_fixed_utilization_is_computed_and_disowned() -> None:
    text = notes(memory(synthetic.GPU), None)
    assert (
        "The line through memory when ready has a slope of 641.1 bytes per token of max_model_len (R² 0.704348, largest"
        in text
    )
    assert "That is no cost of a KV token" in text
    two = [row for row in memory(synthetic.GPU) if row.max_model_len < 2000]
    assert "The line through memory when ready has a slope of 0.0 bytes per token of max_model_len. That" in notes(
        two, None
    )


# --- the envelope ---


def envelope_section(rows: list[PointRow], config: dict[str, Any] | None = None) -> str:
    return section(notes(rows, config, Targets(16, 3000)), "Headroom envelope")


def test_measured_levels_are_marked_beside_the_arithmetic_of_their_own_pool() -> None:
    text = envelope_section(ladder(LINEAR), LINEAR.config)
    card, small = text.split("#### A pool of ")[1:]
    assert card.startswith("3,072 MiB")
    assert "No level of load was measured on this pool, so all of this table is arithmetic" in card
    assert "[" not in card.split("| tokens")[1].split("No level")[0]
    assert "| 4064 | 3.12 fits [no preemption] |" in small
    assert "50.0 tight [no preemption] | 100 waits or preempts [preempted] |" in small
    assert "Of 5 that the arithmetic calls fitting or tight, 0 saw" in small
    assert "Of 1 that need more than the pool, 1 did. **Arithmetic and measurement agree**" in small


def test_length_of_a_level_is_what_the_server_counted() -> None:
    counted = {"mean_prompt_tokens": 3900.0, "mean_completion_tokens": 60.0}
    rows = ladder(LINEAR, **{f"c{level}": counted for level in LINEAR.ladder})
    assert "| 3960 |" in envelope_section(rows, LINEAR.config)
    assert "| 4064 |" not in envelope_section(rows, LINEAR.config)


DIFFER = "Arithmetic and measurement differ here:"


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ({"c4": {"preemptions": 3}}, [DIFFER, "4 requests of 4064 tokens need 25.0 % of the pool, and yet: preempted"]),
        (
            {"c32": {"preemptions": 0, "waiting_max": 0}},
            [DIFFER, "Of 1 that need more than the pool, 0 did.", "99.8 %"],
        ),
        ({"c32": {"preemptions": 0}}, ["[waited for KV]", "**Arithmetic and measurement agree**"]),
        ({"c32": {"preemptions": None}}, ["[waited for KV]", "**Arithmetic and measurement agree**"]),
        (
            {"c32": {"preemptions": None, "running_max": None}},
            ["[metrics missing]", "At 1 of them the server's metrics do not tell."],
        ),
        ({"c32": {"status": "failed"}}, ["None needs more than the pool, so the border itself was not tried"]),
    ],
)
def test_what_levels_did_changes_what_is_said(at: dict[str, dict[str, object]], words: list[str]) -> None:
    text = envelope_section(ladder(LINEAR, **at), LINEAR.config)
    for part in words:
        assert part in text
    assert ("**Arithmetic and measurement agree**" in text) == any("agree**" in part for part in words)


def test_a_moments_wait_and_a_full_queue_are_no_waits_for_the_pool() -> None:
    waited: dict[str, Any] = {"waiting_max": 3, "kv_usage_max": 0.99}
    assert "[waited for KV]" not in envelope_section(ladder(LINEAR, c16=waited | {"running_max": 16}), LINEAR.config)
    text = envelope_section(ladder(LINEAR, c16=waited | {"running_max": 14}, c32={"preemptions": 0}), LINEAR.config)
    assert "tight [waited for KV]" in text
    queued = {"waiting_max": 9, "running_max": 8, "kv_usage_max": 0.4}
    assert "tight [no preemption]" in envelope_section(ladder(LINEAR, c16=queued), LINEAR.config)


def test_shared_prefixes_are_not_marked() -> None:
    shared = {f"c{level}": {"shared_prefix": "8 shared prefixes of 256 tokens"} for level in LINEAR.ladder}
    assert "[no preemption]" not in envelope_section(ladder(LINEAR, **shared), LINEAR.config)


def test_levels_above_max_num_seqs_stand_where_they_run() -> None:
    rows = ladder(LINEAR, **{f"c{level}": {"max_num_seqs": 16} for level in LINEAR.ladder})
    text = envelope_section(rows, LINEAR.config)
    assert "at most 16 requests run at once there (max_num_seqs)" in text
    assert "Levels of more requests than max_num_seqs stand at max_num_seqs" in text
    assert "Of 6 that the arithmetic calls fitting or tight, 1 saw" in text


def test_a_window_is_said_to_be_counted_without_tokens_in_flight() -> None:
    words = "hold the window alone while a request decodes"
    assert words in envelope_section(ladder(SLIDING), SLIDING.config)
    assert words not in envelope_section(ladder(LINEAR), LINEAR.config)


def test_a_window_lets_more_run_than_the_engine_counts() -> None:
    quiet: dict[str, Any] = {"preemptions": 0, "waiting_max": 0}
    text = envelope_section(ladder(SLIDING, c32=quiet), SLIDING.config)
    assert "119 fits [no preemption]" in text
    assert DIFFER not in text
    text = envelope_section(ladder(SLIDING), SLIDING.config)
    assert "32 requests of 4064 tokens need 86.9 % of the pool, and yet: preempted" in text


def card_envelope(rows: list[PointRow], config: dict[str, Any] | None) -> Envelope:
    tables = synthetic.tables_of(rows, config)
    return envelopes(kv_results(tables.points)[0], tables.points, tables.configs)[0]


def test_one_sequence_larger_than_the_pool_does_not_fit() -> None:
    envelope = card_envelope(memory(SLIDING), SLIDING.config)
    small = replace(envelope, size_bytes=6 * MIB)
    assert small.fit(1024, 1) is Fit.FITS
    assert small.fit(1024, 2) is Fit.PREEMPTS
    assert small.fit(4096, 1) is Fit.NEVER


CARD = card_envelope(memory(SLIDING), SLIDING.config)


@given(at_once=st.integers(1, 3000))
def test_the_longest_safe_length_is_the_last_that_fits(at_once: int) -> None:
    longest = CARD.longest(at_once)
    assert longest is not None
    layout = kv_layout(published("tiny-sliding"), device="cpu", max_num_batched_tokens=2048)
    fits = [at_once * layout.bytes_per_sequence(at) <= 0.9 * CARD.size_bytes for at in (max(longest, 1), longest + 1)]
    assert longest == 0 or fits[0]
    assert longest == 8192 or not fits[1]


@given(tokens=st.integers(1, 8192), requests=st.integers(1, 2000))
def test_the_border_of_the_plot_is_the_tables(tokens: int, requests: int) -> None:
    size = CARD.need_bytes(tokens, requests)
    assert replace(CARD, size_bytes=int(size), null_block_bytes=0.0).most(tokens) == pytest.approx(requests)


@given(requests=st.integers(1, 2000))
def test_a_pool_of_just_so_many_requests_is_tight_and_with_a_block_less_too_small(requests: int) -> None:
    assert CARD.pages is not None
    assert CARD.null_block_bytes == CARD.pages.block_bytes
    just = CARD.pages.at_once_bytes(requests, 4096) + CARD.pages.block_bytes
    assert replace(CARD, size_bytes=just).fit(4096, requests) is Fit.TIGHT
    less = replace(CARD, size_bytes=just - CARD.pages.block_bytes)
    assert less.fit(4096, requests) in (Fit.PREEMPTS, Fit.NEVER)


def test_the_longest_safe_length_needs_the_page_function() -> None:
    words = "By arithmetic 270 full-length sequences, as the engine counts them, stay within that share of 3.00 GiB up "
    found = notes(memory(SLIDING), SLIDING.config, Targets(270, 4096))
    assert f"{words}to 7424 tokens; this length was not measured." in found
    assert words not in notes(memory(SLIDING), None, Targets(270, 4096))


def test_without_a_page_function_lengths_between_are_said_to_be_on_lines() -> None:
    assert "what lies between or beyond them is on straight lines" in envelope_section(memory(SLIDING))
    assert "straight lines" not in envelope_section(memory(SLIDING), SLIDING.config)


def test_layout_of_a_row_is_that_of_its_server() -> None:
    tables = synthetic.tables_of(memory(SLIDING), SLIDING.config)
    for point in tables.points:
        pages = pages_of(point, tables.configs)
        assert pages is not None
        assert pages.sequence_bytes(point.max_model_len) == point.formula_bytes_per_sequence


# --- plots ---


def drawn(tmp_path: Path, rows: list[PointRow], config: dict[str, Any] | None) -> dict[str, str]:
    run = synthetic.write_run(tmp_path, rows)
    manifest = {"target": {"concurrency": 16, "context_tokens": 3000}, "sessions": synthetic.planned(rows, config)}
    (run / "manifest.json").write_text(json.dumps(manifest))
    with patch("analysis.pages.plots._drawings", return_value=[]):  # only the plots that this file is about
        written = [path for path in reduce(run) if path.suffix == ".svg"]
    return {path.stem: "".join(ET.parse(path).getroot().itertext()) for path in written}


def test_plots_of_pages_and_envelope_say_what_is_measured(tmp_path: Path) -> None:
    found = drawn(tmp_path, ladder(SLIDING), SLIDING.config)
    for words in ("sliding window", "full attention", "all layers", "the window stops growing", "engine: pool"):
        assert words in found["kv_pages"]
    assert "measured:" not in found["kv_envelope"]
    small = found["kv_envelope.pool-0-134-gib"]
    for words in ("arithmetic: fits", "measured: no preemption", "measured: preempted", "target", "pool of 137 MiB"):
        assert words in small


def test_no_region_is_drawn_past_what_the_model_takes() -> None:
    longest = published("phi-3-mini-4k")["max_position_embeddings"]
    for config, ends in ((WINDOW.config, True), (None, False)):
        points = synthetic.tables_of(memory(WINDOW), config)
        (result,) = kv_results(points.points)
        figure = Figure()
        draw_envelope(envelopes(result, points.points, points.configs)[0], Targets(16, 4096), figure)
        (axes,) = figure.axes
        drawn_to = max(region.get_paths()[0].vertices[:, 0].max() for region in axes.collections)
        assert bool(drawn_to == longest) is ends
        assert axes.get_xlim()[1] > longest
        hatched = [patch.get_label() for patch in axes.patches if patch.get_hatch()]
        assert hatched == (["longer than the model takes"] if ends else [])


def test_simulated_plots_measure_nothing(tmp_path: Path) -> None:
    shape = synthetic.family("qwen3-next-cut", synthetic.GPU, simulated=True, engine="sim", device="sim")
    found = drawn(tmp_path, ladder(shape), shape.config)
    names: Callable[[str], bool] = lambda name: name.startswith(("kv_pages", "kv_envelope"))  # noqa: E731
    assert len(list(filter(names, found))) == 3
    for name in filter(names, found):
        assert "simulated" in found[name]
        assert "measured:" not in found[name]
        assert "engine:" not in found[name]


def test_without_a_config_there_is_no_plot_of_pages(tmp_path: Path) -> None:
    assert "kv_pages" not in drawn(tmp_path, memory(SLIDING), None)


WINDOW = synthetic.family("phi-3-mini-4k", synthetic.GPU)


def rules(shape: synthetic.Shape, config: dict[str, Any] | None) -> str:
    return " ".join(rule.text for rule in rules_of_thumb(synthetic.tables_of(memory(shape), config)))


def test_a_full_window_costs_no_further_context() -> None:
    words = "every 1,024 further tokens of context cost"
    text = rules(WINDOW, WINDOW.config)
    assert "up to 2,047 tokens of context every 1,024 further ones cost 384.0 MiB of KV for each sequence" in text
    assert (
        "past that 0.0 MiB while it decodes (formula): a sliding window is full there. The engine's count grows" in text
    )
    assert words not in text
    assert words in rules(LINEAR, LINEAR.config)
    assert words not in rules(LINEAR, None)


def test_blocks_that_do_not_grow_are_not_besides_the_pool() -> None:
    row = memory(WINDOW)[0]
    besides = round(((row.mem_ready_bytes or 0) - (row.engine_kv_bytes or 0)) / MIB)
    text = notes(memory(WINDOW), WINDOW.config)
    assert f"the pools' own line at 198 MiB; the difference, {besides:,} MiB, is what the server holds besides" in text


def test_tokens_of_one_pool_that_differ_are_explained() -> None:
    assert "They differ though the pool does not" in notes(memory(WINDOW), WINDOW.config)
    assert "They differ though the pool does not" not in notes(memory(synthetic.GPU), None)


def test_both_counts_of_sequences_stand_beside_each_other() -> None:
    text = notes(memory(WINDOW), WINDOW.config, Targets(16, 4096))
    layout = kv_layout(published("phi-3-mini-4k"), max_num_batched_tokens=2048, vllm_version="0.25.1")
    row = memory(WINDOW)[-1]
    blocks = (row.engine_num_blocks or 0) - 1
    held = max(n for n in range(200) if layout.blocks_at_once(n, 4096) <= blocks)
    assert f"({row.engine_max_concurrency:.2f} by the engine's count, {held} held at once)" in text
    assert "*Held at once*" in text
    assert "held at once" not in notes(memory(MLA), MLA.config, Targets(16, 4096)).split("### Headroom envelope")[0]


def test_no_length_beyond_the_models_own_is_asked_for() -> None:
    text = notes(memory(WINDOW), WINDOW.config, Targets(16, 4096))
    assert "and the longest that the model takes." in text
    assert "Set max_model_len to 4096, the longest that the model takes." in text
    assert "But the model takes 4096 tokens at most." in notes(memory(WINDOW), WINDOW.config, Targets(16, 5000))
    assert "a higher one does not take memory" in notes(memory(WINDOW), WINDOW.config, Targets(16, 2048))
    page = operating_page(synthetic.tables_of(memory(WINDOW), WINDOW.config), Slo(), Targets(16, 4096), None)
    assert page is not None
    assert "It is the longest that the model takes." in page.text()
    assert "a longer one was not tried" not in page.text()


def test_a_cell_that_was_pruned_measured_nothing(tmp_path: Path) -> None:
    shape = synthetic.family("tiny", synthetic.GPU)
    pruned = replace(synthetic.failed(synthetic.envelope_row(shape, 512, 1), "", "fits", "pruned"), failure_class=None)
    blind = synthetic.envelope_row(shape, 512, 4, preemptions=None)
    rows = [synthetic.envelope_row(shape, 512, 8, kv_usage_max=0.79693486), blind, pruned]
    run = synthetic.write_run(tmp_path, rows)
    reduce(run)
    with (run / "envelope_sweep.csv").open() as file:
        cells = {row["concurrency"]: row for row in csv.DictReader(file)}
    assert [cells[at]["measured"] for at in ("1", "4", "8")] == ["", "metrics missing", "no preemption"]
    assert cells["8"]["kv_usage_max"] == "0.796935"
    assert "| metrics missing |" in (run / "envelope_sweep.md").read_text()


def test_no_word_of_the_cells_is_one_of_the_headroom_envelope() -> None:
    """95 % of a pool is *tight* with headroom kept, and all of it fits without."""
    assert not {str(word) for word in Expected} & {str(word) for word in Fit}
    assert fit_of(0.95, True) is Fit.TIGHT
    words = fit_of(1.5, True), fit_of(1.5, False)
    assert words == (Fit.PREEMPTS, Fit.NEVER)
    page = envelope_page(synthetic.tables_of([synthetic.envelope_row(SLIDING, 512, 8)], SLIDING.config))
    assert page is not None
    assert all(f"*{word}*, " in page.text() for word in Expected if word is not Expected.UNKNOWN)


def said_of(rows: list[PointRow], config: dict[str, Any] | None) -> str:
    (grid,) = envelope_grids(synthetic.tables_of(rows, config))
    return summary(grid).text


def test_cells_that_were_measured_are_counted_whatever_arithmetic_knows() -> None:
    """As in a run that was sent without its manifest."""
    shape = synthetic.family("tiny", synthetic.GPU)
    one, two = synthetic.envelope_row(shape, 512, 8), synthetic.envelope_row(shape, 512, 16)
    pruned = synthetic.failed(synthetic.envelope_row(shape, 512, 1), "", "fits", "pruned")
    blind = replace(one, preemptions=None)
    assert said_of([one, two, pruned], shape.config) == (
        "Of 3 cells 2 were measured and 1 pruned; expected and measured agree on whether all requests fit in 2 of "
        "those measured."
    )
    assert said_of([one, two, pruned], None).startswith(
        "Of 3 cells 2 were measured and 1 pruned, but none confirms the expected border: of 2 what KV arithmetic "
        "expects is not known (no config"
    )
    assert said_of([blind, pruned], shape.config).endswith("border: of 1 the server's metrics are missing.")
    assert said_of([blind, two, pruned], shape.config).endswith(
        "in 1 of those measured. Of 1 more that were measured the server's metrics are missing."
    )
    lost = synthetic.failed(one, "engine_dead")
    for config in (shape.config, None):
        assert said_of([lost, pruned], config) == (
            "Of 2 cells none was measured, so the expected border is not confirmed."
        )


def test_cells_that_arithmetic_leaves_open_confirm_nothing() -> None:
    rows = [synthetic.envelope_row(SLIDING, 4096, n) for n in range(1, 12)]
    (grid,) = envelope_grids(synthetic.tables_of(rows, SLIDING.config))
    between = [n for n, cell in enumerate(grid.cells) if cell.expected is Expected.OPEN]
    assert between
    alone = said_of([rows[n] for n in between], SLIDING.config)
    assert alone.endswith(f"none confirms the expected border: of {len(between)} arithmetic leaves it open.")
    beside = said_of([rows[0], *(rows[n] for n in between)], SLIDING.config)
    assert beside.endswith(f"Of {len(between)} more that were measured arithmetic leaves it open.")
