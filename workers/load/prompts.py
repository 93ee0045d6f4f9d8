"""Prompts of an exact length that no other request on the same server shares a prefix with.

`workers.load.client` makes them before its window opens. Two prompts with a common first block would be answered from
vLLM's prefix cache and measure that instead: so a request's number comes first, never a common beginning.
"""

from __future__ import annotations

import random
import sys
from array import array
from dataclasses import dataclass

ORDINALS = 2**32
"""Ordinals below this get different first tokens, if the prompt is long enough to hold the digits."""


@dataclass(frozen=True, slots=True)
class PromptFactory:
    """Makes token-id prompts. The same arguments give the same prompts in every process.

    A prompt opens with its ordinal as digits in base `base`, lowest digit first, one token a digit, `digits` tokens in
    all; what follows is drawn from (seed, ordinal). The digits do not depend on the seed, so prompts of different seeds
    on one server differ as well. Two prompts differ within their first `digits` tokens, and neighbouring ordinals in
    the very first: they share no first block of any block size >= `digits` (2 for vocabularies of 68 000 ids and more,
    5 for one of 256).

    Ids at both ends of the vocabulary are left out, 1/64 of it on either side (at least 16, at most a quarter): that
    is where tokenizers keep special, reserved and image-placeholder tokens and padded rows.

    Raises:
        ValueError: `vocab_size` is below 4.
    """

    vocab_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size is {self.vocab_size}: prompts need at least 4 token ids")

    @property
    def lowest_id(self) -> int:
        """The lowest token id that is used."""
        return min(max(16, self.vocab_size // 64), self.vocab_size // 4)

    @property
    def base(self) -> int:
        """Number of token ids that are used: `lowest_id` and the following ones."""
        return self.vocab_size - 2 * self.lowest_id

    @property
    def digits(self) -> int:
        """Tokens that hold the ordinal."""
        count, reach = 1, self.base
        while reach < ORDINALS:
            count, reach = count + 1, reach * self.base
        return count

    def distinct(self, length: int) -> int:
        """Return how many consecutive ordinals are sure to give different prompts of `length` tokens.

        2**32 for prompts of at least `digits` tokens. A shorter prompt has room for `base ** length` numbers only and
        then begins anew (harmless where it is shorter than the server's block, which is cached only when full).
        """
        return min(ORDINALS, int(self.base ** min(length, self.digits)))

    def tokens(self, ordinal: int, length: int) -> list[int]:
        """Return the prompt of request `ordinal`: exactly `length` token ids.

        Raises:
            ValueError: `length` is below 1, or `ordinal` is not in 0 to 2**32 - 1.
        """
        if length < 1:
            raise ValueError(f"a prompt of {length} tokens was asked for")
        if not 0 <= ordinal < ORDINALS:
            raise ValueError(f"ordinal {ordinal} is outside 0..{ORDINALS - 1}")
        low, base = self.lowest_id, self.base
        number, head = ordinal, []
        for _ in range(min(self.digits, length)):
            number, digit = divmod(number, base)
            head.append(low + digit)
        words = array("I", random.Random(f"{self.seed}:{ordinal}").randbytes(4 * (length - len(head))))
        if sys.byteorder == "big":
            words.byteswap()
        return head + [low + (word * base >> 32) for word in words]


def text_prompt(text: str, seed: int, ordinal: int) -> str:
    """Return `text` behind a short prefix that is unique per (seed, ordinal), for servers that take no token ids."""
    return f"[{seed:x}-{ordinal}] {text}"
