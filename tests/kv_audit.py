"""The auditor's own KV arithmetic: layouts and envelopes again, sharing no code with analysis or contract."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Layers:
    """Layers of one kind: how many, bytes of a token (or of a state), and where they stop growing."""

    kind: str
    n: int
    bytes: int
    until: float


class Layout:
    """Blocks of a sequence, for the few models that the tests use."""

    def __init__(self, config: dict[str, Any], row: pd.Series[Any]) -> None:
        self.ranks = max(int(row.gpus), 1)
        cpu, older = row.device == "cpu", isinstance(row.vllm_version, str)  # the synthetic version is an old one
        batched = row.max_num_batched_tokens
        if math.isnan(batched or math.nan):
            batched = 2048 * self.ranks if cpu else 8192
        self.flight = int(batched) * (1 if older or cpu else 2)
        self.window = config.get("sliding_window")
        self.limit = config["max_position_embeddings"]
        n = config["num_hidden_layers"]
        self.block = 128 if cpu else 16
        if config.get("kv_lora_rank"):
            self.block = 16
            self.layers = [Layers("mla", n, 2 * (config["kv_lora_rank"] + config["qk_rope_head_dim"]), math.inf)]
        else:
            head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            token = 2 * max(1, config["num_key_value_heads"] // self.ranks) * head * 2
            every = config.get("full_attention_interval") or config.get("sliding_window_pattern")
            full = [Layers("full", n // every if every else n, token, math.inf)]
            if "linear_num_key_heads" in config:
                state = self.state(config, cpu)
                smallest = max(self.block, 32 if cpu else 16)
                self.block = smallest * math.ceil(state / (smallest * token))
                self.layers = [Layers("linear_attention", n - full[0].n, state, 0), *full]
            elif self.window:
                some = n - full[0].n if every else n
                windowed = Layers("sliding_window", some, token, self.window - 1 + self.flight)
                self.layers = [windowed, *(full if every else [])]
            else:
                self.layers = full
        self.states = 1 if older else 2
        counts = [layers.n for layers in self.layers]
        self.per_block = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
        page = max(layers.bytes for layers in self.layers if layers.kind != "linear_attention")
        self.block_bytes = self.ranks * self.per_block * self.block * page

    def state(self, config: dict[str, Any], cpu: bool) -> int:
        keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        conv = (config["linear_conv_kernel_dim"] - 1) * (2 * keys + values)
        return (2 * conv + (4 if cpu else 2) * values * config["linear_key_head_dim"]) // self.ranks

    def of(self, kind: str) -> Layers:
        return next(layers for layers in self.layers if layers.kind == kind)

    def blocks(self, layers: Layers, tokens: float) -> int:
        pages = {
            "linear_attention": self.states,
            "sliding_window": math.ceil(min(layers.until, tokens) / self.block) + 1,
        }.get(layers.kind, math.ceil(tokens / self.block))
        return math.ceil(layers.n / self.per_block) * pages

    def sequence(self, tokens: float) -> float:
        return float(self.block_bytes * sum(self.blocks(layers, tokens) for layers in self.layers))

    def decoding(self, tokens: int) -> float:
        """Bytes of a request that only decodes: of a window its own tokens, and a block more."""
        most = math.inf if self.window is None else math.ceil(self.window / self.block) + 1
        return float(self.block_bytes * sum(
            math.ceil(layers.n / self.per_block) * min(math.ceil(tokens / self.block), most)
            if layers.kind == "sliding_window" else self.blocks(layers, tokens)
            for layers in self.layers
        ))  # fmt: skip

    def at_once(self, requests: int, tokens: int) -> float:
        """Grown requests hold windows; what is outside of those of the prompts in flight, in order, counts besides."""
        held, outside = 0, 0
        for layers in self.layers:
            tables = math.ceil(layers.n / self.per_block)
            if layers.kind != "sliding_window":
                held += self.blocks(layers, tokens)
                continue
            held += tables * min(math.ceil(tokens / self.block), math.ceil(self.window / self.block) + 1)
            left, more = self.flight + self.window + self.block - 2, 0
            while left > 0:
                more += max(0, min(left, tokens) - self.window)
                left -= tokens
            outside += tables * (more // self.block)
        return min(requests * self.sequence(tokens), self.block_bytes * (requests * held + outside))

    def figure(self, what: str) -> float:
        """A figure of the section that has no length in its name."""
        kind, _, of = what.rpartition(".")
        if kind:
            layers = self.of(kind)
            return float(layers.n if of == "layers" else self.ranks * layers.bytes)
        return float(
            {
                "kink": lambda: self.of("sliding_window").until,
                "block_bytes": lambda: self.block_bytes,
                "block_tokens": lambda: self.block,
                "layers_per_block": lambda: self.per_block,
                "window_tokens": lambda: self.window,
                "window_blocks": lambda: (
                    math.ceil(self.of("sliding_window").n / self.per_block) * (math.ceil(self.window / self.block) + 1)
                ),
                "in_flight_tokens": lambda: self.flight,
                "state_blocks": lambda: self.blocks(self.of("linear_attention"), 1),
                "bytes_per_token": lambda: self.sequence(self.block) / self.block,
                "limit": lambda: self.limit,
            }[what]()
        )

    def at(self, tokens: int, what: str) -> float:
        """A figure of a row of the section's table."""
        if what == "tokens":
            return tokens
        kind, _, unit = what.rpartition("_")
        blocks = [self.blocks(layers, tokens) for layers in self.layers if kind in ("all", layers.kind)]
        return float(sum(blocks) * (1 if unit == "blocks" else self.block_bytes / MIB))


class EnvelopeAudit:
    """One pool, and the levels of load that were measured on it."""

    def __init__(self, points: pd.DataFrame, pool: str | None, config: dict[str, Any] | None) -> None:
        self.ranks = max(int(points.gpus.iloc[0]), 1)
        seen = points[points.status == "measured"]
        self.memory = seen[seen.purpose == "kv_scaling"]
        loads = seen[seen.concurrency.notna() & seen.shared_prefix.isna()]
        taken = self.memory[self.memory["mode"] == "utilization"]
        taken = taken[taken.gpu_memory_utilization == taken.gpu_memory_utilization.max()]
        ordered = (taken if len(taken) else self.memory).sort_values("engine_kv_bytes", kind="stable")
        self.row = ordered.iloc[0 if len(taken) else -1]
        same = pd.Series(True, loads.index)
        for column in ("kv_cache_memory_bytes", "gpu_memory_utilization", "max_num_seqs"):
            value = self.row[column]
            same &= loads[column].isna() if pd.isna(value) else loads[column] == value
        if pool is not None:
            same = (self.ranks * loads.engine_kv_bytes == int(pool)) & ~same
            every = seen[seen.concurrency.notna()]
            self.row = every[self.ranks * every.engine_kv_bytes == int(pool)].iloc[0]
            self.row = loads[same].iloc[0] if same.any() else self.row
        self.size = float(self.ranks * self.row.engine_kv_bytes)
        self.room = self.size * (1 - 1 / self.row.engine_num_blocks)
        self.loads = loads[same]
        self.layout = Layout(config, self.row) if config else None

    @functools.cached_property
    def levels(self) -> list[tuple[int, int, str, pd.DataFrame]]:
        """Tokens, requests at once, outcome and rows of every level."""
        found = []
        for _, workload in self.loads.groupby(["prompt_tokens", "output_tokens", "max_model_len"]):
            prompt = workload.mean_prompt_tokens.fillna(workload.prompt_tokens)
            tokens = round((prompt + workload.mean_completion_tokens.fillna(workload.output_tokens)).mean())
            for concurrency, rows in workload.groupby("concurrency"):
                at_once = int(min(float(str(concurrency)), rows.max_num_seqs.fillna(math.inf).iloc[0]))
                found.append((tokens, at_once, self.outcome(rows, tokens, at_once), rows))
        return found

    def outcome(self, rows: pd.DataFrame, tokens: int, at_once: int) -> str:
        waiting = rows.waiting_capacity_max.max()
        waiting = rows.waiting_max.max() if np.isnan(waiting) else waiting
        usage, running, preemptions = rows.kv_usage_max.max(), rows.running_max.max(), rows.preemptions.max()
        if preemptions > 0:
            return "preempted"
        full = usage >= 0.95 or usage + self.share(rows.iloc[0], tokens) > 1
        if waiting > 0 and full and running < at_once:
            return "waited"
        known = not np.isnan([preemptions, waiting, running, usage if waiting else 0]).any()
        return "quiet" if known else "unknown"

    def share(self, row: pd.Series[Any], tokens: int) -> float:
        """Of the pool, by one of the requests of a level; without a layout from the formula at the server's length."""
        if self.layout is not None:
            requests = int(row.concurrency)
            return self.layout.at_once(requests, tokens) / requests / self.room
        blocks = [math.ceil(length / row.engine_block_size) for length in (tokens, row.max_model_len)]
        more = (blocks[0] - blocks[1]) * row.engine_block_size * row.formula_bytes_per_token
        return float(row.formula_bytes_per_sequence + more) / self.room

    def need(self, tokens: int, at_once: int) -> float:
        return at_once * self.sequence(tokens) if self.layout is None else self.layout.at_once(at_once, tokens)

    def sequence(self, tokens: int) -> float:
        both = pd.concat([self.memory, self.loads]).sort_values("max_model_len", kind="stable")
        known = both.groupby("max_model_len").formula_bytes_per_sequence.first()
        marginal = self.memory.sort_values("max_model_len", kind="stable").formula_bytes_per_token.iloc[-1]
        if tokens < known.index[0]:
            return float(known.iloc[0] * tokens / known.index[0])
        beyond = max(tokens - known.index[-1], 0) * marginal
        return float(np.interp(tokens, known.index, known.to_numpy()) + beyond)

    def cell(self, tokens: int, at_once: int, what: str) -> float:
        need = self.need(tokens, at_once)
        if what in ("gib", "mib"):
            return need / (GIB if what == "gib" else MIB)
        if what == "share_pct":
            return 100 * need / self.room
        rows = pd.concat([rows for t, c, _, rows in self.levels if (t, c) == (tokens, at_once)])
        return float(100 * rows.kv_usage_max.max())

    def value(self, what: str, target: dict[str, int]) -> float | str:
        if what == "utilization":
            return f"{self.row.gpu_memory_utilization:g}"
        told = [level for level in self.levels if level[2] != "unknown"]
        inside, beyond = [], []
        for level in told:
            (inside if self.need(*level[:2]) <= self.room else beyond).append(level)
        need = self.need(target["context_tokens"], target["concurrency"])
        return float(
            {
                "pool_gib": self.size / GIB,
                "pool_mib": self.size / MIB,
                "max_num_seqs": self.row.max_num_seqs,
                "levels": len(self.levels),
                "levels_unknown": len(self.levels) - len(told),
                "levels_inside": len(inside),
                "levels_inside_disturbed": sum(level[2] != "quiet" for level in inside),
                "levels_beyond": len(beyond),
                "levels_beyond_disturbed": sum(level[2] != "quiet" for level in beyond),
                "target_need_gib": need / GIB,
                "target_share_pct": 100 * need / self.room,
                "limit_tokens": self.layout.limit if self.layout else math.nan,
                "longest_tokens": self.longest(target["concurrency"]) if self.layout else math.nan,
            }[what]
        )

    def longest(self, at_once: int) -> int:
        """By trying every block's end from the longest down."""
        assert self.layout is not None
        block = self.layout.block
        ends = [self.layout.limit, *range(self.layout.limit // block * block, 0, -block)]
        return next(end for end in ends if at_once * self.layout.sequence(end) <= 0.9 * self.size)
