"""What text costs in tokens, asked of the server itself: a load process has no tokenizer.

Called before a window opens, by the session and by the command line. Source: vLLM's `/tokenize`, which takes what a
completion or a chat takes and applies the chat template; other servers may have none.
"""

from __future__ import annotations

from typing import Any

from workers.load.endpoint import Endpoint, EndpointError, ask
from workers.load.prompts import ASSUMED_COST, TextCost, WordPrompts

TIMEOUT_S = 15.0
FEW_WORDS, MANY_WORDS = 16, 80


async def count_tokens(endpoint: Endpoint, content: dict[str, Any]) -> int | None:
    """Return how many tokens the server makes of `content` (a `prompt`, or `messages` with their template).

    None where it does not say: no such endpoint, or another answer than vLLM's.

    Raises:
        EndpointError: not reachable within 15 seconds.
    """
    try:
        answer = await ask(endpoint, endpoint.tokenize_url, TIMEOUT_S, {"model": endpoint.model, **content})
    except EndpointError as error:
        if error.status is None:
            raise
        return None
    count = answer.get("count") if isinstance(answer, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None


async def text_cost(endpoint: Endpoint) -> TextCost:
    """Return what a word and the chat template cost, from two messages of different length; a guess where none says.

    Raises:
        EndpointError: as `count_tokens`.
    """
    texts = WordPrompts(seed=0)
    counts = [
        await count_tokens(endpoint, {"messages": [{"role": "user", "content": texts.text(0, words)}]})
        for words in (FEW_WORDS, MANY_WORDS)
    ]
    few, many = counts
    if few is None or many is None or few >= many:
        return ASSUMED_COST
    each = (many - few) / (MANY_WORDS - FEW_WORDS)
    return TextCost(each, max(few - FEW_WORDS * each, 0.0))
