"""benchmarks/warm_start.py: what it calls equivalent, and what it does not pass over."""

from types import SimpleNamespace

import pytest

from benchmarks import warm_start
from benchmarks.warm_start import Seen, shared_names, unexpected_keys
from contract.specs import Start

NAME = ".config.instance_id"


def told(name: str, **more: str) -> dict[str, str]:
    return {NAME: name, ".config.model": "m", ".env.VLLM_WORKER_MULTIPROC_METHOD": name, **more}


def test_a_key_that_differs_in_any_round_is_named() -> None:
    same = [told("a"), told("b"), told("c")]
    assert unexpected_keys(same) == []
    assert unexpected_keys([told("a") | {".config.model": "other"}, *same]) == [".config.model"]
    assert unexpected_keys([*same, told("d", **{".env.NEW": "1"})]) == [".env.NEW"]


def test_a_name_made_for_one_server_that_two_have_is_named() -> None:
    assert shared_names([told("a"), told("b")]) == []
    assert shared_names([told("a"), told("b"), told("a")]) == [NAME]
    assert shared_names([told("a"), {}]) == []


MIB = 2**20
TELLS_NOTHING: dict[str, str] = {}


@pytest.mark.parametrize(
    ("device", "memory_mib", "warm_names", "code"),
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
    device: str, memory_mib: list[float], warm_names: list[str] | None, code: int
) -> None:
    seen = {}
    for at, length in enumerate((512, 1024)):
        cold = told("ab"[at])
        warm = TELLS_NOTHING if warm_names is None else told(warm_names[at])
        seen[length, Start.COLD] = Seen([2.0], [1.0], memory_bytes=[(100 + 50 * at) * MIB], configurations=[cold])
        seen[length, Start.WARM] = Seen([1.0], [1.0], memory_bytes=[int(memory_mib[at] * MIB)], configurations=[warm])
    assert warm_start.verdict(seen, device, within=0.05, memory_within_bytes=2 * MIB, loaded=None) == code


def test_a_level_that_is_not_shown_to_be_equivalent_is_exit_code_1() -> None:
    for far, code in ((1.0, 0), (1.2, 1)):
        seen = {}
        for start, factor in ((Start.COLD, 1.0), (Start.WARM, far)):
            one = seen[512, start] = Seen([1.0], [1.0], memory_bytes=[MIB], configurations=[told(start)])
            for metric in ("tok/s", "p95"):
                one.levels[8, metric] = [[factor * value] for value in (100.0, 100.2, 100.1, 99.9)]
        assert warm_start.verdict(seen, "cuda", within=0.05, memory_within_bytes=2 * MIB, loaded=512) == code


def test_repeats_on_one_server_do_not_make_up_for_servers_that_differ() -> None:
    for servers, code in (((100.0, 100.2, 99.8), 0), ((95.0, 105.0, 100.0), 1)):
        seen = {}
        for start in (Start.COLD, Start.WARM):
            one = seen[512, start] = Seen([1.0], [1.0], memory_bytes=[MIB], configurations=[told(start)])
            for metric in ("tok/s", "p95"):
                one.levels[8, metric] = [[each * repeat for repeat in (0.99, 1.01) * 20] for each in servers]
        assert warm_start.verdict(seen, "cuda", within=None, memory_within_bytes=2 * MIB, loaded=512) == code


def test_the_order_of_the_two_ways_alternates() -> None:
    assert [warm_start.order(number) for number in range(2)] == [
        (Start.COLD, Start.WARM),
        (Start.WARM, Start.COLD),
    ]


def server(name: str, *memory_mib: int) -> Seen:
    """Return what servers of one name each have shown; the last may have been interrupted before it was read."""
    names = [told(f"{name}{number}") for number, _ in enumerate(memory_mib)]
    return Seen(
        [1.0] * (len(names) or 1), [1.0], memory_bytes=[each * MIB for each in memory_mib], configurations=names
    )


def test_what_an_interrupted_run_has_not_got_both_ways_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"device": "cuda", "within": 0.05, "memory_within_bytes": 2 * MIB}
    assert warm_start.verdict({}, **asked, loaded=None) == 1  # type: ignore[arg-type]
    seen = {(512, Start.COLD): server("a", 100, 100), (512, Start.WARM): server("b", 100, 100)}
    seen |= {(1024, Start.COLD): server("c", 150), (1024, Start.WARM): server("d")}
    assert warm_start.verdict(seen, **asked, loaded=None) == 0  # type: ignore[arg-type]
    assert "1024" not in capsys.readouterr().out
    assert warm_start.verdict(seen, **asked, loaded=1024) == 1  # type: ignore[arg-type]
    seen[1024, Start.WARM] = server("d", 150)
    assert warm_start.verdict(seen, **asked, loaded=None) == 0  # type: ignore[arg-type]
    assert "512 to 1024" in capsys.readouterr().out


def test_an_interrupt_before_the_first_round_ends_without_a_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    closed: list[None] = []
    parent = SimpleNamespace(socket="/none", close=lambda: closed.append(None))
    monkeypatch.setattr(warm_start.sys, "argv", ["warm_start.py"])
    monkeypatch.setattr(warm_start, "_specs", lambda _: [SimpleNamespace(device="cpu")])
    monkeypatch.setattr(warm_start, "parent_for", lambda *_: parent)
    monkeypatch.setattr(warm_start, "offer", interrupted)
    assert warm_start.main() == 1
    assert closed == [None]
    assert "interrupted in round 1 of 3" in capsys.readouterr().out
