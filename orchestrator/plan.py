"""Sessions and points from experiments and a fleet. Pure: the same input gives the same plan, ids included.

Every `auto` of the configuration is resolved here. Called by `orchestrator.__main__`; carried out by `driver`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from analysis.rows.targets import Slo
from contract import kv, lengths
from contract.arrivals import Arrivals
from contract.specs import (
    WORKLOAD_VERSION,
    Api,
    Mode,
    ModelSpec,
    Point,
    PointKind,
    Purpose,
    ServerSpec,
    SessionSpec,
    SharedPrefix,
    Start,
    Timeouts,
    content_id,
)
from orchestrator import estimate, forks, sizing
from orchestrator.fleet import Fleet, NoRoom
from orchestrator.problems import ConfigError
from orchestrator.schema import (
    BatchingSweep,
    CapacitySweep,
    ConcurrencySweep,
    EnvelopeSweep,
    Experiment,
    KneeSweep,
    KvSweep,
    NearFullContext,
    RateSweep,
    SloSweep,
)
from orchestrator.search import Search, bisection, knee, next_step, slo
from orchestrator.search.anchors import SHARE, Anchors, anchor_of
from orchestrator.search.control import ANCHORS_SHARE, Control
from orchestrator.search.envelope import Cell, Envelope
from orchestrator.search.ladder import PastThePool
from orchestrator.search.rounds import Rounds
from workers.load.prompts import PromptFactory

GPU_UTILIZATION = 0.90
"""The tutorial's flag."""
CPU_UTILIZATION = 0.10
"""Of the host's RAM: the CPU backend would take what it is given."""
COMMITTED_UTILIZATION = 0.05
"""vLLM checks at its start that this share is free, and sizes nothing by it once the pool's bytes are given."""
NEAR_FULL_MARGIN_TOKENS = 8
WARMUP_S = 3.0
"""How long a round of an open loop's warm-up lasts."""
OPEN_LOOP_GUESS = 16
"""Requests in flight that an open loop's estimate takes for its drain."""
ENVELOPE_ROUNDS = 2
"""Requests of a cell of the envelope, over those in flight: all grow at once, then some beside others' prompts."""
NEAR_FULL_CPU_SEQUENCES = 4
"""On the CPU backend long prompts take minutes: a small pool is full at a low level."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sessions in the order of the configuration; the queue has its own order."""

    sessions: tuple[SessionSpec, ...]
    searches: Mapping[str, tuple[Search, ...]] = field(default_factory=dict)
    """By session: what adds points to it while it lives. Its points already hold each search's first step."""
    controls: Mapping[str, Control] = field(default_factory=dict)
    """By session: what measures it alone on its host after all else, where others may have been beside it."""

    @property
    def points(self) -> int:
        """Number of points that are certain."""
        return sum(len(session.points) for session in self.sessions)

    @property
    def searched(self) -> int:
        """Number of further points that searches may ask for."""
        return sum(searched_points(self, session) for session in self.sessions)


def searched_points(plan: Plan, session: SessionSpec) -> int:
    """Return how many points its searches may add to a session."""
    return max(sum(s.at_most for s in plan.searches.get(session.id, ())) - len(session.points), 0)


def make_plan(experiments: list[tuple[Experiment, ModelSpec]], fleet: Fleet) -> Plan:
    """Return one plan for all experiments: sessions of equal servers are one session, equal points one point.

    Raises `ConfigError` (lengths that the model or the server cannot hold) and `NoRoom` (more GPUs than any node has,
    or several where they are slices of cards).
    """
    problems: list[str] = []
    sessions: dict[str, SessionSpec] = {}
    searches: dict[str, tuple[Search, ...]] = {}
    starts: dict[str, str] = {}
    for experiment, model in experiments:
        problems += [p for p in _problems(experiment, model) if p not in problems]
        gpus = experiment.server.tensor_parallel_size
        if not fleet.slots:
            raise NoRoom("there are no GPUs: cluster.num_gpus=0")
        if gpus > (most := 1 if fleet.device == "cpu" else fleet.largest_node):
            raise NoRoom(
                f"server.tensor_parallel_size={gpus}, but no node has so many GPUs (have: {fleet.describe()}): "
                f"{_fewer_or_more(gpus, most, fleet)}"
            )
        if gpus > 1 and any(node.slices for node in fleet.nodes):
            why = "the GPUs are slices of cards (MIG), of which CUDA gives a process one"
            raise NoRoom(f"server.tensor_parallel_size={gpus}, but {why}: set it to 1, or use whole cards")
        if not problems:
            planner = _Planner(experiment, model, fleet)
            for session in planner.sessions():
                known = sessions.get(session.id)
                how = experiment.server.start
                before = starts.get(session.id, forks.AUTO)
                starts[session.id] = how if before == forks.AUTO else before
                problems += _disagreements(known, session) if known else []
                if forks.AUTO not in (before, how) and before != how:
                    problems.append(_disagreement("server.start", before, how, session))
                sessions[session.id] = _merged(known, session)
                searches[session.id] = searches.get(session.id, ()) + planner.searches.get(session.id, ())
                large = sizing.too_large(model, session.server, fleet)
                if large is not None:
                    problems.append(f"{model.name}, max_model_len {session.server.max_model_len}: {large}")
    if problems:
        raise ConfigError(problems)
    for key, start in forks.settled(sessions, starts, {key for key, found in searches.items() if found}, fleet).items():
        sessions[key] = _with_start(sessions[key], start, fleet)
    controls: dict[str, Control] = {}
    if any(experiment.controls == "on" for experiment, _ in experiments):
        for session in sessions.values():
            company = _company(session, sessions.values(), fleet)
            anchors, control = _controls(session, searches[session.id], company)
            searches[session.id] += anchors
            if control is not None:
                controls[session.id] = control
    return Plan(tuple(sessions.values()), {session: found for session, found in searches.items() if found}, controls)


def _fewer_or_more(gpus: int, most: int, fleet: Fleet) -> str:
    """Return what to do about a server of more GPUs than any node gives the run."""
    fewer = f"set server.tensor_parallel_size to {'1' if most == 1 else f'at most {most}'}"
    if fleet.device == "sim":
        return f"{fewer}, or cluster.num_gpus to {gpus} or more"
    more = f"run where one node has {gpus}, all left to the run by CUDA_VISIBLE_DEVICES and cluster.num_gpus"
    return f"{fewer}, or {more}"


def _warmup(concurrency: int, shared_prefix: SharedPrefix | None) -> int:
    """Requests before a window: as many as are in flight in it, and every shared prefix in the cache."""
    return max(concurrency, shared_prefix.groups if shared_prefix else 0)


def memory_first(points: Iterable[Point]) -> list[Point]:
    """Return points in their order, memory first: it must be read before anything else was asked of the server."""
    return sorted(points, key=lambda point: point.kind is not PointKind.MEMORY)


def _merged(known: SessionSpec | None, new: SessionSpec) -> SessionSpec:
    """Points of both."""
    if known is None:
        return new
    points = {point.id: point for point in (*known.points, *new.points)}
    return replace(
        known,
        points=tuple(memory_first(points.values())),
        searched_estimate_s=known.searched_estimate_s + new.searched_estimate_s,
    )


def _with_start(session: SessionSpec, start: Start, fleet: Fleet) -> SessionSpec:
    """Return a session whose server starts that way, with how long that is expected to take."""
    warm = forks.planned(start, session.engine, fleet)
    seconds = estimate.start_s(session.engine, fleet.device == "cpu", session.server.enforce_eager, warm)
    return replace(session, start=start, start_estimate_s=seconds)


def _disagreements(known: SessionSpec, new: SessionSpec) -> list[str]:
    """Return how experiments want one server in ways that no id tells apart: one of them would be dropped."""
    wanted = {
        "load.processes": (known.load_processes or "auto", new.load_processes or "auto"),
        "load.request_timeout_s": (known.timeouts.request_s, new.timeouts.request_s),
        "load.prefix_hit_limit": (known.prefix_hit_limit, new.prefix_hit_limit),
    }
    return [_disagreement(key, one, other, new) for key, (one, other) in wanted.items() if one != other]


def _disagreement(key: str, one: object, other: object, session: SessionSpec) -> str:
    return f"{key}: {one} and {other} for one and the same server of {session.model.name}: make two runs of it"


def _company(session: SessionSpec, sessions: Iterable[SessionSpec], fleet: Fleet) -> bool:
    """Whether another session can run on a host while this one does."""
    others = [max(other.gpus, 1) for other in sessions if other.id != session.id]
    largest = max((node.slots for node in fleet.nodes), default=0)
    return bool(others) and max(session.gpus, 1) + min(others) <= largest


def _controls(
    session: SessionSpec, searches: tuple[Search, ...], company: bool
) -> tuple[tuple[Search, ...], Control | None]:
    """Return the anchor of a session whose closed-loop levels take long enough for one, and its control where others
    may be beside it and there is time for both."""
    planned = [point for point in session.points if point.purpose in (Purpose.BATCHING, Purpose.CONCURRENCY)]
    rounds = [search for search in searches if isinstance(search, Rounds)]
    coarse = [search.points_at(level)[0] for search in rounds for level in search.coarse]
    levels = [point for point in (*planned, *coarse) if point.repeat == 0 and point.arrivals is None]
    load_s = session.estimate_s - session.start_estimate_s
    both = company and anchor_of(levels, load_s, ANCHORS_SHARE) is not None
    anchor = anchor_of(levels, load_s)
    if anchor is None:
        return (), None

    def reading(purpose: Purpose, n: int) -> Point:
        return _identified(session.id, replace(anchor, purpose=purpose, repeat=n))

    anchors = Anchors(partial(reading, Purpose.ANCHOR), ANCHORS_SHARE if both else SHARE)
    return (anchors,), Control(partial(reading, Purpose.CONTROL)) if both else None


def _problems(experiment: Experiment, model: ModelSpec) -> list[str]:
    server, load, sweep = experiment.server, experiment.load, experiment.sweep
    limit = kv.model_limit(model.config)
    problems: list[str] = []
    limits: list[tuple[str, int]] = []
    if isinstance(sweep, EnvelopeSweep):
        limits += [("sweep.context_tokens", length) for length in sweep.context_tokens]
        highest = 0 if sweep.concurrency == "auto" else sweep.concurrency[-1]
        if server.max_num_seqs is not None and highest > server.max_num_seqs:
            problems.append(f"sweep.concurrency: {highest} is above server.max_num_seqs, which would be the limit")
    elif not isinstance(sweep, KvSweep):
        limits.append(("server.max_model_len", server.max_model_len))
        prompt, output = lengths.highest(load.prompt_lengths), lengths.highest(load.output_lengths)
        if prompt + output > server.max_model_len:
            longest = f"{prompt} + {output} tokens"
            problems.append(f"load: {longest} of prompt and output do not fit max_model_len {server.max_model_len}")
        problems += _prefix_problems(load.shared_prefix_spec, model.vocab_size)
    if isinstance(sweep, KvSweep | EnvelopeSweep) and server.kv_cache_memory_bytes is not None:
        article = f"an {sweep.kind}" if sweep.kind == "envelope" else f"a {sweep.kind}"
        problems.append(
            f"server.kv_cache_memory_bytes: {article} sweep sizes its pools itself; set sweep.sequences instead"
        )
    if isinstance(sweep, CapacitySweep) and _near_full_prompt(experiment) < 2:
        problems.append(f"server.max_model_len: {server.max_model_len} leaves no room for near-full-context prompts")
    memory = sweep if isinstance(sweep, KvSweep) else sweep.kv if isinstance(sweep, CapacitySweep) else None
    if memory is not None:
        named = {"max_model_len": memory.max_model_len, "utilization_max_model_len": memory.utilization_max_model_len}
        prefix = "sweep" if isinstance(sweep, KvSweep) else "sweep.kv"
        limits += [(f"{prefix}.{key}", length) for key, axis in named.items() for length in axis or ()]
    return problems + [
        f"{key}: {length} is above the limit of {model.name}, {limit} tokens"
        for key, length in limits
        if limit is not None and length > limit
    ]


def _prefix_problems(prefix: SharedPrefix | None, vocab_size: int) -> list[str]:
    if prefix is None or prefix.groups <= PromptFactory(vocab_size, 0).distinct(prefix.tokens):
        return []
    return [f"load.shared_prefix: {prefix.groups} prefixes of {prefix.tokens} tokens cannot all differ"]


def _near_full_prompt(experiment: Experiment) -> int:
    longest_answer = lengths.highest(experiment.load.output_lengths)
    return experiment.server.max_model_len - longest_answer - NEAR_FULL_MARGIN_TOKENS


class _Planner:
    """The sessions of one experiment."""

    def __init__(self, experiment: Experiment, model: ModelSpec, fleet: Fleet) -> None:
        self.experiment, self.model, self.fleet = experiment, model, fleet
        self.on_cpu = fleet.device == "cpu"
        self.searches: dict[str, tuple[Search, ...]] = {}

    def sessions(self) -> list[SessionSpec]:
        sweep = self.experiment.sweep
        match sweep:
            case KvSweep():
                return self._memory(sweep, "kv")
            case BatchingSweep():
                return [self._fixed_server(self._batching(sweep, "batching"))]
            case ConcurrencySweep():
                return [self._fixed_server(self._levels(sweep, "concurrency"))]
            case RateSweep():
                return [self._fixed_server(self._rates(sweep))]
            case KneeSweep():
                return [self._knee(sweep)]
            case SloSweep():
                return [self._slo(sweep)]
            case EnvelopeSweep():
                return [self._envelope(sweep)]
            case CapacitySweep():
                ladder = self._batching(sweep.batching, "capacity") + self._levels(sweep.concurrency, "capacity")
                near_full = self._near_full(sweep.near_full_context)
                return [*self._memory(sweep.kv, "capacity"), self._fixed_server(ladder), near_full]

    # --- memory ---

    def _memory(self, sweep: KvSweep, name: str) -> list[SessionSpec]:
        sessions = []
        if "committed" in sweep.modes:
            servers = [self._committed_server(length) for length in sweep.max_model_len]
            count = sweep.sequences
            if count == "auto":
                count = sizing.sequences(sweep.max_model_len, servers[-1], self.model, self.fleet)
            seats = self.experiment.server.max_num_seqs or count
            for server in servers:
                sized = replace(self._with_pool(server, count), max_num_seqs=seats)
                sessions.append(self._session(sized, Mode.COMMITTED, count, [self._memory_draft(name)]))
        if "utilization" in sweep.modes:
            lengths = sweep.utilization_max_model_len or sweep.max_model_len
            sessions += [
                self._session(
                    self._server(max_model_len=length, kv_cache_memory_bytes=None),
                    Mode.UTILIZATION,
                    None,
                    [self._memory_draft(name)],
                )
                for length in lengths
            ]
        return sessions

    def _committed_server(self, length: int) -> ServerSpec:
        batched, eager = self.experiment.server.max_num_batched_tokens, self.experiment.server.enforce_eager
        return self._server(
            max_model_len=length,
            max_num_batched_tokens=sizing.COMMITTED_BATCHED_TOKENS if batched == "auto" else batched,
            enforce_eager=True if eager == "auto" else eager,
        )

    def _with_pool(self, server: ServerSpec, sequences: int) -> ServerSpec:
        pool = sizing.layout(self.model, server, self.fleet).pool_bytes(sequences, server.max_model_len)
        return replace(server, kv_cache_memory_bytes=pool, gpu_memory_utilization=COMMITTED_UTILIZATION)

    def _memory_draft(self, name: str) -> Point:
        return Point("", PointKind.MEMORY, Purpose.KV_SCALING, name, estimate_s=estimate.memory_point_s(self.on_cpu))

    # --- load ---

    def _fixed_server(self, points: list[Point]) -> SessionSpec:
        config = self.experiment.server
        mode = Mode.UTILIZATION if config.kv_cache_memory_bytes is None else Mode.COMMITTED
        return self._session(self._server(), mode, None, points)

    def _batching(self, sweep: BatchingSweep, name: str) -> list[Point]:
        pair = (1, sweep.comparison_concurrency)
        points = [
            self._load(Purpose.COMPARISON, name, level, repeat, requests=sweep.comparison_requests)
            for repeat in range(sweep.repeats)
            for level in pair
        ]
        return points + [
            self._load(Purpose.BATCHING, name, level, repeat)
            for repeat in range(sweep.repeats)
            for level in sweep.concurrency
        ]

    def _levels(self, sweep: ConcurrencySweep, name: str) -> list[Point]:
        return [
            self._load(Purpose.CONCURRENCY, name, level, repeat)
            for repeat in range(sweep.repeats)
            for level in sweep.concurrency
        ]

    def _rates(self, sweep: RateSweep) -> list[Point]:
        return [self._open(sweep.at(rate), repeat) for repeat in range(sweep.repeats) for rate in sweep.request_rate]

    def _near_full(self, part: NearFullContext) -> SessionSpec:
        """The server as it is configured, or one whose pool holds a stated number of sequences.

        Its prompts are token ids that share nothing, whatever `load` says: it asks how many sequences the pool holds.
        """
        server = self._server()
        default = NEAR_FULL_CPU_SEQUENCES if self.on_cpu else None
        sequences = default if part.sequences == "auto" else part.sequences
        if sequences is not None:
            server = self._with_pool(server, sequences)
        prompt, cache = _near_full_prompt(self.experiment), sizing.layout(self.model, server, self.fleet)
        full = server.max_model_len - NEAR_FULL_MARGIN_TOKENS

        def holds(blocks: int) -> int:
            return sizing.most_at_once(cache, blocks - 1, full, prompt)

        pool = sizing.expected_pool_bytes(self.model, server, self.fleet)
        levels = part.concurrency or sizing.levels_past(holds(cache.num_blocks(pool)))
        points = [
            self._load(Purpose.NEAR_FULL_CONTEXT, "capacity", level, repeat, prompt_tokens=prompt)
            for repeat in range(part.repeats)
            for level in levels
        ]
        mode = Mode.UTILIZATION if server.kv_cache_memory_bytes is None else Mode.COMMITTED
        session = self._session(server, mode, sequences, points)
        if part.concurrency is not None:
            return session
        load = partial(self._load, Purpose.NEAR_FULL_CONTEXT, "capacity", prompt_tokens=prompt)
        return self._searched(session, PastThePool(_repeats(session.id, load, part.repeats), holds, levels[-1]))

    # --- searches ---

    def _searched(self, session: SessionSpec, *searches: Search) -> SessionSpec:
        """Return the session with the first step of its searches among its points."""
        self.searches[session.id] = searches
        first = next_step(searches, {}).measure
        rest_s = sum(search.estimate_s for search in searches) - sum(point.estimate_s for point in first)
        return replace(session, points=(*session.points, *first), searched_estimate_s=max(rest_s, 0.0))

    def _knee(self, sweep: KneeSweep) -> SessionSpec:
        session, levels = self._fixed_server([]), sweep.concurrency
        propose = partial(knee.next_level, lowest=levels.lowest, highest=levels.highest, repeats=sweep.repeats)
        load = partial(self._load, Purpose.CONCURRENCY, "knee")
        search = Rounds(
            _repeats(session.id, load, sweep.repeats),
            "concurrency",
            propose,
            bisection.doublings(levels.lowest, levels.highest),
            knee.matter,
        )
        return self._searched(session, search)

    def _slo(self, sweep: SloSweep) -> SessionSpec:
        """Both axes are searched on one server, the closed loop first."""
        session, objectives = self._fixed_server([]), Slo(**self.experiment.slo.model_dump())
        searches = []
        for axis, levels, load, scale in (
            (
                "concurrency",
                sweep.concurrency,
                partial(self._load, Purpose.CONCURRENCY, "slo"),
                bisection.WHOLE,
            ),
            ("request_rate", sweep.request_rate, partial(self._poisson, sweep), bisection.RATES),
        ):
            if levels is not None:
                ends = (levels.lowest, levels.highest)
                propose = partial(slo.next_level, slo=objectives, lowest=ends[0], highest=ends[1], scale=scale)
                points_at = _repeats(session.id, load, sweep.repeats)
                matter = partial(slo.matter, slo=objectives)
                searches.append(Rounds(points_at, axis, propose, bisection.doublings(*ends), matter))
        return self._searched(session, *searches)

    def _poisson(self, sweep: SloSweep, rate: float, repeat: int) -> Point:
        return replace(self._open(sweep.at(rate), repeat), sweep="slo")

    def _envelope(self, sweep: EnvelopeSweep) -> SessionSpec:
        """One server for all lengths: what a sequence takes of the pool follows from its tokens, not `max_model_len`.

        Each request shares nothing and grows from a prompt to its length. There is no warm-up: what is read of a cell
        is whether it preempts, not how fast it is.
        """
        server = self._with_pool(self._server(max_model_len=sweep.context_tokens[-1]), sweep.sequences)
        layout = sizing.layout(self.model, server, self.fleet)
        pool = layout.num_blocks(server.kv_cache_memory_bytes or 0) - 1
        holds = [sizing.most_at_once(layout, pool, length, sweep.lengths(length)[0]) for length in sweep.context_tokens]
        levels = sizing.levels_around(holds) if sweep.concurrency == "auto" else sweep.concurrency
        seats = server.max_num_seqs or levels[-1]
        session = self._session(replace(server, max_num_seqs=seats), Mode.COMMITTED, sweep.sequences, [])
        cells = [
            Cell(
                _identified(session.id, self._cell(*sweep.lengths(length), level)),
                length,
                layout.blocks_at_once(level, length, sweep.lengths(length)[0]),
                level * layout.blocks_grown(sweep.lengths(length)[0]),
            )
            for length in sweep.context_tokens
            for level in levels
            if level <= seats
        ]
        return self._searched(session, Envelope(tuple(cells), pool))

    def _cell(self, prompt_tokens: int, output_tokens: int, level: int) -> Point:
        asked = {"requests": ENVELOPE_ROUNDS * level, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        return replace(self._load(Purpose.ENVELOPE, "envelope", level, 0, **asked), warmup_requests=0)

    def _load(
        self,
        purpose: Purpose,
        name: str,
        concurrency: int,
        repeat: int,
        requests: int | None = None,
        prompt_tokens: int | None = None,
        output_tokens: int | None = None,
    ) -> Point:
        """A closed loop. One whose number of requests is given ends with them, whatever `load` says; prompts of a
        given length are token ids that share nothing."""
        load = self.experiment.load
        by_number, own_prompts = requests is not None, prompt_tokens is None
        requests = requests or load.requests(concurrency)
        point = Point(
            "", PointKind.LOAD, purpose, name, concurrency, requests, prompt_tokens or load.prompt_lengths,
            output_tokens or load.output_lengths, repeat=repeat, seed=self.experiment.seed,
            api=Api(load.api) if own_prompts else Api.COMPLETIONS,
            shared_prefix=load.shared_prefix_spec if own_prompts else None,
            seconds=None if by_number else load.seconds,
            precision=None if by_number else load.precision_spec,
        )  # fmt: skip
        warmup = _warmup(concurrency, point.shared_prefix) if load.warmup else 0
        return replace(point, warmup_requests=warmup, estimate_s=self._seconds(point, concurrency, requests + warmup))

    def _open(self, arrivals: Arrivals, repeat: int) -> Point:
        load = self.experiment.load
        point = Point(
            "", PointKind.LOAD, Purpose.RATE, "rate", 0, arrivals.requests, load.prompt_lengths, load.output_lengths,
            repeat=repeat, seed=self.experiment.seed, api=Api(load.api), shared_prefix=load.shared_prefix_spec,
            arrivals=arrivals,
        )  # fmt: skip
        warmup = _warmup(math.ceil(arrivals.rate * WARMUP_S), point.shared_prefix)
        estimate_s = arrivals.seconds + self._seconds(point, OPEN_LOOP_GUESS, OPEN_LOOP_GUESS)
        return replace(point, warmup_requests=warmup if load.warmup else 0, estimate_s=estimate_s)

    def _seconds(self, point: Point, concurrency: int, requests: int) -> float:
        prompt, output = lengths.expected(point.prompt_tokens), lengths.expected(point.output_tokens)
        return point.seconds or estimate.load_point_s(self.on_cpu, concurrency, requests, prompt, output)

    # --- servers and ids ---

    def _server(self, **changes: object) -> ServerSpec:
        config = self.experiment.server
        batched, eager, utilization = config.max_num_batched_tokens, config.enforce_eager, config.gpu_memory_utilization
        if utilization == "auto":
            utilization = CPU_UTILIZATION if self.on_cpu else GPU_UTILIZATION
        server = ServerSpec(
            max_model_len=config.max_model_len,
            gpu_memory_utilization=utilization,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
            kv_cache_dtype=config.kv_cache_dtype,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=None if batched == "auto" else batched,
            tensor_parallel_size=config.tensor_parallel_size,
            enforce_eager=self.on_cpu if eager == "auto" else eager,
            enable_prefix_caching=config.enable_prefix_caching,
            dtype=config.dtype,
            quantization=config.quantization,
            transport=config.transport,
            extra_args=config.extra_args,
        )
        return replace(server, **changes)  # type: ignore[arg-type]

    def _session(self, server: ServerSpec, mode: Mode, sequences: int | None, points: list[Point]) -> SessionSpec:
        engine = self.experiment.engine
        identity = [WORKLOAD_VERSION, engine.name, self.fleet.device, self.model, server]
        session_id = content_id(identity)
        return SessionSpec(
            id=session_id,
            model=self.model,
            server=server,
            engine=engine.name,
            device=self.fleet.device,
            mode=mode,
            gpus=0 if self.on_cpu else server.tensor_parallel_size,
            sequences=sequences,
            points=tuple(_identified(session_id, point) for point in points),
            timeouts=Timeouts(
                engine.ready_timeout_s,
                engine.stop_grace_s,
                engine.memory_back_s,
                self.experiment.load.request_timeout_s,
            ),
            load_processes=None if self.experiment.load.processes == "auto" else self.experiment.load.processes,
            prefix_hit_limit=self.experiment.load.prefix_hit_limit,
        )


_NO_NUMBER_HANGS_ON = ("id", "sweep", "estimate_s")
_HASHED = [field.name for field in fields(Point) if field.name not in _NO_NUMBER_HANGS_ON]


def _identified(session_id: str, point: Point) -> Point:
    return replace(point, id=content_id([session_id, *(getattr(point, name) for name in _HASHED)]))


def _repeats(session_id: str, load: Callable[[Any, int], Point], repeats: int) -> Callable[[float], tuple[Point, ...]]:
    """Return what makes the repeats of a level, with the ids that a plan which names the level gives them."""
    return lambda level: tuple(_identified(session_id, load(level, repeat)) for repeat in range(repeats))
