"""What another client has sent, for ours to send without a prefix-cache hit. Pure; by `against_vllm_bench.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from workers.load.bodies import Prepared
from workers.load.memory import most_bytes
from workers.load.plan import LoadPlan
from workers.load.stream import Asked

HEAD = 6
"""So many characters of a text give way to a number of so many digits: all within a block of 16 tokens, a byte or more
each."""


@dataclass
class Replay:
    """The other client's bodies, all fields as they were, but that each text begins with a number of its own.

    The number is filled up to the bytes of the characters that give way to it: where a byte is a token (the shapes'
    tokenizer), a text has as many tokens as it had, else a few more.
    """

    bodies: Sequence[dict[str, Any]] = ()
    """Of the turn heard last, in the order of their sends."""
    _numbers: Iterator[int] = field(default_factory=count)
    """Of one server none comes twice."""

    def prepare(self, plan: LoadPlan) -> Iterator[Prepared]:
        """Yield the requests in the order in which they were sent; of `plan` only the ordinals matter.

        Stands in for `workers.load.bodies.prepare`.
        """
        for ordinal, (body, number) in enumerate(zip(self.bodies, self._numbers, strict=False), plan.first_ordinal):
            altered = body | {"prompt": _numbered(body["prompt"], number)}
            asked = Asked(body["max_tokens"], body.get("ignore_eos", False))
            yield Prepared(ordinal, json.dumps(altered).encode(), asked, most_bytes(body["max_tokens"]))


def _numbered(text: str, number: int) -> str:
    size = len(text[:HEAD].encode())
    return f"{number:0{HEAD}}".ljust(size, ".") + text[HEAD:]
