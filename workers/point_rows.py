"""Filling a point's row: where it was measured, what was seen in its window. Pure.

Used by `workers.session` and `workers.measuring`.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from contract import lengths
from contract.arrivals import ArrivalProcess, Arrivals
from contract.rows import MEASURED, SCHEMA_VERSION, PointRow, SessionRow, TelemetryRow
from contract.specs import Point, PointKind, SessionSpec, canonical_json
from workers.devices.base import Card
from workers.devices.nvml import throttle_reasons
from workers.kv_figures import KvFigures
from workers.load.keeping_up import KeepingUp, keeping_up
from workers.load.limits import connecting_s, send_delay_s
from workers.load.plan import LoadPlan, LoadResult
from workers.load.stalls import Raised
from workers.load.steady import Steady, steady
from workers.load.summary import LoadSummary, mean, summarize
from workers.sampler import Observed


@dataclass(frozen=True, slots=True)
class Origin:
    """What all points of a session share."""

    spec: SessionSpec
    session: SessionRow
    card: Card | None
    kv: KvFigures
    max_num_batched_tokens: int | None
    """As the engine's log says, for servers whose spec leaves it to vLLM."""


def blank(origin: Origin, point: Point, started_wall_s: float) -> PointRow:
    """Return a row that says which point it is and under which configuration it was measured, and nothing else."""
    spec, session, server, card = origin.spec, origin.session, origin.spec.server, origin.card
    load = point.kind is PointKind.LOAD
    return PointRow(
        schema_version=SCHEMA_VERSION,
        run_id=session.run_id,
        session_id=spec.id,
        point_id=point.id,
        sweep=point.sweep,
        kind=point.kind,
        purpose=point.purpose,
        attempt=session.attempt,
        status=MEASURED,
        simulated=session.simulated,
        started_at=utc(started_wall_s),
        model=spec.model.name,
        dummy_weights=spec.model.dummy_weights,
        moe=spec.model.is_moe,
        model_cut=spec.model.cut,
        engine=spec.engine,
        device=spec.device,
        device_name=card.name if card else None,
        device_memory_bytes=card.memory_bytes if card else None,
        power_limit_w=card.power_limit_w * len(session.device_ids) if card and card.power_limit_w else None,
        device_ids=session.device_ids,
        visible_devices=session.visible_devices,
        gpus=spec.gpus,
        mode=spec.mode,
        max_model_len=server.max_model_len,
        gpu_memory_utilization=server.gpu_memory_utilization,
        kv_cache_memory_bytes=server.kv_cache_memory_bytes,
        kv_cache_dtype=server.kv_cache_dtype,
        max_num_seqs=server.max_num_seqs,
        max_num_batched_tokens=server.max_num_batched_tokens or origin.max_num_batched_tokens,
        tensor_parallel_size=server.tensor_parallel_size,
        enforce_eager=server.enforce_eager,
        enable_prefix_caching=server.enable_prefix_caching,
        dtype=server.dtype,
        quantization=server.quantization,
        extra_args=canonical_json(server.extra_args),
        sequences=spec.sequences,
        vllm_version=session.vllm_version,
        start=session.start,
        mem_baseline_bytes=session.mem_baseline_bytes,
        concurrency=point.concurrency if load and not point.arrivals else None,
        arrivals=str(point.arrivals) if point.arrivals else None,
        request_rate=point.arrivals.rate if point.arrivals else None,
        num_requests=point.num_requests if load else None,
        prompt_tokens=round(lengths.expected(point.prompt_tokens)) if load else None,
        output_tokens=round(lengths.expected(point.output_tokens)) if load else None,
        prompt_lengths=lengths.words(point.prompt_tokens),
        output_lengths=lengths.words(point.output_tokens),
        api=point.api if load else None,
        shared_prefix=str(point.shared_prefix) if point.shared_prefix else None,
        repeat=point.repeat if load else None,
        seed=point.seed if load else None,
        **dataclasses.asdict(origin.kv),
    )


def fill_window(row: PointRow, observed: Observed, started_s: float, duration_s: float) -> None:
    """Put the samples inside a window (its start on the monotonic clock) into `row`, and their means.

    Power and energy are summed over the cards.
    """
    row.telemetry = observed.window(started_s, duration_s)
    row.cpu_util_pct = observed.cpu_util_pct(started_s, duration_s)
    row.gpu_util_pct = mean([s.utilization_pct for s in row.telemetry if s.utilization_pct is not None])
    row.power_w = power_w(row.telemetry, row.device_ids)
    row.energy_j = energy_j(row.telemetry, row.device_ids, duration_s)
    told = [s.clock_event_reasons for s in row.telemetry if s.clock_event_reasons is not None]
    row.throttle_reasons = sorted({reason for bits in told for reason in throttle_reasons(bits)}) if told else None
    row.mem_tree_bytes = observed.tree_memory_bytes()
    row.telemetry_hz = observed.telemetry_hz(started_s, duration_s)
    row.sampling_cpu_share = observed.cpu_share(started_s, duration_s)


def fill_load(row: PointRow, point: Point, plan: LoadPlan, result: LoadResult) -> None:
    """Put what the clients saw of a level into `row`."""
    concurrency = None if point.arrivals else point.concurrency
    figures: list[LoadSummary | Steady | KeepingUp | Raised | None] = [
        summarize(result.requests, result.duration_s),
        result.raised,
        steady(result.requests, concurrency),
        keeping_up(result.requests) if point.arrivals else None,
    ]
    for part in figures:
        for name, value in dataclasses.asdict(part).items() if part else ():
            setattr(row, name, value)
    row.num_requests = len(result.requests)
    row.stopped_by = result.stopped_by
    row.clients = result.clients
    row.client_wait_share = max((c.wait_share for c in result.clients if c.wait_share is not None), default=None)
    row.client_lag_s = max((c.lag_p99_s for c in result.clients if c.lag_p99_s is not None), default=None)
    if point.arrivals:
        row.offered_qps = offered_qps(point.arrivals, plan.due_s)
        row.p99_send_delay_s = send_delay_s(result.requests)
        row.p99_connect_s = connecting_s(result.requests)


def offered_qps(arrivals: Arrivals, due_s: Sequence[float]) -> float | None:
    """Return how many requests a second were due until the last was; None where that is no time.

    Each of them ends a gap, but the first of constant arrivals, which is due at once.
    """
    gaps = len(due_s) - (arrivals.process is ArrivalProcess.CONSTANT)
    return gaps / due_s[-1] if due_s[-1] > 0 else None


def power_w(telemetry: list[TelemetryRow], device_ids: list[str]) -> float | None:
    """Return the mean watts of all cards over a window; None where one of them tells none."""
    total = 0.0
    for device in device_ids:
        watts = mean([s.power_w for s in telemetry if s.device_id == device and s.power_w is not None])
        if watts is None:
            return None
        total += watts
    return total if device_ids else None


def energy_j(telemetry: list[TelemetryRow], device_ids: list[str], duration_s: float) -> float | None:
    """Return the joules of all cards over a window: each counter's mean rate between its first and last step inside.

    A counter moves about ten times a second, so a window in which one of them did not move twice has no figure; nor has
    one in which a counter fell, as it does when a driver is loaded anew.
    """
    total = 0.0
    for device in device_ids:
        read = [(s.t_s, s.energy_j) for s in telemetry if s.device_id == device and s.energy_j is not None]
        steps = [later for earlier, later in pairwise(read) if later[1] != earlier[1]]
        fell = any(later[1] < earlier[1] for earlier, later in pairwise(read))
        if fell or len(steps) < 2:
            return None
        total += (steps[-1][1] - steps[0][1]) / (steps[-1][0] - steps[0][0]) * duration_s
    return total if device_ids else None


def utc(wall_s: float) -> str:
    """Return a moment (seconds since the epoch) as UTC in ISO 8601."""
    return datetime.datetime.fromtimestamp(wall_s, datetime.UTC).isoformat(timespec="milliseconds")
