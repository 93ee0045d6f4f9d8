"""Prompts: exact, reproducible, and never sharing a first block."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.load.prompts import ORDINALS, PromptFactory, text_prompt

vocabularies = st.one_of(st.integers(4, 300), st.sampled_from([256, 32_000, 128_256, 151_936, 262_208]))
ordinals = st.integers(0, ORDINALS - 1)


@given(vocabularies, st.integers(), ordinals, st.integers(1, 300))
def test_prompt_has_the_exact_length_and_only_ordinary_ids(
    vocab_size: int, seed: int, ordinal: int, length: int
) -> None:
    factory = PromptFactory(vocab_size, seed)
    tokens = factory.tokens(ordinal, length)
    margin = factory.lowest_id
    assert len(tokens) == length
    assert 1 <= margin <= min(tokens)
    assert max(tokens) < vocab_size - margin
    assert tokens == PromptFactory(vocab_size, seed).tokens(ordinal, length)


@given(vocabularies, st.integers(), st.integers(), ordinals, ordinals, st.integers(1, 64))
def test_prompts_of_two_ordinals_differ_within_their_digits_whatever_their_seeds(
    vocab_size: int, seed: int, other_seed: int, ordinal: int, other: int, length: int
) -> None:
    first, second = PromptFactory(vocab_size, seed), PromptFactory(vocab_size, other_seed)
    if ordinal == other:
        return
    one, two = first.tokens(ordinal, length), second.tokens(other, length)
    if length >= first.digits or max(ordinal, other) < first.distinct(length):
        assert one[: first.digits] != two[: first.digits]


@given(vocabularies, st.integers(), st.integers(0, ORDINALS - 2), st.integers(1, 40))
def test_neighbouring_ordinals_differ_in_the_first_token(vocab_size: int, seed: int, ordinal: int, length: int) -> None:
    factory = PromptFactory(vocab_size, seed)
    assert factory.tokens(ordinal, length)[0] != factory.tokens(ordinal + 1, length)[0]


@pytest.mark.parametrize(("vocab_size", "length"), [(5, 3), (256, 1), (40, 2)])
def test_short_prompts_are_distinct_for_exactly_as_many_ordinals_as_promised(vocab_size: int, length: int) -> None:
    factory = PromptFactory(vocab_size, 0)
    count = factory.distinct(length)
    prompts = [tuple(factory.tokens(ordinal, length)) for ordinal in range(count)]
    assert len(set(prompts)) == count
    assert tuple(factory.tokens(count, length)) == prompts[0]


def test_seed_and_ordinal_change_what_follows_the_digits() -> None:
    factory = PromptFactory(32_000, 1)
    assert factory.tokens(3, 50)[factory.digits :] != factory.tokens(4, 50)[factory.digits :]
    assert factory.tokens(3, 50)[factory.digits :] != PromptFactory(32_000, 2).tokens(3, 50)[factory.digits :]


def test_another_process_makes_the_same_prompts() -> None:
    code = "from workers.load.prompts import PromptFactory; print(PromptFactory(128256, 9).tokens(12345, 20))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert [run.decode().strip() for run in runs] == [str(PromptFactory(128_256, 9).tokens(12_345, 20))] * 2


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


@pytest.mark.parametrize(("ordinal", "length"), [(-1, 8), (ORDINALS, 8), (0, 0)])
def test_what_cannot_be_made_is_refused(ordinal: int, length: int) -> None:
    with pytest.raises(ValueError, match=r"ordinal|prompt"):
        PromptFactory(256, 0).tokens(ordinal, length)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        PromptFactory(3, 0)


@given(st.text(max_size=20), st.integers(0, 2**32), st.integers(0, 2**32), ordinals, ordinals)
def test_text_prompts_keep_the_text_and_are_unique(text: str, seed: int, other_seed: int, one: int, two: int) -> None:
    prompt = text_prompt(text, seed, one)
    assert prompt.endswith(text)
    assert (prompt == text_prompt(text, other_seed, two)) == ((seed, one) == (other_seed, two))
