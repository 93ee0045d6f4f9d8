"""Prompts: exact, reproducible, and never sharing a first block."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.specs import SharedPrefix
from workers.load import prompts as prompts_module
from workers.load.prompts import ORDINALS, WORDS, GivenText, PromptFactory, TextCost, WordPrompts

vocabularies = st.one_of(st.integers(4, 300), st.sampled_from([256, 32_000, 128_256, 151_936, 262_208]))
ordinals = st.integers(0, ORDINALS - 1)


def made(maker: PromptFactory | WordPrompts | GivenText, ordinal: int, tokens: int, number: int = 0) -> Any:
    """Return the prompt that a server reads."""
    return json.loads(b"".join(maker.json(ordinal, number, tokens)))


@given(vocabularies, st.integers(), ordinals, st.integers(1, 300))
def test_prompt_has_the_exact_length_and_only_ordinary_ids(
    vocab_size: int, seed: int, ordinal: int, length: int
) -> None:
    factory = PromptFactory(vocab_size, seed)
    tokens = made(factory, ordinal, length)
    margin = factory.lowest_id
    assert len(tokens) == length
    assert 1 <= margin <= min(tokens)
    assert max(tokens) < vocab_size - margin
    assert tokens == made(PromptFactory(vocab_size, seed), ordinal, length)


@given(vocabularies, st.integers(), st.integers(), ordinals, ordinals, st.integers(1, 64))
def test_prompts_of_two_ordinals_differ_within_their_digits_whatever_their_seeds(
    vocab_size: int, seed: int, other_seed: int, ordinal: int, other: int, length: int
) -> None:
    first, second = PromptFactory(vocab_size, seed), PromptFactory(vocab_size, other_seed)
    if ordinal == other:
        return
    one, two = made(first, ordinal, length), made(second, other, length)
    if length >= first.digits or max(ordinal, other) < first.distinct(length):
        assert one[: first.digits] != two[: first.digits]


@given(vocabularies, st.integers(), st.integers(0, ORDINALS - 2), st.integers(1, 40))
def test_neighbouring_ordinals_differ_in_the_first_token(vocab_size: int, seed: int, ordinal: int, length: int) -> None:
    factory = PromptFactory(vocab_size, seed)
    assert made(factory, ordinal, length)[0] != made(factory, ordinal + 1, length)[0]


@pytest.mark.parametrize(("vocab_size", "length"), [(5, 3), (256, 1), (40, 2)])
def test_short_prompts_are_distinct_for_exactly_as_many_ordinals_as_promised(vocab_size: int, length: int) -> None:
    factory = PromptFactory(vocab_size, 0)
    count = factory.distinct(length)
    prompts = [tuple(made(factory, ordinal, length)) for ordinal in range(count)]
    assert len(set(prompts)) == count
    assert tuple(made(factory, count, length)) == prompts[0]


def test_seed_and_ordinal_change_what_follows_the_digits() -> None:
    factory = PromptFactory(32_000, 1)
    assert made(factory, 3, 50)[factory.digits :] != made(factory, 4, 50)[factory.digits :]
    assert made(factory, 3, 50)[factory.digits :] != made(PromptFactory(32_000, 2), 3, 50)[factory.digits :]


def test_another_process_makes_the_same_prompts() -> None:
    code = "from workers.load.prompts import PromptFactory; print(*PromptFactory(128256, 9).json(12345, 0, 20))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert [run.decode().strip() for run in runs] == [
        " ".join(map(str, PromptFactory(128_256, 9).json(12_345, 0, 20)))
    ] * 2


def test_special_and_placeholder_ids_of_known_vocabularies_are_left_out() -> None:
    specials = {  # vocabulary: its special ids
        128_256: (0, 128_000, 128_255),  # Llama 3
        151_936: (151_643, 151_655),  # Qwen 2.5, with its image placeholder
        131_072: (0, 999),  # Mistral's Tekken keeps them at the low end
        262_208: (0, 105, 262_144),  # Gemma 3
    }
    for vocab_size, ids in specials.items():
        factory = PromptFactory(vocab_size, 0)
        used = range(factory.lowest_id, factory.lowest_id + factory.base)
        assert not any(each in used for each in ids)


@pytest.mark.parametrize("vocab_size", [4, 256, 32_000, 151_936, 262_208])
def test_what_follows_the_ordinal_is_drawn_evenly_from_three_tenths_of_the_ids_or_more(vocab_size: int) -> None:
    factory = PromptFactory(vocab_size, 1)
    drawn = made(factory, 0, 60_000)[factory.digits :]
    assert len({len(str(each)) for each in drawn}) == 1
    lowest, highest = min(drawn), max(drawn)
    assert highest - lowest + 1 >= 0.3 * factory.base * (1 if len(set(drawn)) < 300 else 0.99)
    tenths = Counter(10 * (each - lowest) // (highest - lowest + 1) for each in drawn)
    assert max(tenths.values()) < 1.25 * min(tenths.values()) or vocab_size == 4


@pytest.mark.parametrize(
    "maker", [PromptFactory(32_000, 7), WordPrompts(7), PromptFactory(256, 7, SharedPrefix(2, 30))]
)
def test_a_long_prompt_is_made_in_pieces(monkeypatch: pytest.MonkeyPatch, maker: PromptFactory | WordPrompts) -> None:
    monkeypatch.setattr(prompts_module, "PIECE", 64)
    pieces = list(maker.json(5, 1, 400))
    prompt = json.loads(b"".join(pieces))
    assert len(prompt.split() if isinstance(prompt, str) else prompt) == 400
    assert max(map(len, pieces)) <= 64 * 6
    assert len(set(pieces)) == len(pieces) > 400 // 64


@pytest.mark.parametrize(("ordinal", "length"), [(-1, 8), (ORDINALS, 8), (0, 0)])
def test_what_cannot_be_made_is_refused(ordinal: int, length: int) -> None:
    with pytest.raises(ValueError, match=r"ordinal|prompt"):
        made(PromptFactory(256, 0), ordinal, length)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        PromptFactory(3, 0)


@given(st.text(max_size=20), st.integers(0, 2**32), st.integers(0, 2**32), ordinals, ordinals)
def test_text_prompts_keep_the_text_and_are_unique(text: str, seed: int, other_seed: int, one: int, two: int) -> None:
    prompt = GivenText(text, seed).prompt(one)
    assert made(GivenText(text, seed), one, 0) == prompt
    assert prompt.endswith(text)
    assert (prompt == GivenText(text, other_seed).prompt(two)) == ((seed, one) == (other_seed, two))


def common(one: Sequence[object], two: Sequence[object]) -> int:
    """Return how much two prompts have in common from their beginning on."""
    return next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


@given(
    st.sampled_from([256, 32_000, 151_936]),
    st.integers(1, 9),
    st.integers(5, 60),
    st.integers(0, 10**6),
    st.lists(st.integers(1, 80), min_size=2, max_size=20),
)
def test_prompts_of_a_group_share_exactly_its_prefix_and_those_of_two_groups_nothing(
    vocab_size: int, groups: int, prefix: int, first_ordinal: int, own: list[int]
) -> None:
    factory = PromptFactory(vocab_size, 3, SharedPrefix(groups, prefix))
    prompts = [made(factory, first_ordinal + at, prefix + tokens, at) for at, tokens in enumerate(own)]
    assert [len(prompt) for prompt in prompts] == [prefix + tokens for tokens in own]
    for at, one in enumerate(prompts):
        for other in range(at):
            shared = common(one, prompts[other])
            if at % groups == other % groups:
                assert shared == prefix  # their own parts differ in the first token
            else:
                assert shared < factory.digits  # so no block of any size from there on is the same


def test_a_shared_prefix_is_no_other_prompts_beginning_and_another_seeds_is_another() -> None:
    factory = PromptFactory(32_000, 3, SharedPrefix(4, 64))
    prefixes = [made(factory, 0, 65, group)[:64] for group in range(4)]
    alone = [made(PromptFactory(32_000, 3), ordinal, 64) for ordinal in range(2000)]
    assert all(common(prefix, prompt) < factory.digits for prefix in prefixes for prompt in alone)
    assert made(factory, 9, 65, 1)[:64] == prefixes[1] == made(factory, 7, 65, 5)[:64]
    assert made(PromptFactory(32_000, 4, SharedPrefix(4, 64)), 9, 65, 1)[:64] != prefixes[1]


def test_nothing_behind_the_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        made(PromptFactory(256, 0, SharedPrefix(2, 8)), 0, 8)


COSTS = st.builds(TextCost, st.floats(0.9, 6), st.floats(0, 60))


@given(st.integers(0, 2**40), ordinals, ordinals, COSTS, st.integers(2, 600))
def test_messages_are_as_long_as_wished_within_a_word_and_unique_from_the_beginning(
    seed: int, one: int, two: int, cost: TextCost, tokens: int
) -> None:
    first, second = (made(WordPrompts(seed, cost), ordinal, tokens).split() for ordinal in (one, two))
    took = len(first) * cost.tokens_per_word + cost.overhead_tokens
    if len(first) > 6:
        assert tokens - cost.tokens_per_word < took <= tokens + 0.01
    assert len(first) == len(second) >= 6
    if one != two:
        assert first[:6] != second[:6]


def test_neighbouring_messages_differ_in_their_first_word_and_follow_from_seed_and_ordinal() -> None:
    prompts = WordPrompts(5)
    assert len({made(prompts, ordinal, 12).split()[0] for ordinal in range(64)}) == 64
    assert made(prompts, 7, 40) == made(WordPrompts(5), 7, 40, 3)
    assert made(prompts, 7, 40) != made(WordPrompts(6), 7, 40)


def test_words_are_all_of_one_length_so_that_a_tokenizer_of_bytes_counts_them_alike() -> None:
    assert len(set(WORDS)) == len(WORDS) == 64
    assert {len(word) for word in WORDS} == {4}


@given(st.integers(1, 7), st.integers(40, 80), st.integers(6, 30), COSTS)
def test_messages_of_a_group_share_its_words_and_those_of_two_groups_do_not(
    groups: int, prefix: int, own: int, cost: TextCost
) -> None:
    tokens = int(cost.overhead_tokens + prefix + (own + 2) * cost.tokens_per_word) + 1
    prompts = WordPrompts(1, cost, SharedPrefix(groups, prefix))
    messages = [made(prompts, 100 + at, tokens, at).split() for at in range(2 * groups)]
    words = int(prefix / cost.tokens_per_word + 1e-6)
    assert {len(message) for message in messages} == {cost.words(tokens - cost.overhead_tokens)}
    for at, message in enumerate(messages[:groups]):
        assert common(message, messages[at + groups]) == words
        assert all(common(message, other) < words for other in messages[:at])
