"""Prompts of a wished length that no other request on the same server shares a prefix with, unless that was asked for.

`workers.load.client` makes them before its window opens. Two prompts with a common first block would be answered from
vLLM's prefix cache and measure that instead: so a request's ordinal comes first, never a common beginning.

Three makers, each with a `prompt(ordinal, number, tokens)` for the request that is the `number`-th of its level:
`PromptFactory` (token ids, exact), `WordPrompts` (text of about that length) and `GivenText` (whatever length it has).
"""

from __future__ import annotations

import random
import sys
from array import array
from dataclasses import dataclass

from contract.specs import SharedPrefix

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
    shared: SharedPrefix | None = None

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
        return _digits(self.base)

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
        low = self.lowest_id
        return [low + each for each in _numbers(self.base, self.seed, ordinal, length)]

    def prompt(self, ordinal: int, number: int, tokens: int) -> list[int]:
        """Return exactly `tokens` token ids: those of the group's prefix, where there is one, then the request's own.

        Raises:
            ValueError: as `tokens`, also where nothing is left behind the prefix.
        """
        if self.shared is None:
            return self.tokens(ordinal, tokens)
        group, prefix = number % self.shared.groups, self.shared.tokens
        return self.tokens(_ordinal_of(group), prefix) + self.tokens(ordinal, tokens - prefix)


@dataclass(frozen=True, slots=True)
class TextCost:
    """What text costs in tokens on one server, which `workers.load.tokenizer` asks for it."""

    tokens_per_word: float
    """Of `WORDS`, each with the space before it."""
    overhead_tokens: float
    """What the chat template adds to a message."""

    def words(self, tokens: float) -> int:
        """Return how many words come next to `tokens` from below."""
        return max(int(tokens / self.tokens_per_word + 1e-6), 0)


ASSUMED_COST = TextCost(tokens_per_word=1.0, overhead_tokens=0.0)
"""Of a server that does not say: every word a token, and no template."""


@dataclass(frozen=True, slots=True)
class WordPrompts:
    """Makes chat messages of about a wished length, for a load process has no tokenizer: `cost` says what a word takes.

    Built as `PromptFactory` builds prompts, of words instead of token ids: six words hold the ordinal. All are common
    English ones of four letters, which most vocabularies hold whole and a tokenizer of bytes makes five tokens each, so
    that length hardly depends on which ones were drawn. The template may put a common beginning before them.
    """

    seed: int
    cost: TextCost = ASSUMED_COST
    shared: SharedPrefix | None = None

    def prompt(self, ordinal: int, number: int, tokens: int) -> str:
        """Return a message that with its template is about `tokens` tokens long.

        Longer where the words that hold the ordinal alone are: with a template around it, a message that comes again
        would fill blocks of the cache.
        """
        words, least = self.cost.words(tokens - self.cost.overhead_tokens), _digits(len(WORDS))
        if self.shared is None:
            return self.text(ordinal, max(words, least))
        prefix = max(self.cost.words(self.shared.tokens), least)
        beginning = self.text(_ordinal_of(number % self.shared.groups), prefix)
        return f"{beginning} {self.text(ordinal, max(words - prefix, least))}"

    def text(self, ordinal: int, words: int) -> str:
        """Return so many words, the first of which hold the ordinal."""
        return " ".join(WORDS[each] for each in _numbers(len(WORDS), self.seed, ordinal, words))


@dataclass(frozen=True, slots=True)
class GivenText:
    """Puts a short prefix that is unique per (seed, ordinal) before a text of the user's."""

    text: str
    seed: int

    def prompt(self, ordinal: int, number: int, tokens: int) -> str:
        """Return the text behind its prefix; only the ordinal matters."""
        return f"[{self.seed:x}-{ordinal}] {self.text}"


WORDS = (  # noqa: SIM905
    "that with have this will your from they know want been good much some time very when come here just like long "
    "make many more only over such take than them well were what work year back call came each even find give hand "
    "high keep last left life live look made most move must name need next part play same seem show tell"
).split()


def _numbers(base: int, seed: int, ordinal: int, length: int) -> list[int]:
    """`length` numbers below `base`: the ordinal's digits, lowest first, then what (seed, ordinal) draws."""
    if length < 1:
        raise ValueError(f"a prompt of {length} tokens was asked for")
    if not 0 <= ordinal < ORDINALS:
        raise ValueError(f"ordinal {ordinal} is outside 0..{ORDINALS - 1}")
    left, head = ordinal, []
    for _ in range(min(_digits(base), length)):
        left, digit = divmod(left, base)
        head.append(digit)
    drawn = array("I", random.Random(f"{seed}:{ordinal}").randbytes(4 * (length - len(head))))
    if sys.byteorder == "big":
        drawn.byteswap()
    return head + [each * base >> 32 for each in drawn]


def _digits(base: int) -> int:
    count, reach = 1, base
    while reach < ORDINALS:
        count, reach = count + 1, reach * base
    return count


def _ordinal_of(group: int) -> int:
    """A shared prefix is the prompt of an ordinal that no request comes to: unlike all others for the same reason."""
    return ORDINALS - 1 - group
