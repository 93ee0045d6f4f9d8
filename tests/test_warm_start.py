"""benchmarks/warm_start.py: what it calls equivalent, what it does not pass over, and what it pools."""

import contextlib
import math
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import warm_equivalence, warm_start
from benchmarks.warm_equivalence import (
    MIB,
    Go,
    Level,
    Memory,
    Server,
    Setting,
    differing,
    read,
    repeat_sd,
    save,
    shared_names,
    unexpected_keys,
    variance_ratio_limit,
    verdict,
)
from contract.rows import CLIENT_LIMITED, FAILED, MEASURED
from contract.specs import Point, PointKind, SessionSpec, Start
from tests.test_session import spec
from workers.launch.warm import NotWarm

NAME = ".config.instance_id"
ROUNDS = 8
LEVEL = 16


def told(name: str, **more: str) -> dict[str, str]:
    return {NAME: name, ".config.model": "m", ".env.VLLM_WORKER_MULTIPROC_METHOD": name, **more}


def server(
    number: int,
    start: Start,
    length: int = 512,
    memory: Memory | float = 100.0,
    levels: Sequence[Level] = (),
    **more: Any,
) -> Server:
    """Return a server of a round; `memory` in MiB when ready, a load leaves 10 more."""
    if not isinstance(memory, Memory):
        memory = Memory(MEASURED, int(memory * MIB), int((memory + 10) * MIB))
    given = {"machine": "card", "configuration": told(f"{start}{length}{number}"), **more}
    seconds = {"ready_s": 2.0, "cpu_s": 1.0, "phases_s": {"imports": 1.0}}
    return Server(number, start, length, memory=memory, levels=[*levels], **seconds, **given)


def setting(
    device: str = "cuda", lengths: Sequence[int] = (512,), levels: Sequence[int] = (), repeats: int = 3
) -> Setting:
    return Setting("tiny", [], device, [*lengths], [*levels], repeats)


def go(*servers: Server, **given: Any) -> Go:
    return Go(setting(**given), [*servers])


def code(*goes: Go) -> int:
    return verdict(goes, within=0.05, memory_within_bytes=2 * MIB)


# --- configuration and memory ---


def test_a_key_that_differs_in_any_round_is_named() -> None:
    same = [told("a"), told("b"), told("c")]
    assert unexpected_keys(same) == []
    assert unexpected_keys([told("a") | {".config.model": "other"}, *same]) == [".config.model"]
    assert unexpected_keys([*same, told("d", **{".env.NEW": "1"})]) == [".env.NEW"]


def test_a_name_made_for_one_server_that_two_have_is_named() -> None:
    assert shared_names([told("a"), told("b")]) == []
    assert shared_names([told("a"), told("b"), told("a")]) == [NAME]
    assert shared_names([told("a"), {}]) == []


@pytest.mark.parametrize(
    ("device", "memory_mib", "warm_names", "expected"),
    [
        ("cuda", [100.0, 150.0], ["c", "d"], 0),
        ("cuda", [103.0, 153.0], ["c", "d"], 1),  # at each length
        ("cpu", [60.0, 110.0], ["c", "d"], 0),  # shared pages
        ("cpu", [60.0, 114.0], ["c", "d"], 1),  # its growth
        ("cuda", [100.0, 150.0], ["c", "c"], 1),
        ("cuda", [100.0, 150.0], None, 1),  # a server that told no configuration shows nothing
    ],
)
def test_the_exit_code_says_whether_the_two_ways_are_equivalent(
    device: str, memory_mib: list[float], warm_names: list[str] | None, expected: int
) -> None:
    seen = []
    for at, length in enumerate((512, 1024)):
        warm = {} if warm_names is None else told(warm_names[at])
        seen += [
            server(0, Start.COLD, length, 100.0 + 50 * at),
            server(0, Start.WARM, length, memory_mib[at], configuration=warm),
        ]
    assert code(go(*seen, device=device, lengths=(512, 1024))) == expected


@pytest.mark.parametrize("column", ["ready_bytes", "loaded_bytes"])
def test_one_server_among_many_that_takes_more_is_not_hidden_by_their_median(column: str) -> None:
    seen = [server(number, start) for number in range(3) for start in Start]
    assert code(go(*seen)) == 0
    odd = {"ready_bytes": 100 * MIB, "loaded_bytes": 110 * MIB, column: 600 * MIB}
    seen[-1] = server(2, seen[-1].start, memory=Memory(MEASURED, **odd))
    assert code(go(*seen)) == 1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("missing", [Memory(FAILED), Memory(FAILED, 100 * MIB, 110 * MIB), Memory(MEASURED, 100 * MIB)])
def test_memory_that_was_not_read_in_either_way_is_not_the_same(
    missing: Memory, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(go(*(server(0, start, memory=missing) for start in Start), device=device)) == 1
    assert "NOT read of all 2 servers" in capsys.readouterr().out


def kept(number: int, start: Start, loaded_mib: float, ready_mib: float = 100.0) -> Server:
    """Return a server that has so much memory after a load."""
    return server(number, start, memory=Memory(MEASURED, int(ready_mib * MIB), int(loaded_mib * MIB)))


def scattered(cold: Sequence[float], warm: Sequence[float], more: float = 0.0) -> Go:
    """Return a go of a round for each pair, which differ in what a load has left, `more` MiB in all of them."""
    both = enumerate(zip(cold, warm, strict=True))
    return go(
        *(kept(n, start, mib + more, 100 + more) for n, pair in both for start, mib in zip(Start, pair, strict=True))
    )


def test_after_a_load_the_ways_may_be_as_far_apart_as_two_cold_servers(capsys: pytest.CaptureFixture[str]) -> None:
    """Torch keeps blocks that differ by tens of MiB from server to server, of one way too."""
    assert code(scattered([110, 126, 110], [110, 110, 126])) == 0
    assert code(scattered([110, 126, 110], [110, 110, 142])) == 0
    assert "at most 16.0 MiB apart: within 16.0" in capsys.readouterr().out
    assert code(scattered([110, 126, 110], [110, 110, 143])) == 1
    assert "at most 17.0 MiB apart: NOT within 16.0" in capsys.readouterr().out


def test_warm_servers_that_scatter_allow_themselves_nothing() -> None:
    assert code(scattered([110, 110], [110, 112])) == 0
    assert code(scattered([110, 110], [110, 126])) == 1


def test_one_round_allows_no_more_after_a_load_than_when_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(scattered([110], [112])) == 0
    assert code(scattered([110], [113])) == 1
    assert "memory, loaded: one round tells nothing of what cold servers differ by" in capsys.readouterr().out


def test_cold_servers_of_two_lengths_are_no_scatter_and_those_of_one_lend_it_to_another() -> None:
    """An odd server is rare: of few at one length there may be none."""
    alike = [server(n, start, length, length / 8) for n in range(2) for start in Start for length in (512, 1024)]
    alike[-1] = replace(alike[-1], memory=Memory(MEASURED, 128 * MIB, 148 * MIB))
    assert code(go(*alike, lengths=(512, 1024))) == 1
    alike[0] = replace(alike[0], memory=Memory(MEASURED, 64 * MIB, 90 * MIB))
    assert code(go(*alike, lengths=(512, 1024))) == 0


def test_cold_servers_that_scatter_allow_nothing_when_ready() -> None:
    seen = [kept(0, Start.COLD, 110), kept(0, Start.WARM, 110), kept(1, Start.COLD, 116, 103), kept(1, Start.WARM, 110)]
    assert code(go(*seen)) == 1


def test_memory_is_held_against_that_of_the_same_go(capsys: pytest.CaptureFixture[str]) -> None:
    """What one machine has more than another is no scatter, and hides no server of the other."""
    alike, off = scattered([110, 110], [110, 110], more=100), scattered([110, 110], [110, 160])
    for each in off.servers:
        each.configuration[NAME] += "'"
    assert code(off, alike) == 1
    assert "at most 50.0 MiB apart: NOT within 2.0" in capsys.readouterr().out


def test_growth_is_taken_within_a_round() -> None:
    """Of the CPU backend, whose shared pages move both lengths of a round alike."""
    seen = [
        server(number, start, length, 100.0 + 30 * number + length / 10) for number in range(3) for start in Start
        for length in (512, 1024)
    ]  # fmt: skip
    assert code(go(*seen, device="cpu", lengths=(512, 1024))) == 0


# --- levels ---


def loaded(
    number: int, start: Start, tok_s: Sequence[float], statuses: Sequence[str] | None = None, level: int = LEVEL
) -> Server:
    """Return a server with the repeats of one level; its p95 goes the other way."""
    rows = [
        Level(level, status, v, 100 / v) for v, status in zip(tok_s, statuses or [MEASURED] * len(tok_s), strict=True)
    ]
    return server(number, start, levels=rows)


def rounds(
    scatter: float = 0.03, warm_scatter: float | None = None, between: float = 0.0, far: float = 1.0,
    count: int = ROUNDS, machine: float = 1.0,
) -> Go:  # fmt: skip
    """Return a go whose warm servers are `far` times as fast.

    Repeats on one server have a standard deviation of `scatter`, servers one of `between` beside that (of logarithms);
    over four rounds the servers of either way are equally often above and below their mean, each way in its own order.
    """
    seen = []
    ways = ((Start.COLD, scatter, (1, -1, 1, -1)), (Start.WARM, warm_scatter or scatter, (1, 1, -1, -1)))
    for number in range(count):
        for start, own, sides in ways:
            off = sides[number % 4] * math.hypot(between, own / math.sqrt(3))
            centre = machine * 100 * math.exp(off) * (far if start is Start.WARM else 1)
            seen.append(loaded(number, start, [centre * math.exp(own * step) for step in (-1, 0, 1)]))
    return go(*seen, levels=(LEVEL,))


def test_a_level_that_differs_by_more_than_a_repeat_is_exit_code_1() -> None:
    assert code(rounds(far=1.0)) == 0
    assert code(rounds(far=1.06)) == 1


def test_what_decides_is_a_repeats_scatter_and_the_fixed_share_stands_beside_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert code(rounds(scatter=0.1)) == 0
    assert "within 5.0%: NOT shown to be equivalent" in capsys.readouterr().out
    assert code(rounds(scatter=0.002, far=1.02)) == 1
    assert "within 5.0%: equivalent" in capsys.readouterr().out


def test_what_the_servers_processes_did_beside_a_level_is_told_and_decides_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = rounds()
    assert code(seen) == 0
    assert "what servers did was not looked at" in capsys.readouterr().out
    for each in seen.servers:
        spent = (1.5, 20.0) if each.start is Start.WARM else (1.0, 2.0)
        each.levels[:] = [replace(level, cores=spent[0], faults_per_s=spent[1]) for level in each.levels]
    assert code(seen) == 0
    told = "cold and warm servers had 1.00 and 1.50 cores, 2 and 20 minor page faults a second (medians)"
    assert told in capsys.readouterr().out
    for each in seen.servers:
        each.levels[:] = [replace(level, sm_clock_mhz=1980.0, huge_mib=0.0) for level in each.levels]
    assert code(seen) == 0
    assert "a second, 0 and 0 MiB on huge pages, an SM clock of 1980 and 1980 MHz" in capsys.readouterr().out
    for each in seen.servers:
        ttft_ms, tpot_ms = (14.0, 3.31) if each.start is Start.WARM else (13.5, 3.29)
        each.levels[:] = [replace(level, ttft_ms=ttft_ms, tpot_ms=tpot_ms) for level in each.levels]
    assert code(seen) == 0
    assert "had a TTFT of 13.50 and 14.00 ms, a TPOT of 3.290 and 3.310 ms, 1.00 and" in capsys.readouterr().out


def test_a_noisier_machine_does_not_make_it_easier(capsys: pytest.CaptureFixture[str]) -> None:
    """A repeat that scatters by a fifth allows a tenth: what is 12 % apart is no more equivalent than elsewhere."""
    assert code(rounds(scatter=0.15, count=60)) == 0
    assert "one cold repeat scatters by 15.0%: equivalent within 10%" in capsys.readouterr().out
    assert code(rounds(scatter=0.2, far=1.12, count=60)) == 1
    assert "one cold repeat scatters by 20.0%: NOT shown to be equivalent within 10%" in capsys.readouterr().out


def test_servers_that_differ_do_not_widen_what_they_are_held_against() -> None:
    """A machine that scatters more from server to server must not be granted more for it."""
    assert code(rounds(scatter=0.001, between=0.0)) == 0
    assert code(rounds(scatter=0.001, between=0.05)) == 1


def test_a_warm_server_whose_repeats_scatter_does_not_widen_it_either(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(rounds(scatter=0.01, warm_scatter=0.08)) == 1
    assert capsys.readouterr().out.count("one cold repeat scatters by 1.0%") == 2


def test_two_ways_that_scatter_differently_are_not_equivalent(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where their means are near to each other, by the measure of what a repeat scatters by."""
    seen = []
    for number, off in enumerate((-1, 1) * 4):
        for start, part in ((Start.COLD, 0.001), (Start.WARM, 0.02)):
            centre = 100 * math.exp(off * part)
            seen.append(loaded(number, start, [centre * 0.95, centre, centre * 1.05]))
    assert code(go(*seen, levels=(LEVEL,))) == 1
    said = capsys.readouterr().out
    assert "equivalent within that" in said
    assert "NOT shown to be equivalent within that" not in said
    assert "variance warm / cold 400.00" in said
    assert "NOT alike" in said


def test_a_noisy_level_lends_a_quiet_one_nothing() -> None:
    quiet, noisy = warm_equivalence.Spread(0.0012, 12), warm_equivalence.Spread(0.12, 12)
    assert repeat_sd(quiet, [quiet, noisy]) == pytest.approx(0.01)
    assert repeat_sd(noisy, [quiet, noisy]) == pytest.approx(0.1)
    alike = warm_equivalence.Spread(0.0013, 12)
    assert repeat_sd(quiet, [quiet, alike]) == repeat_sd(alike, [quiet, alike])
    assert repeat_sd(warm_equivalence.Spread(0.0, 0), [warm_equivalence.Spread(0.0, 0)]) is None


@pytest.mark.parametrize(
    ("df", "tail", "expected"), [(7, 0.025, 4.995), (10, 0.025, 3.717), (4, 0.05, 6.388), (1, 0.05, 161.45)]
)
def test_the_limit_of_a_variance_ratio_is_that_of_the_tables_of_f(df: int, tail: float, expected: float) -> None:
    assert variance_ratio_limit(df, tail) == pytest.approx(expected, rel=1e-3)


def test_degrees_of_freedom_are_servers_less_groups_however_many_levels_and_repeats() -> None:
    cells = [([1.0, 1.1, 1.2], [1.1, 1.0, 1.2]), ([2.0, 2.1], [2.1, 2.0])]
    found = warm_equivalence.ratio(cells)
    assert found is not None
    assert found.df == 10 - 4
    assert warm_equivalence.ratio([([1.0], [1.1])]) is None


def test_ways_as_far_apart_as_the_bound_are_called_equivalent_as_seldom_as_promised() -> None:
    chance, wrong, bound = random.Random(5), 0, 0.06
    for _ in range(400):
        cold = [math.exp(chance.gauss(0, 0.04)) for _ in range(8)]
        warm = [math.exp(bound + chance.gauss(0, 0.04)) for _ in range(8)]
        found = warm_equivalence.ratio([(cold, warm)])
        assert found is not None
        wrong += found.is_within(bound)
    assert 0.02 < wrong / 400 < 0.09


@pytest.mark.parametrize("status", [CLIENT_LIMITED, FAILED])
def test_a_level_that_is_no_measurement_is_not_equivalent(status: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen = rounds()
    for at, each in enumerate(seen.servers[:2]):
        values = [100.0, 101.0, 99.0]
        seen.servers[at] = loaded(each.round, each.start, values, [MEASURED, status, MEASURED])
    assert code(seen) == 1
    assert f"concurrency {LEVEL}: NOT compared, 2 {status} of {6 * ROUNDS} repeats" in capsys.readouterr().out


def test_one_round_tells_nothing_of_noise(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(rounds(count=1)) == 1
    assert "tells nothing of noise" in capsys.readouterr().out


def test_repeats_without_a_second_one_on_a_server_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py", "--levels", "1", "--repeats", "1"])
    with pytest.raises(SystemExit):
        warm_start.main()
    assert "--repeats must be at least 2" in capsys.readouterr().err


def test_the_order_of_the_two_ways_alternates() -> None:
    assert [warm_start.order(number) for number in range(2)] == [
        (Start.COLD, Start.WARM),
        (Start.WARM, Start.COLD),
    ]


# --- how the servers ran ---

SEATS, EAGER = ".config.scheduler_config.max_num_seqs", ".config.model_config.enforce_eager"


def telling(seen: Go, **more: str) -> Go:
    for each in seen.servers:
        each.configuration.update({{"seats": SEATS, "eager": EAGER}[name]: value for name, value in more.items()})
    return seen


@pytest.mark.parametrize(
    ("eager", "device", "expected"),
    [("True", "cuda", "eager"), ("False", "cuda", "CUDA graphs"), ("False", "cpu", "compiled")],
)
def test_the_verdict_names_how_the_servers_ran(
    eager: str, device: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict([telling(go(*(server(0, start) for start in Start), device=device), eager=eager, seats="48")], 0.05, MIB)
    assert capsys.readouterr().out.startswith(f"tiny on {device}: {expected}, max_num_seqs 48\n")


def test_what_the_servers_do_not_tell_is_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(go(*(server(0, start) for start in Start))) == 0
    assert capsys.readouterr().out.startswith("tiny on cuda: eager or not: not told, max_num_seqs not told\n")


def test_a_level_whose_requests_did_not_all_run_at_once_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code(telling(rounds(), seats=str(LEVEL)))
    assert "in flight, at most" not in capsys.readouterr().out
    code(telling(rounds(), seats="12"))
    assert capsys.readouterr().out.count(f"  {LEVEL} in flight, at most 12 running: ") == 2


def test_goes_whose_servers_ran_otherwise_are_not_pooled() -> None:
    assert differing([telling(rounds(), seats="64"), telling(rounds(), seats="64"), rounds()]) == []
    assert differing([telling(rounds(), seats="64"), telling(rounds(), seats="32")]) == ["max_num_seqs"]
    assert differing([telling(rounds(), eager="True"), telling(rounds(), eager="False")]) == ["enforce_eager"]


@pytest.mark.parametrize(
    ("overrides", "level", "refused"),
    [
        (["server.max_num_seqs=32"], 33, "the servers run 32 requests at once: add server.max_num_seqs=33"),
        (["server.max_num_seqs=32"], 32, None),
        (["sweep.sequences=8"], 9, "the servers run 8 requests at once: add server.max_num_seqs=9"),
        (["sweep.sequences=8", "server.max_num_seqs=99"], 99, "add sweep.sequences=99"),
        (["sweep.sequences=8", "server.max_num_seqs=99"], 32, None),
        (["sweep.modes=[utilization]"], 10**6, None),  # vLLM decides
    ],
)
def test_a_level_whose_requests_would_wait_for_others_is_refused(
    overrides: list[str], level: int, refused: str | None
) -> None:
    lengths = [512, 1024]
    if refused is None:
        servers = warm_start.planned("tiny", lengths, [1, level], overrides)
        assert [each.server.max_model_len for each in servers] == lengths
        return
    with pytest.raises(ValueError, match=f"level {level}: .*{refused}"):
        warm_start.planned("tiny", lengths, [1, level], overrides)


# --- interrupted, saved, pooled ---


def test_what_an_interrupted_run_has_not_got_both_ways_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(go()) == 1
    seen = [server(number, start) for number in range(2) for start in Start]
    half = go(*seen, server(0, Start.COLD, 1024, 150.0), lengths=(512, 1024))
    assert code(half) == 0
    assert "1024" not in capsys.readouterr().out
    half.setting.levels.append(LEVEL)
    assert code(half) == 1
    half.setting.levels.clear()
    half.servers.append(server(0, Start.WARM, 1024, 150.0))
    assert code(half) == 0
    assert "512 to 1024" in capsys.readouterr().out


def test_half_a_round_counts_for_neither_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(go(*(server(0, start) for start in Start), server(1, Start.COLD, memory=900.0))) == 0
    assert "medians of 1" in capsys.readouterr().out


def elsewhere(seen: Go) -> Go:
    """Return the same of another go, whose servers have names of their own."""
    return go(
        *(replace(each, configuration=told(f"{each.configuration[NAME]}'")) for each in seen.servers), levels=(LEVEL,)
    )


def test_rounds_on_two_machines_are_pooled_each_with_its_own_two_servers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A machine that is a quarter faster is no noise and no difference, and adds its rounds."""
    one, other = rounds(count=4), elsewhere(rounds(count=4, machine=1.25))
    assert code(one, other) == 0
    assert "from 8 rounds in 2 goes" in capsys.readouterr().out
    together = go(
        *one.servers, *(loaded(s.round + 4, s.start, [r.tok_s or 0 for r in s.levels]) for s in other.servers)
    )
    together.setting.levels.append(LEVEL)
    assert code(together) == 1  # as if one machine had jumped


def test_keys_that_differ_from_machine_to_machine_are_no_difference_of_the_two_ways() -> None:
    goes = [
        go(*(server(0, start, configuration=told(f"{start}{host}", **{".env.HOST": host})) for start in Start))
        for host in ("a", "b")
    ]
    assert code(*goes) == 0


def test_a_go_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    seen = rounds(count=2)
    save(seen, tmp_path / "one.json")
    assert read(tmp_path / "one.json") == seen
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"setting": {}, "servers": []}'])
def test_what_was_not_saved_by_it_is_refused_in_words(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_text(content)
    monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py", "--read", str(tmp_path / "f")])
    with pytest.raises(SystemExit, match="is not what --save writes"):
        warm_start.main()


def test_files_are_pooled_and_none_of_another_kind_of_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = rounds(count=4)
    both = [str(tmp_path / name) for name in ("one", "other")]
    for path, seen in zip(both, (one, elsewhere(one)), strict=True):
        save(seen, Path(path))
    monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py", "--read", *both])
    assert warm_start.main() == 0
    assert "from 8 rounds in 2 goes" in capsys.readouterr().out
    save(go(replace(one.servers[0], machine="another"), *one.servers[1:], levels=(LEVEL,)), Path(both[1]))
    with pytest.raises(SystemExit, match="machine"):
        warm_start.main()


def test_goes_of_other_arguments_are_not_of_one_kind() -> None:
    one = rounds(count=1)
    assert differing([one, one]) == []
    assert differing([one, Go(setting(levels=(LEVEL,), repeats=2), one.servers)]) == ["repeats"]


def test_a_file_read_twice_is_no_second_go() -> None:
    one = rounds()
    assert code(one) == 0
    assert code(one, one) == 1


@pytest.mark.parametrize("ended_round", [1, 2])
@pytest.mark.parametrize(
    ("by", "ends", "words"),
    [
        ("offer", KeyboardInterrupt(), "interrupted"),
        ("offer", NotWarm("it has ended"), "no warm parent"),
        ("parent_for", OSError("no more processes"), "no warm parent"),
    ],
)
def test_what_ends_in_a_rounds_import_keeps_the_rounds_before_and_no_parent(
    by: str,
    ends: BaseException,
    words: str,
    ended_round: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: Counter[str] = Counter()

    def called(name: str) -> None:
        calls[name] += 1
        if name == by and calls[name] == ended_round:
            raise ends

    def parent_for(*_: object) -> SimpleNamespace:
        called("parent_for")
        return SimpleNamespace(socket="/none", close=lambda: called("closed"))

    def offer(*_: object) -> SimpleNamespace:
        called("offer")
        return SimpleNamespace(close=lambda: None)

    def started(spec: SessionSpec, _parent: object, number: int, _levels: list[int]) -> Server:
        return server(number, spec.start)

    monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py", "--lengths", "512"])
    for name, fake in (("parent_for", parent_for), ("offer", offer), ("_start", started)):
        monkeypatch.setattr(warm_start, name, fake)
    assert warm_start.main() == (1 if ended_round == 1 else 0)
    assert calls["closed"] == calls["offer"]
    printed = capsys.readouterr().out
    assert f"{words} in round {ended_round} of 3" in printed
    assert ("medians of 1" in printed) == (ended_round == 2)


def test_what_else_fails_is_no_matter_of_a_warm_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object) -> Server:
        raise RuntimeError("a process pool broke")

    monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py", "--lengths", "512"])
    monkeypatch.setattr(warm_start, "_start", started)
    with pytest.raises(RuntimeError, match="a process pool broke"):
        warm_start.main()


class FakeSession:
    """Starts nothing: its rows are as given."""

    def __init__(self, spec: SessionSpec, *_: object) -> None:
        self.spec, self.stopped = spec, False
        self.row = SimpleNamespace(server_pid=None)

    def start(self) -> Any:
        return SimpleNamespace(
            status=MEASURED, start=self.spec.start, ready_s=2.0, server_pid=None, phases=[], device_name="card",
            driver_version="1", vllm_version="2", torch_version="3", failure_message=None,
        )  # fmt: skip

    def measure(self, point: Point) -> Any:
        if point.kind is PointKind.MEMORY:
            return SimpleNamespace(
                status=FAILED, failure_message="gone", mem_baseline_bytes=0, mem_ready_bytes=None, mem_loaded_bytes=None
            )  # fmt: skip
        limited = point.concurrency == 64
        return SimpleNamespace(
            status=CLIENT_LIMITED if limited else FAILED, failure_message="why", tok_s=100.0 if limited else None,
            p95_e2e_s=0.5 if limited else None,
        )  # fmt: skip

    def stop(self) -> None:
        self.stopped = True


def test_what_is_no_measurement_is_kept_with_its_status_and_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warm_start, "Session", FakeSession)
    monkeypatch.setattr(warm_start, "_configuration", lambda _: told("a"))
    monkeypatch.setattr(warm_start, "_cpu_s", lambda _: 1.0)
    found = warm_start._start(replace(spec(), start=Start.WARM), Path("/none"), 0, [1, 64])
    assert found.memory == Memory(FAILED)
    assert found.levels == [Level(1, FAILED), Level(64, CLIENT_LIMITED, 100.0, 0.5)]
    assert found.machine.startswith("card, ")
    said = capsys.readouterr().out
    assert "memory: failed: gone" in said
    assert "64: 100.0 tok/s, p95 0.500 s, client_limited why" in said


def test_a_level_has_the_medians_of_its_requests_in_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    row = SimpleNamespace(
        status=MEASURED, failure_message=None, tok_s=100.0, p95_e2e_s=0.5, p50_ttft_s=0.0135, p50_tpot_s=0.0033,
        telemetry=[],
    )  # fmt: skip
    session = SimpleNamespace(row=SimpleNamespace(server_pid=os.getpid()), measure=lambda _: row)
    found = warm_start._measured(session, warm_start._level(1, 0))  # type: ignore[arg-type]
    assert (found.ttft_ms, found.tpot_ms) == (13.5, 3.3)


def test_what_is_there_when_a_run_is_killed_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each server, for what ends a run on a lent machine asks nobody. The first may compile: not kept."""
    first = server(-1, Start.COLD, 64)
    file, starts = tmp_path / "seen.json", iter([first, server(0, Start.COLD, 64), server(0, Start.WARM, 64)])

    def start(*_: object) -> Server:
        if (found := next(starts, None)) is None:
            raise SystemExit(9)
        return found

    specs = [SimpleNamespace(device="cpu", server=SimpleNamespace(max_model_len=64))]
    monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py", "--lengths", "64", "--save", str(file)])
    monkeypatch.setattr(warm_start, "planned", lambda *_: specs)
    monkeypatch.setattr(warm_start, "replace", lambda spec, **_: spec)
    monkeypatch.setattr(warm_start, "parent_for", lambda *_: SimpleNamespace(socket="/none", close=lambda: None))
    monkeypatch.setattr(warm_start, "offer", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(warm_start, "_start", start)
    with pytest.raises(SystemExit):
        warm_start.main()
    assert [(each.round, each.start) for each in read(file).servers] == [(0, Start.COLD), (0, Start.WARM)]


@dataclass
class SideBySide:
    """A run with servers that stay up: which had which level, in order, whom it told to hurry, and its exit code."""

    sent: list[tuple[int, Start, int]] = field(default_factory=list)
    up: list[tuple[int, Start]] = field(default_factory=list)
    hurried: int = 0
    code: int | None = None

    def run(
        self,
        monkeypatch: pytest.MonkeyPatch,
        file: Path,
        ends_at: int | None = None,
        fails: tuple[int, Start] | None = None,
        stopping: type[BaseException] | None = None,
    ) -> None:
        """`ends_at`: the level, counted, at which Ctrl-C comes; `fails`: a server that does not start; `stopping`: what
        the first stop raises."""
        outer = self

        class Fake(warm_start.Running):
            def measured(self, concurrency: int, number: int) -> Level:
                if len(outer.sent) == ends_at:
                    raise KeyboardInterrupt
                assert (self.server.round, self.server.start) in outer.up
                assert len(outer.up) % 2 == 0, "half a round is up"
                outer.sent.append((self.server.round, self.server.start, concurrency))
                tok_s = 100.0 + len(outer.sent) % 3
                return Level(concurrency, MEASURED, tok_s, 100 / tok_s)

        def hurry() -> None:
            self.hurried += 1

        @contextlib.contextmanager
        def running(spec: SessionSpec, _parent: object, number: int) -> Iterator[warm_start.Running]:
            nonlocal stopping
            if (number, spec.start) == fails:
                raise warm_start.NotStarted("no memory")
            self.up.append((number, spec.start))
            try:
                yield Fake(SimpleNamespace(hurry=hurry), server(number, spec.start))  # type: ignore[arg-type]
            finally:
                self.up.remove((number, spec.start))
                if stopping is not None:
                    raised, stopping = stopping, None
                    raise raised

        arguments = ["--lengths", "512", "--rounds", "2", "--levels", "1", "4", "--repeats", "3", "--side-by-side"]
        monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py", *arguments, "--save", str(file)])
        monkeypatch.setattr(warm_start, "_start", lambda *_: server(-1, Start.COLD))
        monkeypatch.setattr(warm_start, "_running", running)
        monkeypatch.setattr(warm_start, "parent_for", lambda *_: SimpleNamespace(socket="/none", close=lambda: None))
        monkeypatch.setattr(warm_start, "offer", lambda *_: SimpleNamespace(close=lambda: None))
        self.code = warm_start.main()
        assert not self.up


COMPARED = "tok/s: warm / cold with 90 % interval, from {} rounds in 1 goes"


def test_servers_side_by_side_have_each_level_in_turns_while_all_are_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    orders = set()
    for repeat in range(3):
        run = SideBySide()
        run.run(monkeypatch, tmp_path / f"{repeat}.json")
        assert run.hurried == 4
        for at, level in enumerate([1, 4] * 3):
            turn = run.sent[4 * at : 4 * at + 4]
            assert {each[2] for each in turn} == {level}
            assert {each[:2] for each in turn} == {(number, start) for number in range(2) for start in Start}
            orders.add((at, tuple(each[:2] for each in turn)))
        saved = read(tmp_path / f"{repeat}.json")
        assert [[row.concurrency for row in each.levels] for each in saved.servers] == [[1, 4] * 3] * 4
    assert len(orders) > 6, "another run must have another order"
    said = capsys.readouterr().out
    assert "side by side" in said
    assert COMPARED.format(2) in said


def test_of_turns_that_are_interrupted_the_whole_ones_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SideBySide().run(monkeypatch, tmp_path / "seen.json", ends_at=2 * 8 + 5)
    said = capsys.readouterr().out
    assert "interrupted" in said
    assert COMPARED.format(2) in said
    assert "NOT compared" not in said
    saved = read(tmp_path / "seen.json")
    assert saved.setting.repeats == 2
    assert {len(each.levels) for each in saved.servers} == {4}


def test_turns_of_which_none_is_whole_compare_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = SideBySide()
    run.run(monkeypatch, tmp_path / "seen.json", ends_at=5)
    assert run.code == 1
    assert "concurrency 1: NOT compared, 4 of 4 servers did not have it 3 times" in capsys.readouterr().out


@pytest.mark.parametrize("fails", [Start.COLD, Start.WARM])
def test_where_a_server_does_not_start_the_whole_rounds_before_have_their_turns(
    fails: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = SideBySide()
    run.run(monkeypatch, tmp_path / "seen.json", fails=(1, fails))
    assert {number for number, _, _ in run.sent} == {0}
    assert len(run.sent) == 2 * 2 * 3
    assert run.code == 1
    assert not read(tmp_path / "seen.json").complete
    said = capsys.readouterr().out
    assert "a server did not start in round 2 of 2: no memory" in said
    assert said.endswith("not every server that was asked for was up\nNOT shown to be equivalent\n")
    assert COMPARED.format(1) in said


def test_a_file_says_that_a_server_did_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where none stays up, so that nothing else is saved after it."""
    whole = rounds()
    found = iter([whole.servers[0], *whole.servers])

    def start(*_: object) -> Server:
        if (made := next(found, None)) is None:
            raise warm_start.NotStarted("no memory")
        return made

    file = tmp_path / "seen.json"
    arguments = ["--lengths", "512", "--rounds", str(ROUNDS + 1), "--levels", str(LEVEL), "--save", str(file)]
    monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py", *arguments])
    monkeypatch.setattr(warm_start, "_start", start)
    monkeypatch.setattr(warm_start, "crowded", lambda *_: None)
    monkeypatch.setattr(warm_start, "parent_for", lambda *_: SimpleNamespace(socket="/none", close=lambda: None))
    monkeypatch.setattr(warm_start, "offer", lambda *_: SimpleNamespace(close=lambda: None))
    assert warm_start.main() == 1
    monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py", "--read", str(file)])
    assert warm_start.main() == 1
    saved = read(file)
    saved.complete = True
    assert code(saved) == 0


def test_an_interrupt_while_servers_are_stopped_costs_no_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SideBySide().run(monkeypatch, tmp_path / "seen.json", stopping=KeyboardInterrupt)
    assert COMPARED.format(2) in capsys.readouterr().out


def test_what_a_machine_does_from_turn_to_turn_is_not_in_what_the_two_ways_are_held_against(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def held(drift: float, side_by_side: bool) -> str:
        own = ((1.00, 1.02, 0.98), (1.01, 0.99, 1.0), (0.99, 1.0, 1.01), (1.0, 0.98, 1.02))
        seen = [
            loaded(at // 2, list(Start)[at % 2], [100 * v * drift**turn for turn, v in enumerate(values)])
            for at, values in enumerate(own)
        ]
        one = go(*seen, levels=(LEVEL,))
        verdict([Go(replace(one.setting, side_by_side=side_by_side), seen)], 0.05, 2 * MIB)
        line = capsys.readouterr().out.partition("tok/s: warm")[2].splitlines()[1]
        return line.partition("scatters by ")[2].partition("%")[0]

    assert held(1.5, side_by_side=True) == held(1.0, side_by_side=True)
    assert float(held(1.5, side_by_side=False)) > 30 > 10 * float(held(1.5, side_by_side=True))


def test_a_turns_mean_takes_nothing_from_what_a_repeat_scatters_by() -> None:
    rng = random.Random(3)
    pairs = [
        warm_equivalence.Pair(
            *(loaded(at, start, [math.exp(rng.gauss(0, 0.05)) for _ in range(200)]) for start in Start)
        )
        for at in range(2)
    ]
    found = warm_equivalence._spread_on_one_server(LEVEL, "tok_s", [pairs], side_by_side=True)
    assert math.sqrt(found.squares / found.df) == pytest.approx(0.05, rel=0.08)


def test_side_by_side_is_not_pooled_with_one_after_the_other_nor_asked_for_without_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = rounds(count=1)
    assert differing([one, Go(replace(one.setting, side_by_side=True), one.servers)]) == ["side_by_side"]
    monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py", "--side-by-side"])
    with pytest.raises(SystemExit):
        warm_start.main()
    assert "name --levels" in capsys.readouterr().err


def test_memory_is_what_came_since_the_server_was_started() -> None:
    row = SimpleNamespace(status=MEASURED, mem_baseline_bytes=100, mem_ready_bytes=150, mem_loaded_bytes=170)
    assert warm_start._memory(row) == Memory(MEASURED, 50, 70)  # type: ignore[arg-type]
    row.mem_baseline_bytes = None
    assert warm_start._memory(row) == Memory(MEASURED, None, None)  # type: ignore[arg-type]


def test_neighbours_are_in_no_growth_between_lengths_on_the_cpu_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--lengths", "512", "1024", "--levels", "1", "--side-by-side"]
    monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py", *arguments])
    monkeypatch.setattr(warm_start, "planned", lambda *_: [SimpleNamespace(device="cpu")] * 2)
    with pytest.raises(SystemExit, match="one length on the CPU backend"):
        warm_start.main()


def test_what_no_run_forks_on_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def parent(*_: object) -> None:
        raise AssertionError("it was started")

    monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py"])
    monkeypatch.setattr(warm_start, "planned", lambda *_: [SimpleNamespace(device="cuda")])
    monkeypatch.setattr(warm_start, "parent_for", parent)
    monkeypatch.setattr(warm_start, "kinds_of_cards", lambda: ("NVIDIA A100", "NVIDIA H100"))
    with pytest.raises(SystemExit, match="several kinds: NVIDIA A100, NVIDIA H100"):
        warm_start.main()
