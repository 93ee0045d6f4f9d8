"""Plans: which servers, which points, which ids; pure, and the same for the same input."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract import kv
from contract.arrivals import ArrivalProcess, Arrivals, Stage
from contract.lengths import LogNormal, Normal, Uniform
from contract.specs import Api, Mode, Point, PointKind, Precision, Purpose, SharedPrefix, Start
from orchestrator import estimate
from orchestrator.fleet import Fleet, NoRoom
from orchestrator.manifest import make_manifest
from orchestrator.plan import Plan, _identified, make_plan
from orchestrator.preflight import check
from orchestrator.preview import describe, estimate_s
from orchestrator.problems import ConfigError
from orchestrator.schema import Experiment
from tests import synthetic_run as synthetic
from tests.configs import cpu_fleet, experiment, gpu_fleet, resolved, sim_fleet

MIB = 2**20


def plan(*experiments: Experiment, fleet=None) -> Plan:  # type: ignore[no-untyped-def]
    return make_plan(resolved(*experiments), fleet or gpu_fleet(1))


def test_manifest_says_what_is_to_be_served_and_at_what_price() -> None:
    asked = experiment("kv", "phi-3-mini-4k", slo__p95_e2e_s=0.5, cost__gpu_hour=2.5)
    manifest = make_manifest("run", [asked], plan(asked), gpu_fleet(1))
    assert manifest["target"] == {"concurrency": 16, "context_tokens": 4096}
    assert manifest["slo"] == {"p95_e2e_s": 0.5, "p95_ttft_s": None, "p95_tpot_s": None}
    assert manifest["cost"] == {"gpu_hour": 2.5}
    assert {"aiohttp", "uvloop"} <= manifest["versions"].keys()


def test_experiments_of_one_run_agree_on_the_price() -> None:
    with pytest.raises(ConfigError, match="cost: experiments of one run must agree on it"):
        check([experiment("kv", engine="sim"), experiment("kv", engine="sim", cost__gpu_hour=2.5)])


def test_kv_sweep_has_a_server_for_each_length_and_mode() -> None:
    sessions = plan(experiment("kv", "phi-3-mini-4k")).sessions
    assert [(s.mode, s.server.max_model_len) for s in sessions] == [
        (mode, length) for mode in (Mode.COMMITTED, Mode.UTILIZATION) for length in (512, 1024, 2048, 4096)
    ]
    assert all([point.kind for point in s.points] == [PointKind.MEMORY] for s in sessions)


def test_committed_pool_holds_the_sequences_and_grows_by_the_formula() -> None:
    committed = [s for s in plan(experiment("kv", "phi-3-mini-4k")).sessions if s.mode is Mode.COMMITTED]
    pools = [s.server.kv_cache_memory_bytes or 0 for s in committed]
    assert {s.sequences for s in committed} == {32}
    steps = [b - a for a, b in itertools.pairwise(pools)]
    assert steps == [32 * step * 393_216 for step in (512, 1024, 2048)]
    assert all(s.server.enforce_eager and s.server.max_num_batched_tokens == 2048 for s in committed)


def test_the_dry_run_names_the_servers_that_are_eager() -> None:
    fleet = gpu_fleet(1)
    lines = describe(
        plan(experiment("kv", "phi-3-mini-4k", sweep__max_model_len=[512]), fleet=fleet), fleet
    ).splitlines()
    assert [line.partition("max_model_len=")[2].partition(")")[0] for line in lines if "max_model_len=" in line] == [
        "512 (pool of 32 sequences, eager",
        "512 (utilization",
    ]


def test_the_dry_run_names_the_servers_that_are_forked_and_counts_their_import() -> None:
    fleet = gpu_fleet(1)
    ways = [plan(experiment("kv", "phi-3-mini-4k", server__start=how), fleet=fleet) for how in ("warm", "cold")]
    lines = [[line for line in describe(way, fleet).splitlines() if "max_model_len=" in line] for way in ways]
    assert all("  1 GPU, warm  " in line for line in lines[0])
    assert not any("warm" in line for line in lines[1])
    both = [sum(session.estimate_s for session in way.sessions) for way in ways]
    assert estimate_s(ways[0].sessions, fleet) == both[0] + estimate.import_s("vllm", on_cpu=False)
    assert estimate_s(ways[1].sessions, fleet) == both[1]


@pytest.mark.parametrize("engine", ["sim", "vllm"])
def test_the_dry_run_calls_no_server_warm_where_none_is_ever_forked(engine: str) -> None:
    """The simulator's, and on nodes whose cards are of several kinds."""
    of_one = sim_fleet(1) if engine == "sim" else gpu_fleet(1)
    mixed = replace(of_one.nodes[0], id="mixed", all_kinds=("NVIDIA A100", "NVIDIA H100"))
    fleet = of_one if engine == "sim" else replace(of_one, nodes=(mixed,))
    warm, cold = (
        plan(experiment("kv", "phi-3-mini-4k", engine, server__start=how), fleet=fleet) for how in ("warm", "cold")
    )
    assert describe(warm, fleet) == describe(cold, fleet)
    assert estimate_s(warm.sessions, fleet) == sum(session.estimate_s for session in warm.sessions)


def test_the_dry_run_calls_servers_warm_where_one_node_of_several_can_fork() -> None:
    of_one = gpu_fleet(1)
    fleet = replace(of_one, nodes=(replace(of_one.nodes[0], id="mixed", all_kinds=("a", "b")), *of_one.nodes))
    assert "1 GPU, warm" in describe(plan(experiment("kv", server__start="warm"), fleet=fleet), fleet)


def starts(fleet: Fleet, *sweeps: str, **settings: object) -> dict[tuple[int, Mode], Start]:
    """How the servers of one run start, by length and mode."""
    sessions = plan(*(experiment(sweep, "phi-3-mini-4k", **settings) for sweep in sweeps), fleet=fleet).sessions
    return {(session.server.max_model_len, session.mode): session.start for session in sessions}


def test_left_open_servers_of_cards_are_forked_where_only_memory_is_measured() -> None:
    assert set(starts(gpu_fleet(1), "kv").values()) == {Start.WARM}
    assert set(starts(gpu_fleet(1), "concurrency").values()) == {Start.COLD}
    assert set(starts(gpu_fleet(1), "slo", slo__p95_e2e_s=1.0).values()) == {Start.COLD}
    assert set(starts(cpu_fleet(), "kv").values()) == {Start.COLD}
    assert set(starts(gpu_fleet(1), "kv", server__start="cold").values()) == {Start.COLD}
    assert set(starts(gpu_fleet(1), "concurrency", server__start="warm").values()) == {Start.WARM}


def test_a_server_of_memory_and_load_is_not_forked_unasked() -> None:
    """Nor are the others of its curve of memory: all of that start alike."""
    both = starts(gpu_fleet(1), "kv", "concurrency")
    assert both == starts(gpu_fleet(1), "concurrency", "kv")
    assert {mode: start for (_, mode), start in both.items()} == {
        Mode.COMMITTED: Start.WARM, Mode.UTILIZATION: Start.COLD,
    }  # fmt: skip
    assert len(set(both.items())) == 8


def test_servers_are_not_forked_unasked_where_that_was_never_shown_or_cannot_be() -> None:
    assert set(starts(gpu_fleet(2), "kv", server__tensor_parallel_size=2).values()) == {Start.COLD}
    asked = experiment("kv", "phi-3-mini-4k")
    real = make_plan([(asked, replace(resolved(asked)[0][1], dummy_weights=False))], gpu_fleet(1)).sessions
    assert {session.start for session in real} == {Start.COLD}
    mixed = replace(gpu_fleet(1).nodes[0], all_kinds=("NVIDIA A100", "NVIDIA H100"))
    assert set(starts(replace(gpu_fleet(1), nodes=(mixed,)), "kv").values()) == {Start.COLD}


def test_an_experiment_that_leaves_it_open_agrees_with_one_that_does_not() -> None:
    fleet = gpu_fleet(1)
    for first, second in itertools.permutations(("auto", "cold")):
        asked = [experiment("kv", "phi-3-mini-4k", server__start=how) for how in (first, second)]
        assert {session.start for session in plan(*asked, fleet=fleet).sessions} == {Start.COLD}


def test_cpu_steps_are_at_least_128_mib() -> None:
    committed = [s for s in plan(experiment("kv", "tiny"), fleet=cpu_fleet()).sessions if s.mode is Mode.COMMITTED]
    pools = [s.server.kv_cache_memory_bytes or 0 for s in committed]
    assert min(b - a for a, b in itertools.pairwise(pools)) >= 128 * MIB
    assert all(s.gpus == 0 for s in committed)


@pytest.mark.parametrize("model", ["qwen2.5-1.5b", "llama-3.1-8b", "gemma-3-4b", "deepseek-v2-lite", "qwen3-next-cut"])
def test_committed_pools_fit_the_card(model: str) -> None:
    for session in plan(experiment("kv", model)).sessions:
        weights = kv.weight_bytes(session.model.config)
        assert (session.server.kv_cache_memory_bytes or 0) + weights < 80 * 2**30


def test_ladders_send_ten_requests_a_level_and_at_least_32() -> None:
    (session,) = plan(experiment("concurrency")).sessions
    assert [(p.concurrency, p.num_requests) for p in session.points] == [
        (1, 32), (2, 32), (4, 40), (8, 80), (16, 160), (32, 320),
    ]  # fmt: skip


def test_batching_compares_the_same_requests_and_repeats_every_level() -> None:
    (session,) = plan(experiment("batching")).sessions
    comparison = [p for p in session.points if p.purpose is Purpose.COMPARISON]
    assert [(p.concurrency, p.num_requests) for p in comparison] == [(1, 32), (8, 32)] * 3
    assert sum(p.purpose is Purpose.BATCHING for p in session.points) == 4 * 3


def test_near_full_ladder_goes_past_the_pool() -> None:
    sessions = plan(experiment("capacity", "phi-3-mini-4k")).sessions
    near_full = [p for s in sessions for p in s.points if p.purpose is Purpose.NEAR_FULL_CONTEXT]
    assert max(p.concurrency for p in near_full) == 128, "an H100 holds some 80 at once"
    assert {p.prompt_tokens + p.output_tokens for p in near_full} == {4088}


def test_near_full_ladder_on_a_pool_of_known_size() -> None:
    asked = experiment("capacity", "phi-3-mini-4k", sweep__near_full_context__sequences=16)
    (session,) = [s for s in plan(asked).sessions if s.sequences == 16]
    assert session.mode is Mode.COMMITTED
    assert max(p.concurrency for p in session.points) == 32


def test_near_full_ladder_grows_where_the_engine_holds_more_than_was_foreseen() -> None:
    asked = experiment("capacity", "phi-3-mini-4k", sweep__near_full_context__sequences=4, controls="off")
    made = plan(asked)
    (session,) = [s for s in made.sessions if s.sequences == 4]
    (search,) = made.searches[session.id]
    told = replace(synthetic.rows()[0], engine_max_concurrency=9.9, engine_num_blocks=2800)
    more = search.next({"told": told}).measure
    assert [(p.concurrency, p.num_requests) for p in more] == [(16, 160), (32, 320)]
    named = [1, 2, 4, 8, 16, 32]
    asked = experiment(
        "capacity", "phi-3-mini-4k", sweep__near_full_context__sequences=4, sweep__near_full_context__concurrency=named
    )
    (same,) = [s for s in plan(asked).sessions if s.sequences == 4]
    assert [p.id for p in same.points] == [p.id for p in (*session.points, *more)], "resume must know them again"
    assert search.next({p.id: told for p in more}).measure == ()


def test_levels_that_the_user_named_are_not_added_to() -> None:
    asked = experiment("capacity", "phi-3-mini-4k", sweep__near_full_context__concurrency=[1, 2], controls="off")
    assert plan(asked).searches == {}


def test_no_room_for_near_full_prompts_is_said() -> None:
    with pytest.raises(ConfigError, match="70 leaves no room for near-full-context prompts"):
        plan(experiment("capacity", server__max_model_len=70, load__prompt_tokens=4, load__output_tokens=64))


def test_a_kv_sweep_refuses_a_pool_of_the_users() -> None:
    with pytest.raises(ConfigError, match="a kv sweep sizes its pools itself"):
        plan(experiment("kv", server__kv_cache_memory_bytes=10**9))


def test_tensor_parallel_needs_gpus() -> None:
    with pytest.raises(NoRoom, match="tensor_parallel_size=2"):
        plan(experiment("kv", server__tensor_parallel_size=2), fleet=cpu_fleet())


def test_equal_servers_are_one_session_with_memory_read_first() -> None:
    sessions = plan(experiment("concurrency"), experiment("kv"), fleet=sim_fleet()).sessions
    shared = next(s for s in sessions if len(s.points) > 1)
    assert shared.points[0].kind is PointKind.MEMORY
    assert len(sessions) == 8


def test_equal_points_of_two_experiments_are_measured_once() -> None:
    (once,) = plan(experiment("concurrency")).sessions
    (both,) = plan(experiment("concurrency"), experiment("concurrency", sweep__repeats=2)).sessions
    assert len(both.points) == 2 * len(once.points)


def test_a_longer_ladder_keeps_the_ids_of_the_shorter() -> None:
    short = plan(experiment("concurrency", sweep__concurrency=[1, 2])).sessions[0]
    long = plan(experiment("concurrency", sweep__concurrency=[1, 2, 4])).sessions[0]
    assert short.id == long.id
    assert [p.id for p in short.points] == [p.id for p in long.points[:2]]


@pytest.mark.parametrize(
    "changes",
    [
        {"server__dtype": "float16"},
        {"server__extra_args": {"block_size": 32}},
        {"model": "qwen2.5-1.5b"},
        {"seed": 1},
        {"load__prompt_tokens": 13},
        {"load__prompt_tokens": {"uniform": {"low": 12, "high": 12}}},
        {"load__output_tokens": {"uniform": {"low": 1, "high": 127}}},
        {"load__shared_prefix": {"groups": 1, "tokens": 4}},
        {"load__api": "chat"},
    ],
)
def test_what_moves_a_number_moves_the_id(changes: dict[str, object]) -> None:
    before = plan(experiment("concurrency")).sessions[0].points[0].id
    assert plan(experiment("concurrency", **changes)).sessions[0].points[0].id != before  # type: ignore[arg-type]


def test_what_does_not_move_a_number_keeps_the_id() -> None:
    before = plan(experiment("concurrency")).sessions[0].points[0].id
    after = plan(
        experiment("concurrency", engine__ready_timeout_s=5.0, output_root="elsewhere", load__prefix_hit_limit=0.5)
    )
    assert after.sessions[0].prefix_hit_limit == 0.5
    assert after.sessions[0].points[0].id == before


LEVEL = Point("", PointKind.LOAD, Purpose.CONCURRENCY, "concurrency", 8, 80, 12, 64, 8, 1, 7)
FLAT = Arrivals(ArrivalProcess.POISSON, 2, (Stage(10),))


@pytest.mark.parametrize(
    "other",
    [
        replace(LEVEL, arrivals=FLAT),
        replace(LEVEL, seconds=30.0),
        replace(LEVEL, precision=Precision("p95_e2e_s", 0.05)),
        replace(LEVEL, warmup_requests=9),
        replace(LEVEL, repeat=2),
    ],
)
def test_how_a_level_is_sent_and_ended_moves_its_id(other: Point) -> None:
    assert _identified("s", other).id != _identified("s", LEVEL).id


def test_the_sweep_that_names_a_level_and_its_estimate_do_not() -> None:
    assert _identified("s", replace(LEVEL, sweep="capacity", estimate_s=9.0)).id == _identified("s", LEVEL).id


def test_a_rate_sweep_is_open_loop_levels_of_so_many_seconds() -> None:
    made = plan(experiment("rate", sweep__request_rate=[0.5, 4], sweep__repeats=2, sweep__seconds=20.0))
    (session,) = made.sessions
    assert [(p.purpose, p.concurrency, p.num_requests, p.repeat) for p in session.points] == [
        (Purpose.RATE, 0, 10, 0), (Purpose.RATE, 0, 80, 0), (Purpose.RATE, 0, 10, 1), (Purpose.RATE, 0, 80, 1)
    ]  # fmt: skip
    assert [p.warmup_requests for p in session.points[:2]] == [2, 12]
    assert session.points[0].arrivals == Arrivals(ArrivalProcess.POISSON, 0.5, (Stage(20),))


def test_stages_are_shares_of_the_levels_rate() -> None:
    stages = [{"seconds": 10.0, "share": 0.5}, {"seconds": 20.0, "share": 0.5, "to": 1.0}]
    made = plan(experiment("rate", sweep__request_rate=[4], sweep__stages=stages, sweep__arrivals="constant"))
    (point,) = made.sessions[0].points
    assert point.arrivals == Arrivals(ArrivalProcess.CONSTANT, 4, (Stage(10, 0.5, 0.5), Stage(20, 0.5, 1)))
    assert point.num_requests == 80


def test_levels_are_ended_by_time_where_that_is_asked_but_the_comparison_by_its_requests() -> None:
    precision = {"metric": "p95_e2e_s", "within": 0.1}
    made = plan(experiment("batching", load__seconds=9.0, load__precision=precision))
    by_purpose = {p.purpose: (p.seconds, p.precision) for p in made.sessions[0].points}
    assert by_purpose == {
        Purpose.COMPARISON: (None, None),
        Purpose.BATCHING: (9.0, Precision("p95_e2e_s", 0.1)),
    }


def test_points_that_are_asked_for_in_other_ways_have_other_ids() -> None:
    bell = (12, 3, 2, 40)
    points = [
        LEVEL,
        replace(LEVEL, prompt_tokens=Uniform(2, 40)),
        replace(LEVEL, prompt_tokens=Normal(*bell)),
        replace(LEVEL, prompt_tokens=LogNormal(*bell)),
        replace(LEVEL, output_tokens=Normal(*bell)),
        replace(LEVEL, api=Api.CHAT),
        replace(LEVEL, shared_prefix=SharedPrefix(2, 4)),
        replace(LEVEL, shared_prefix=SharedPrefix(4, 2)),
    ]
    assert len({_identified("s", point).id for point in points}) == len(points)


def test_the_longest_that_can_be_drawn_must_fit_the_server() -> None:
    prompts = {"uniform": {"low": 100, "high": 4000}}
    answers = {"lognormal": {"mean": 64, "std": 64, "low": 1, "high": 97}}
    with pytest.raises(ConfigError, match="4000 \\+ 97 tokens of prompt and output do not fit max_model_len 4096"):
        plan(experiment("concurrency", load__prompt_tokens=prompts, load__output_tokens=answers))
    answers["lognormal"]["high"] = 96
    (session,) = plan(experiment("concurrency", load__prompt_tokens=prompts, load__output_tokens=answers)).sessions
    assert session.points[0].prompt_tokens == Uniform(100, 4000)
    assert session.points[0].output_tokens == LogNormal(64, 64, 1, 96)


def test_shared_prefixes_are_all_in_the_cache_before_a_window_opens() -> None:
    asked = experiment("concurrency", load__prompt_tokens=40, load__shared_prefix={"groups": 8, "tokens": 32})
    (session,) = plan(asked).sessions
    assert session.points[0].shared_prefix == SharedPrefix(8, 32)
    assert [p.warmup_requests for p in session.points] == [8, 8, 8, 8, 16, 32]


def test_prefixes_that_cannot_all_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match="50000 prefixes of 1 tokens cannot all differ"):
        plan(experiment("concurrency", load__shared_prefix={"groups": 50_000, "tokens": 1}))


def test_near_full_prompts_are_exact_and_share_nothing_whatever_the_load_is() -> None:
    answers = {"uniform": {"low": 10, "high": 64}}
    load = {"load__api": "chat", "load__output_tokens": answers, "load__shared_prefix": {"groups": 2, "tokens": 8}}
    points = [p for s in plan(experiment("capacity", "phi-3-mini-4k", **load)).sessions for p in s.points]  # type: ignore[arg-type]
    near_full = [p for p in points if p.purpose is Purpose.NEAR_FULL_CONTEXT]
    assert {(p.prompt_tokens, p.api, p.shared_prefix) for p in near_full} == {(4024, Api.COMPLETIONS, None)}
    others = [p for p in points if p.kind is PointKind.LOAD and p not in near_full]
    assert {(p.api, p.shared_prefix) for p in others} == {(Api.CHAT, SharedPrefix(2, 8))}


def test_length_above_the_models_limit_is_named_with_the_limit() -> None:
    with pytest.raises(ConfigError, match=r"sweep.max_model_len: 8192 is above the limit of phi-3-mini-4k, 4096"):
        plan(experiment("kv", "phi-3-mini-4k", sweep__max_model_len=[4096, 8192]))


def test_lengths_that_do_not_fit_the_server() -> None:
    with pytest.raises(ConfigError, match="4090 \\+ 64 tokens of prompt and output do not fit"):
        plan(experiment("concurrency", load__prompt_tokens=4090))


@pytest.mark.parametrize(
    ("fleet", "next_step"),
    [
        (
            gpu_fleet(2, 2),
            "set server.tensor_parallel_size to at most 2, or run where one node has 4, all left to the run",
        ),
        (gpu_fleet(1), "set server.tensor_parallel_size to 1, or run where one node has 4"),
        (cpu_fleet(), "set server.tensor_parallel_size to 1, or run where one node has 4"),
        (sim_fleet(2), "set server.tensor_parallel_size to at most 2, or cluster.num_gpus to 4 or more"),
    ],
    ids=["two nodes of two", "one card", "CPU", "simulated"],
)
def test_more_gpus_than_any_node_has_is_said_with_what_to_do(fleet: Fleet, next_step: str) -> None:
    with pytest.raises(NoRoom, match="tensor_parallel_size=4, but no node has so many") as refused:
        plan(experiment("kv", server__tensor_parallel_size=4), fleet=fleet)
    assert next_step in str(refused.value)


@given(st.lists(st.integers(2, 8192), min_size=1, max_size=6, unique=True), st.integers(1, 64))
def test_any_axis_gives_one_committed_server_a_length(lengths: list[int], sequences: int) -> None:
    made = plan(
        experiment("kv", sweep__max_model_len=sorted(lengths), sweep__sequences=sequences, sweep__modes=["committed"])
    )
    assert [s.server.max_model_len for s in made.sessions] == sorted(lengths)
    assert len({s.id for s in made.sessions}) == len(lengths)


def test_a_pool_that_no_card_can_hold_is_refused_with_its_sizes() -> None:
    with pytest.raises(ConfigError, match=r"KV pool of 139.7 GiB beside about 7.1 GiB of weights .* GPU of 80.0 GiB"):
        plan(experiment("concurrency", model="phi-3-mini-4k", server__kv_cache_memory_bytes=150_000_000_000))
    with pytest.raises(ConfigError, match="max_model_len 4096: a KV pool of 96"):
        plan(experiment("kv", model="phi-3-mini-4k", sweep__sequences=64))
