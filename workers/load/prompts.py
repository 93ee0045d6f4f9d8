"""Prompts of a wished length that no other request on the same server shares a prefix with, unless that was asked for.

`workers.load.bodies` puts them into requests. Two prompts with a common first block would be answered from vLLM's
prefix cache and measure that instead: so a request's ordinal comes first, never a common beginning.

Three makers, each with a `json(ordinal, number, tokens)` for the request that is the `number`-th of its level:
`PromptFactory` (token ids, exact), `WordPrompts` (text of about that length) and `GivenText` (whatever length it has).

What is drawn is written as JSON at once, in columns of characters: a list of ids, each of them made and written by
itself, takes ten times as long, and a level's first request waits for the prompts of all its streams.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from contract.specs import SharedPrefix

ORDINALS = 2**32
"""Ordinals below this get different first tokens, if the prompt is long enough to hold the digits."""
PIECE = 8192
"""Tokens or words that are made at a time, in some 0.2 ms: whoever makes prompts in a window looks up in between."""


@dataclass(frozen=True, slots=True)
class PromptFactory:
    """Makes token-id prompts. The same arguments give the same prompts in every process.

    A prompt opens with its ordinal as digits in base `base`, lowest digit first, one token a digit, `digits` tokens in
    all; what follows is drawn from (seed, ordinal), of ids that are all written with the same number of digits
    (`_columns_of`: 10,000 to 29,999 for a vocabulary of 32,000). The ordinal's digits do not depend on the seed, so
    prompts of different seeds on one server differ as well. Two prompts differ within their first `digits` tokens, and
    neighbouring ordinals in the very first: they share no first block of any block size >= `digits` (2 for vocabularies
    of 68 000 ids and more, 5 for one of 256).

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

    def json(self, ordinal: int, number: int, tokens: int) -> Iterator[bytes]:
        """Yield exactly `tokens` token ids as JSON, in pieces: the group's prefix, where there is one, then its own.

        Raises:
            ValueError: there would be less than one id (behind the prefix), or `ordinal` is not in 0 to 2**32 - 1.
        """
        if self.shared is None:
            ids = self._ids(ordinal, tokens)
        else:
            group, prefix = number % self.shared.groups, self.shared.tokens
            ids = itertools.chain(self._ids(_ordinal_of(group), prefix), self._ids(ordinal, tokens - prefix))
        yield b"[" + next(ids)[1:]
        yield from ids
        yield b"]"

    def _ids(self, ordinal: int, length: int) -> Iterator[bytes]:
        """Each id has a comma before it."""
        head = _head(self.base, ordinal, length)
        yield b"".join(b",%d" % (self.lowest_id + digit) for digit in head)
        columns = _columns_of(self.lowest_id, self.base)
        for drawn in _drawn(self.seed, ordinal, length - len(head), len(columns)):
            yield _side_by_side(b",", [drawn[at :: len(columns)].translate(to) for at, to in enumerate(columns)])


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

    def json(self, ordinal: int, number: int, tokens: int) -> Iterator[bytes]:
        """Yield a message that with its template is about `tokens` tokens long, as JSON, in pieces.

        Longer where the words that hold the ordinal alone are: with a template around it, a message that comes again
        would fill blocks of the cache.
        """
        words, least = self.cost.words(tokens - self.cost.overhead_tokens), _digits(len(WORDS))
        if self.shared is None:
            text = self._words(ordinal, max(words, least))
        else:
            prefix = max(self.cost.words(self.shared.tokens), least)
            beginning = self._words(_ordinal_of(number % self.shared.groups), prefix)
            text = itertools.chain(beginning, self._words(ordinal, max(words - prefix, least)))
        yield b'"' + next(text)[1:]
        yield from text
        yield b'"'

    def text(self, ordinal: int, words: int) -> str:
        """Return so many words, the first of which hold the ordinal."""
        return b"".join(self._words(ordinal, words))[1:].decode()

    def _words(self, ordinal: int, count: int) -> Iterator[bytes]:
        """Each word has a space before it."""
        head = _head(len(WORDS), ordinal, count)
        yield "".join(f" {WORDS[digit]}" for digit in head).encode()
        for drawn in _drawn(self.seed, ordinal, count - len(head), 1):
            yield _side_by_side(b" ", [drawn.translate(letters) for letters in _LETTERS])


@dataclass(frozen=True, slots=True)
class GivenText:
    """Puts a short prefix that is unique per (seed, ordinal) before a text of the user's."""

    text: str
    seed: int

    def prompt(self, ordinal: int) -> str:
        """Return the text behind its prefix."""
        return f"[{self.seed:x}-{ordinal}] {self.text}"

    def json(self, ordinal: int, number: int, tokens: int) -> Iterator[bytes]:
        """Yield the text behind its prefix as JSON; only the ordinal matters."""
        yield json.dumps(self.prompt(ordinal)).encode()


WORDS = (  # noqa: SIM905
    "that with have this will your from they know want been good much some time very when come here just like long "
    "make many more only over such take than them well were what work year back call came each even find give hand "
    "high keep last left life live look made most move must name need next part play same seem show tell"
).split()


_LETTERS = [bytes(ord(WORDS[draw % len(WORDS)][at]) for draw in range(256)) for at in range(4)]
"""From a byte drawn to the letter that a word has at each place; 256 is a multiple of 64 words."""


def _head(base: int, ordinal: int, length: int) -> list[int]:
    """The ordinal's digits, lowest first, as many as there is room for."""
    if length < 1:
        raise ValueError(f"a prompt of {length} tokens was asked for")
    if not 0 <= ordinal < ORDINALS:
        raise ValueError(f"ordinal {ordinal} is outside 0..{ORDINALS - 1}")
    left, head = ordinal, []
    for _ in range(min(_digits(base), length)):
        left, digit = divmod(left, base)
        head.append(digit)
    return head


def _drawn(seed: int, ordinal: int, length: int, each: int) -> Iterator[bytes]:
    """What (seed, ordinal) draws: `each` bytes for every one of `length` tokens, some at a time.

    SHAKE128 (FIPS 202) serves as the dice: it needs no state of 2.5 KB to be filled for every prompt.
    """
    for at in range(0, length, PIECE):
        yield hashlib.shake_128(f"{seed}:{ordinal}:{at}".encode()).digest(each * min(PIECE, length - at))


def _side_by_side(before: bytes, columns: Sequence[bytes]) -> bytes:
    """The text whose n-th word is made of the n-th character of every column, with `before` before it."""
    width = 1 + len(columns)
    text = bytearray(before * (width * len(columns[0])))
    for at, column in enumerate(columns, 1):
        text[at::width] = column
    return bytes(text)


@functools.cache
def _columns_of(lowest: int, count: int) -> list[bytes]:
    """How a byte drawn for each place becomes the digit there, so that ids of one width from `lowest` on are drawn.

    Of all widths and first digits whose ids are wholly inside, those with the most ids: at least three in ten of
    `count`. Each digit has 26 or 25 of a byte's 256 values, a first one as nearly the same share.
    """
    best, width = "", 0
    for free in range(len(str(lowest + count))):
        first = [d for d in range(1, 10) if lowest <= d * 10**free and (d + 1) * 10**free <= lowest + count]
        if len(first) * 10**free > len(best) * 10**width:
            best, width = "".join(map(str, first)), free
    return [_spread(best), *[_spread("0123456789")] * width]


def _spread(characters: str) -> bytes:
    return bytes(ord(characters[draw * len(characters) >> 8]) for draw in range(256))


def _digits(base: int) -> int:
    count, reach = 1, base
    while reach < ORDINALS:
        count, reach = count + 1, reach * base
    return count


def _ordinal_of(group: int) -> int:
    """A shared prefix is the prompt of an ordinal that no request comes to: unlike all others for the same reason."""
    return ORDINALS - 1 - group
