"""Which points may stand in one table: same model, same kind of card, same server, same workload.

A group's name is its model and what sets it apart from other groups of that model. The first group in sorted order
(simulated last) owns the plain file name, `kv_cache_scaling.csv`; any other adds its slug, `kv_cache_scaling.SLUG.csv`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from analysis.rows.tables import RunPoint

BASE = (
    "simulated",
    "model",
    "model_cut",
    "dummy_weights",
    "engine",
    "device",
    "device_name",
    "vllm_version",
    "gpus",
    "tensor_parallel_size",
    "dtype",
    "kv_cache_dtype",
    "quantization",
)
"""Columns that no table mixes."""
SERVER = ("max_num_seqs", "max_num_batched_tokens", "enforce_eager", "enable_prefix_caching", "extra_args")
COMMITTED = (*BASE, *SERVER, "sequences")
UTILIZATION = (*BASE, *SERVER, "gpu_memory_utilization")
LOAD = (
    *BASE,
    *SERVER,
    "mode",
    "max_model_len",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "api",
    "prompt_tokens",
    "output_tokens",
    "prompt_lengths",
    "output_lengths",
    "shared_prefix",
)

LEARNED = ("device_name", "vllm_version", "max_num_batched_tokens")
"""Columns that a session may learn only by starting: a point whose session never did joins its neighbours."""
SHORT = {
    "max_model_len": "len",
    "gpu_memory_utilization": "util",
    "kv_cache_memory_bytes": "kv",
    "max_num_seqs": "seqs",
    "max_num_batched_tokens": "batched",
    "enforce_eager": "eager",
    "enable_prefix_caching": "prefix-caching",
    "extra_args": "args",
    "tensor_parallel_size": "tp",
    "prompt_tokens": "prompt",
    "output_tokens": "output",
    "sequences": "x",
    "gpus": "gpus",
    "vllm_version": "vllm",
    "simulated": "simulated",
    "dummy_weights": "dummy",
}

Key: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Points that may be compared, and the names they go by."""

    slug: str
    """Letters, digits and hyphens only: safe in a file name."""
    label: str
    """The same for people."""
    points: tuple[RunPoint, ...]
    first: bool

    def file(self, stem: str, suffix: str) -> str:
        """Return the group's file name for a kind of artifact."""
        return f"{stem}{suffix}" if self.first else f"{stem}.{self.slug}{suffix}"


def grouped(points: Sequence[RunPoint], columns: Sequence[str]) -> list[Group]:
    """Return the points in groups that agree in `columns`, sorted by them."""
    by_key: dict[Key, list[RunPoint]] = {}
    for point in sorted(points, key=lambda p: sum(getattr(p, column) is None for column in LEARNED)):
        key = tuple(getattr(point, column) for column in columns)
        by_key.setdefault(key if key in by_key else _known(key, columns, list(by_key)), []).append(point)
    keys = sorted(by_key, key=_order)
    model_at = list(columns).index("model")
    taken: set[str] = set()
    groups: list[Group] = []
    for key in keys:
        model = key[model_at]
        namesakes = [other for other in keys if other[model_at] == model]
        differing = [i for i in range(len(columns)) if len({other[i] for other in namesakes}) > 1]
        traits = [_trait(columns[i], key[i]) for i in differing]
        slug = unique_slug([model, *traits], taken)
        label = ", ".join([model, *filter(None, traits)])
        groups.append(Group(slug, label, tuple(by_key[key]), first=not groups))
    return groups


def _known(key: Key, columns: Sequence[str], keys: list[Key]) -> Key:
    """Return an existing key that `key` may stand for where it holds no learned value, or the key itself."""
    learned = [i for i, column in enumerate(columns) if column in LEARNED and key[i] is None]
    if not learned:
        return key
    for other in keys:
        if all(other[i] == key[i] for i in range(len(key)) if i not in learned):
            return other
    return key


def _order(key: Key) -> tuple[tuple[bool, Any], ...]:
    return tuple((value is None, 0 if value is None else value) for value in key)


def _trait(column: str, value: Any) -> str:
    short = SHORT.get(column, "")
    if isinstance(value, bool):
        return short if value else f"no {short}" if column not in ("simulated", "dummy_weights") else ""
    if value is None:
        return f"{short} default" if short else ""
    return f"{short} {value}".strip()


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:60].strip("-")


def unique_slug(parts: Sequence[str], taken: set[str]) -> str:
    """Return the parts as a slug that is not in `taken`, and put it there."""
    slug = "-".join(filter(None, map(_slug, parts))) or "group"
    candidate, number = slug, 2
    while candidate in taken:
        candidate, number = f"{slug}-{number}", number + 1
    taken.add(candidate)
    return candidate
