"""The stand-in server's KV pool: the blocks of a request are those of the model's layout, whatever its layers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from contract.kv import server_layout
from contract.specs import Mode, ModelSpec, ServerSpec, SessionSpec, Timeouts
from tests.model_files import published
from workers.engines.base import Address
from workers.engines.sim import SimEngine
from workers.engines.sim_server import Server, parse

LENGTH = 4096
MODELS = ("tiny", "tiny-mla", "tiny-linear", "tiny-sliding", "phi-3-mini-4k", "gemma-3-4b", "qwen3-next-cut")


def session_of(model: str, sequences: int) -> SessionSpec:
    server = ServerSpec(LENGTH, max_num_seqs=64)
    spec = ModelSpec(model, published(model), dummy_weights=True)
    pool = server_layout(spec.config, server, "cuda").pool_bytes(sequences)
    server = ServerSpec(LENGTH, max_num_seqs=64, kv_cache_memory_bytes=pool)
    return SessionSpec("s", spec, server, "sim", "sim", Mode.COMMITTED, 1, sequences, (), Timeouts(20, 2, 2, 10))


def server_of(model: str, sequences: int, directory: Path) -> Server:
    argv = SimEngine().command(session_of(model, sequences), "", Address(uds=str(directory / "s")))
    options = parse(argv[2:])
    options.state = str(directory / "sim.json")
    return Server(options)


@pytest.mark.parametrize("model", MODELS)
def test_a_request_takes_the_blocks_of_all_its_layers(model: str, tmp_path: Path) -> None:
    """Of a model of several kinds of layers each kind has block tables of its own."""
    layout = server_layout(published(model), ServerSpec(LENGTH), "cuda")
    pool = server_of(model, 6, tmp_path).pool
    assert pool.total - 1 == 6 * layout.blocks_per_sequence(LENGTH)
    for tokens in (1, 15, 500, 513, 1025, 2047, 2048, LENGTH):
        assert pool.blocks(tokens) == layout.blocks_grown(tokens)
        assert pool.blocks(tokens) <= pool.blocks(tokens, computing=True) <= layout.blocks_per_sequence(LENGTH)


async def preemptions(server: Server, requests: int) -> float:
    """Let so many requests grow side by side from half their length to all of it; return how often one gave way."""

    async def one() -> None:
        async with server.admitted(LENGTH // 2) as place:
            await server.computed(place, LENGTH // 2)
            for tokens in range(LENGTH // 2, LENGTH + 1, 64):
                await server.grow(place, tokens)
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)

    async with asyncio.timeout(20):
        await asyncio.gather(*(one() for _ in range(requests)))
    (metric,) = server.counted.preemptions.collect()
    return next(sample.value for sample in metric.samples if sample.name.endswith("_total"))


@pytest.mark.parametrize("model", ["tiny", "tiny-linear", "phi-3-mini-4k", "gemma-3-4b"])
def test_requests_preempt_where_their_full_length_takes_more_than_the_pool(model: str, tmp_path: Path) -> None:
    """A pool of 6 sequences: twelve of gemma's were counted as a third of what they hold, and nothing was preempted."""
    layout = server_layout(published(model), ServerSpec(LENGTH), "cuda")
    blocks = server_of(model, 6, tmp_path).pool.total - 1
    fit = blocks // layout.blocks_grown(LENGTH)
    assert asyncio.run(preemptions(server_of(model, 6, tmp_path), fit)) == 0
    assert asyncio.run(preemptions(server_of(model, 6, tmp_path), fit + 1)) > 0


def test_a_request_preempted_while_its_prompt_was_computed_holds_nothing(tmp_path: Path) -> None:
    server = server_of("tiny", 1, tmp_path)

    async def run() -> None:
        async with server.admitted(2000) as older, server.admitted(2000) as younger:
            await server.computed(older, 2000)
            await server.grow(older, LENGTH)
            assert younger not in server.batch
            await server.computed(younger, 2000)
            assert (younger.blocks, server.pool.used) == (0, older.blocks)

    asyncio.run(run())
