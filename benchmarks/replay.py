"""What another client has sent, for ours to send without a prefix-cache hit. Pure; by `against_vllm_bench.py`.

The bodies are made where the turns are counted, and sent by a load process of its own.
"""

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

    def numbered(self) -> list[dict[str, Any]]:
        """Return the bodies of one turn, in the order in which they were sent."""
        return [body | {"prompt": _numbered(body["prompt"], next(self._numbers))} for body in self.bodies]


def prepare(bodies: Sequence[dict[str, Any]], plan: LoadPlan) -> Iterator[Prepared]:
    """Yield requests of these bodies, in the place of `workers.load.bodies.prepare`; of `plan` the ordinals matter."""
    for ordinal, body in enumerate(bodies, plan.first_ordinal):
        asked = Asked(body["max_tokens"], body.get("ignore_eos", False))
        yield Prepared(ordinal, json.dumps(body).encode(), asked, most_bytes(body["max_tokens"]))


def _numbered(text: str, number: int) -> str:
    size = len(text[:HEAD].encode())
    return f"{number:0{HEAD}}".ljust(size, ".") + text[HEAD:]
