"""What one sequence keeps of the KV pool, group of layers by group of layers, as a function of its length. Pure.

Arithmetic: the layout that the model's config (from the manifest) gives for the server of a row, and only where it
gives the row's own `formula_bytes_per_sequence`. What the engine said stands beside it as `Held`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from analysis.memory.kv_fit import KvResult, is_one_curve, pool_bytes
from analysis.rows.series import Reading, Series
from analysis.rows.tables import RunPoint
from contract.kv import LINEAR_ATTENTION, KVLayout, LayerGroup, model_limit, server_layout
from contract.specs import ServerSpec

Configs = Mapping[str, Mapping[str, Any]]
"""Content of config.json of each session's model, by session id."""


@dataclass(frozen=True, slots=True)
class Pages:
    """The page function of all servers that share a KV layout; bytes are those of all ranks."""

    layout: KVLayout
    ranks: int
    limit: int | None
    """The longest length that vLLM accepts for the model, in tokens."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.ranks * self.layout.bytes_per_block

    def sequence_bytes(self, tokens: int) -> int:
        """Return the bytes of a sequence of `tokens` tokens, in whole blocks."""
        return self.ranks * self.layout.bytes_per_sequence(tokens)

    def growth_bytes(self, tokens: int) -> float:
        """Return what a further token past `tokens` costs a request that only decodes, over one block."""
        block = self.layout.block_size
        return self.block_bytes * (self.layout.blocks_grown(tokens + block) - self.layout.blocks_grown(tokens)) / block

    def at_once_bytes(self, requests: int, tokens: int) -> int:
        """Return the bytes that so many requests hold at once at most, each grown to `tokens` tokens."""
        return self.block_bytes * self.layout.blocks_at_once(requests, tokens)

    def requests(self, size_bytes: float, tokens: int) -> float:
        """Return how many requests `at_once_bytes` lets into a size: its inverse, not rounded."""
        blocks, layout = size_bytes / self.block_bytes, self.layout
        besides = blocks - layout.in_flight_blocks(tokens)
        return max(blocks / layout.blocks_per_sequence(tokens), besides / layout.blocks_grown(tokens))

    def group_bytes(self, group: LayerGroup, tokens: int) -> int:
        """Return those that are for the layers of one group."""
        return self.layout.blocks_of(group, tokens) * self.block_bytes

    @property
    def kinks(self) -> list[int]:
        """Lengths, in tokens, past which a group takes no further block: where a sliding window stops growing.

        Those that the model can be a block past; nearer to its limit nothing bends.
        """
        known = {until for group in self.layout.groups if (until := self.layout.grows_until(group))}
        return sorted(end for end in known if self.limit is None or end + self.layout.block_size <= self.limit)

    @property
    def has_windows(self) -> bool:
        """Whether layers of a sliding window are among them."""
        return any(group.window is not None for group in self.layout.groups)

    @property
    def outgrown(self) -> list[int]:
        """Sliding windows that are shorter than what the model takes, in tokens, ascending."""
        windows = {group.window for group in self.layout.groups if group.window is not None}
        return sorted(window for window in windows if self.limit is None or window < self.limit)

    @property
    def one_rate(self) -> bool:
        """Whether every further token costs the same at any length: all layers keep all tokens."""
        return all(self.layout.grows_until(group) is None for group in self.layout.groups)

    @property
    def has_states(self) -> bool:
        """Whether layers of linear attention have enlarged the blocks."""
        return any(group.kind == LINEAR_ATTENTION for group in self.layout.groups)


@dataclass(frozen=True, slots=True)
class Held:
    """What the engine said of a full-length sequence, beside the page function."""

    reading: Reading
    engine_bytes: float
    """Pool / the engine's KV concurrency."""
    formula_bytes: int

    @property
    def difference(self) -> float:
        """The page function against the engine: the share by which its KV concurrency is off."""
        return self.engine_bytes / self.formula_bytes - 1


@dataclass(frozen=True, slots=True)
class PageFunction:
    """A page function and the readings of the servers that it holds for."""

    name: str
    """Prefix of the names of its figures."""
    pages: Pages
    series: tuple[Series, ...]

    @property
    def readings(self) -> list[Reading]:
        """The measured readings, by length."""
        return sorted((r for series in self.series for r in series.measured), key=lambda r: r.at)

    @property
    def sample(self) -> RunPoint:
        """A point of one of the servers."""
        return self.series[0].sample

    @property
    def held(self) -> list[Held]:
        """The readings whose pool the engine gave exactly enough for a prediction, by length."""
        found = []
        for reading in self.readings:
            pool, concurrency = pool_bytes(reading), reading.median("engine_max_concurrency")
            if pool and concurrency and reading.median("formula_max_concurrency") is not None:
                found.append(Held(reading, pool / concurrency, self.pages.sequence_bytes(int(reading.at))))
        return found

    def memory(self) -> Iterator[tuple[float, float]]:
        """Yield length and bytes of a sequence by memory, for pools sized to the length.

        From the page function at the shortest length on: (memory when ready - memory there) / sequences.
        """
        for series in self.series:
            known = [(r.at, ready) for r in series.measured if (ready := r.median("mem_ready_bytes")) is not None]
            if series.sample.mode == "committed" and series.sample.sequences and known and is_one_curve(series):
                start, lowest = known[0]
                anchor = self.pages.sequence_bytes(int(start))
                yield from ((at, anchor + (ready - lowest) / series.sample.sequences) for at, ready in known)


def pages_of(point: RunPoint, configs: Configs) -> Pages | None:
    """Return the page function of a point's server, or None where config and row do not give the same."""
    config = configs.get(point.session_id)
    if config is None or point.formula_bytes_per_sequence is None:
        return None
    try:
        layout = server_layout(
            config, _server(point), "cpu" if point.device == "cpu" else "cuda", vllm_version=point.vllm_version
        )
        limit = model_limit(config)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):  # a manifest may come from elsewhere
        return None
    pages = Pages(_alike(layout), max(point.gpus, 1), limit)
    return pages if pages.sequence_bytes(point.max_model_len) == point.formula_bytes_per_sequence else None


def page_functions(result: KvResult, configs: Configs) -> list[PageFunction]:
    """Return the page functions of a result's servers: one, unless servers differ in what moves it."""
    found: dict[Pages, list[Series]] = {}
    for series in result.series:
        pages = pages_of(series.sample, configs) if series.measured else None
        if pages is not None:
            found.setdefault(pages, []).append(series)
    return [PageFunction(f"{series[0].name}.pages", pages, tuple(series)) for pages, series in found.items()]


def _server(point: RunPoint) -> ServerSpec:
    return ServerSpec(
        max_model_len=point.max_model_len,
        kv_cache_dtype=point.kv_cache_dtype,
        max_num_batched_tokens=point.max_num_batched_tokens,
        tensor_parallel_size=point.tensor_parallel_size,
        enable_prefix_caching=point.enable_prefix_caching,
        dtype=point.dtype,
        extra_args=json.loads(point.extra_args),
    )


def _alike(layout: KVLayout) -> KVLayout:
    """Without what does not move bytes: the server's own length, and tokens in flight where there is no window."""
    layout = replace(layout, max_model_len=None)
    return layout if any(group.window is not None for group in layout.groups) else replace(layout, in_flight_tokens=0)
