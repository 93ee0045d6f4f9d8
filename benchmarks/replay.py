"""What another client has sent, for ours to send without a prefix-cache hit. Pure; by `against_vllm_bench.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.load.bodies import Prepared
from workers.load.memory import most_bytes
from workers.load.plan import LoadPlan
from workers.load.stream import Asked

BEGIN_BYTES = 12
"""Texts that differ within so many bytes differ within their first block of 16 tokens: of a byte at the least each, but
for one that opens every prompt and a space that some tokenizers add."""


class NothingNew(Exception):
    """A text has no rotation that begins as none before it."""


@dataclass
class Replay:
    """The other client's bodies: all fields as they were, each text rotated so that it begins as none has yet.

    A rotation keeps a text's characters; its tokens may be a few more or less where the cut falls into one.
    """

    bodies: Sequence[dict[str, Any]] = ()
    """Of the turn heard last."""
    _begun: set[bytes] = field(default_factory=set)

    def hear(self, bodies: Sequence[dict[str, Any]]) -> None:
        """Take what was sent: no replay begins like any of these."""
        self.bodies = bodies
        self._begun.update(_beginning(body["prompt"]) for body in bodies)

    def prepare(self, plan: LoadPlan) -> Iterator[Prepared]:
        """Return the requests in the order in which they were heard, all made at once; of `plan` only their ordinals.

        Stands in for `workers.load.bodies.prepare`. Raises `NothingNew`.
        """
        texts = [self._rotated(body["prompt"]) for body in self.bodies]
        return iter(
            [
                Prepared(
                    plan.first_ordinal + number,
                    json.dumps(body | {"prompt": text}).encode(),
                    Asked(body["max_tokens"], body.get("ignore_eos", False)),
                    most_bytes(body["max_tokens"]),
                )
                for number, (body, text) in enumerate(zip(self.bodies, texts, strict=True))
            ]
        )

    def _rotated(self, text: str) -> str:
        """The first that is new, from the middle on: near its ends a rotation still reads like the text."""
        for by in range(len(text)):
            at = (len(text) // 2 + by) % len(text)
            rotated = text[at:] + text[:at]
            if _beginning(rotated) not in self._begun:
                self._begun.add(_beginning(rotated))
                return rotated
        raise NothingNew(f"all {len(text)} rotations of a text begin like one that was sent")


def _beginning(text: str) -> bytes:
    return text.encode()[:BEGIN_BYTES]
