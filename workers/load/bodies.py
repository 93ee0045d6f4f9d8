"""The bodies of a plan's requests, made before the window opens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from contract.lengths import draw
from contract.specs import Api
from workers.load.plan import LoadPlan
from workers.load.prompts import GivenText, PromptFactory, WordPrompts
from workers.load.stream import Asked


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that only has to be sent."""

    ordinal: int
    body: bytes
    asked: Asked


def prepare(plan: LoadPlan) -> Iterator[Prepared]:
    """Yield the plan's requests in the order in which they are sent."""
    fields: dict[str, Any] = {
        "model": plan.endpoint.model,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if plan.ignore_eos:
        fields["ignore_eos"] = True
    prompts = _prompts(plan)
    for index in range(plan.num_requests):
        ordinal, number = plan.first_ordinal + index, plan.offset + index
        prompt_tokens = draw(plan.prompt_tokens, "prompt", plan.seed, number)
        max_tokens = draw(plan.output_tokens, "output", plan.seed, number)
        prompt = prompts.prompt(ordinal, number, prompt_tokens)
        what = {"messages": [{"role": "user", "content": prompt}]} if plan.api is Api.CHAT else {"prompt": prompt}
        body = json.dumps(fields | {"max_tokens": max_tokens} | what, separators=(",", ":")).encode()
        exact = isinstance(prompts, PromptFactory)
        yield Prepared(ordinal, body, Asked(max_tokens, plan.ignore_eos, prompt_tokens if exact else None))


def _prompts(plan: LoadPlan) -> PromptFactory | WordPrompts | GivenText:
    if plan.text is not None:
        return GivenText(plan.text, plan.seed)
    if plan.api is Api.CHAT:
        return WordPrompts(plan.seed, plan.text_cost, plan.shared_prefix)
    return PromptFactory(plan.vocab_size, plan.seed, plan.shared_prefix)
