"""A load level as its server saw it: gauges in the window, counters and histograms between the scrapes around it.

Used by `workers.measuring`. Pure. Nothing but the level is sent between its two scrapes, so what the server gained
between them is the window's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from contract.failures import FailureClass
from contract.lengths import expected
from contract.rows import Failure, PointRow, RequestRow, ServerSample
from contract.specs import Api
from workers.histogram import gained
from workers.load.plan import LoadPlan
from workers.load.prompts import ASSUMED_COST
from workers.metrics import ServerMetrics

_Value = TypeVar("_Value", int, float)


def fill(
    row: PointRow,
    before: ServerMetrics,
    after: ServerMetrics,
    samples: list[ServerSample],
    requests: Sequence[RequestRow],
) -> None:
    """Put a level's server side into `row`: two scrapes at rest, the samples in the window, the client's requests."""
    queries, hits = _grown(before.prefix_queries, after.prefix_queries), _grown(before.prefix_hits, after.prefix_hits)
    row.prefix_hit_ratio = hits / queries if queries and hits is not None else (0.0 if hits == 0 else None)
    row.preemptions = _grown(before.preemptions, after.preemptions)
    row.server_generation_tokens = _grown(before.generation_tokens, after.generation_tokens)
    row.token_count_difference = token_count_difference(row.server_generation_tokens, requests)
    row.server_samples = samples
    row.kv_usage_max = _highest([sample.kv_usage for sample in samples])
    row.running_max = _highest([sample.running for sample in samples])
    row.waiting_max = _highest([sample.waiting for sample in samples])
    row.waiting_capacity_max = _highest([sample.waiting_capacity for sample in samples])
    row.waiting_deferred_max = _highest([sample.waiting_deferred for sample in samples])
    steps = gained(before.step_tokens, after.step_tokens)
    row.server_steps = None if after.step_tokens is None else steps.count
    row.server_step_mean_tokens = steps.mean
    queue, prefill = gained(before.queue_s, after.queue_s), gained(before.prefill_s, after.prefill_s)
    decode, ttft = gained(before.decode_s, after.decode_s), gained(before.ttft_s, after.ttft_s)
    row.server_queue_mean_s, row.server_queue_p95_le_s = queue.mean, queue.percentile_le(95)
    row.server_prefill_mean_s, row.server_prefill_p95_le_s = prefill.mean, prefill.percentile_le(95)
    row.server_decode_mean_s, row.server_decode_p95_le_s = decode.mean, decode.percentile_le(95)
    row.server_ttft_mean_s, row.server_ttft_p95_le_s = ttft.mean, ttft.percentile_le(95)


def token_count_difference(generated: int | None, requests: Sequence[RequestRow]) -> int | None:
    """Return the server's count of generated tokens less the client's; None where the server has none.

    The client's is the sum of `usage.completion_tokens`, of failed requests, too, where it came.
    """
    if generated is None:
        return None
    return generated - sum(request.completion_tokens or 0 for request in requests)


def shared_ratio(plan: LoadPlan, mean_prompt_tokens: float | None) -> float:
    """Return the share of a load's prompt tokens that are meant to be common: shared prefixes, a chat's template.

    The cache holds whole blocks, so hits come to no more. `mean_prompt_tokens` is by `usage`, None where it did not
    come. Of a template that the server did not count for us, it is what came on top of the words.
    """
    asked = expected(plan.prompt_tokens)
    mean = mean_prompt_tokens or asked
    template = 0.0
    if plan.api is Api.CHAT:
        template = max(mean - asked, 0.0) if plan.text_cost is ASSUMED_COST else plan.text_cost.overhead_tokens
    prefix = plan.shared_prefix.tokens if plan.shared_prefix else 0
    return min((template + prefix) / mean, 1.0)


def prefix_hit_failure(row: PointRow, limit: float) -> Failure | None:
    """Return why a level is no measurement of the engine: of its prompt tokens more than `limit` (0 to 1) beyond those
    that were meant to be shared were cached."""
    ratio, shared = row.prefix_hit_ratio, row.prefix_shared_ratio or 0.0
    if ratio is None or ratio <= shared + limit:
        return None
    meant = f", of which {shared:.2%} were shared on purpose" if shared else ""
    return Failure(
        FailureClass.PREFIX_HITS,
        f"{ratio:.2%} of the prompt tokens were in the prefix cache{meant} (limit: {limit:.2%}): the level measured "
        "the cache and not the engine. Set server.enable_prefix_caching=false, or raise load.prefix_hit_limit if this "
        "is meant",
    )


def _grown(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _highest(values: list[_Value | None]) -> _Value | None:
    return max((value for value in values if value is not None), default=None)
