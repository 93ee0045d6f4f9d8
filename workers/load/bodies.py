"""The bodies of a plan's requests: the first ones made before the window opens, the others ahead of need within it.

Used by `workers.load.client`. To make all of them beforehand would keep a level's first request waiting for its last
one's prompt, and hold them all in memory.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from contract.lengths import draw
from contract.specs import Api
from workers.load.memory import most_bytes
from workers.load.plan import LoadPlan
from workers.load.prompts import GivenText, PromptFactory, WordPrompts
from workers.load.stream import Asked

SLICE_S, REST_S = 0.0002, 0.002
"""While some are missing, this long they are made, and so long the streams have the loop for themselves again."""
FEWEST_AHEAD = 32


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that only has to be sent."""

    ordinal: int
    body: bytes
    asked: Asked
    most_bytes: int
    """What its answer may take (`workers.load.memory`)."""


class Bodies:
    """The requests of a plan, in the order in which they are sent. Made in a running loop, to be closed by the caller.

    As many as there are streams are ready from the beginning. Whenever half of these are used up, more are made, a
    little at a time; one that is needed and not ready is made at once, which shows in the time its stream stood still.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self._loop = asyncio.get_running_loop()
        self._making = prepare(plan)
        self._ready: deque[Prepared] = deque()
        self._ahead = max(plan.concurrency, FEWEST_AHEAD)
        self._all_made = False
        self._next_slice: asyncio.TimerHandle | None = None
        while len(self._ready) < self._ahead and not self._all_made:
            self._make_piece()

    def __iter__(self) -> Iterator[Prepared]:
        return self

    def __next__(self) -> Prepared:
        while not self._ready and not self._all_made:
            self._make_piece()
        if not self._ready:
            raise StopIteration
        if self._next_slice is None and not self._all_made and len(self._ready) <= self._ahead // 2:
            self._next_slice = self._loop.call_later(REST_S, self._make_slice)
        return self._ready.popleft()

    def close(self) -> None:
        """Make no more."""
        self._all_made = True
        if self._next_slice is not None:
            self._next_slice.cancel()

    def _make_slice(self) -> None:
        until_s = time.monotonic() + SLICE_S
        self._next_slice = None
        while len(self._ready) < self._ahead and not self._all_made:
            if time.monotonic() >= until_s:
                self._next_slice = self._loop.call_later(REST_S, self._make_slice)
                return
            self._make_piece()

    def _make_piece(self) -> None:
        try:
            made = next(self._making)
        except StopIteration:
            self._all_made = True
        else:
            if made is not None:
                self._ready.append(made)


def prepare(plan: LoadPlan) -> Iterator[Prepared | None]:
    """Yield the plan's requests in the order in which they are sent; None wherever a piece of one has been made."""
    fields: dict[str, Any] = {
        "model": plan.endpoint.model,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if plan.ignore_eos:
        fields["ignore_eos"] = True
    start = json.dumps(fields, separators=(",", ":")).encode()[:-1]
    ask = (b'"messages":[{"role":"user","content":', b"}]") if plan.api is Api.CHAT else (b'"prompt":', b"")
    prompts = _prompts(plan)
    exact = isinstance(prompts, PromptFactory)
    for number in plan.numbers or range(plan.num_requests):
        ordinal = plan.first_ordinal + number
        prompt_tokens = draw(plan.prompt_tokens, "prompt", plan.seed, number)
        max_tokens = draw(plan.output_tokens, "output", plan.seed, number)
        pieces = [b'%b,"max_tokens":%d,%b' % (start, max_tokens, ask[0])]
        for piece in prompts.json(ordinal, number, prompt_tokens):
            pieces.append(piece)
            yield None
        body = b"".join([*pieces, ask[1], b"}"])
        asked = Asked(max_tokens, plan.ignore_eos, prompt_tokens if exact else None)
        yield Prepared(ordinal, body, asked, most_bytes(max_tokens))


def _prompts(plan: LoadPlan) -> PromptFactory | WordPrompts | GivenText:
    if plan.text is not None:
        return GivenText(plan.text, plan.seed)
    if plan.api is Api.CHAT:
        return WordPrompts(plan.seed, plan.text_cost, plan.shared_prefix)
    return PromptFactory(plan.vocab_size, plan.seed, plan.shared_prefix)
