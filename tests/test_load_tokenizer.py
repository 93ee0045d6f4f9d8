"""What text costs is asked of the server, and guessed where it does not say."""

from __future__ import annotations

import pytest
from mock_openai import MockOpenAI, serving

from workers.load.endpoint import Endpoint, EndpointError
from workers.load.prompts import ASSUMED_COST, TextCost
from workers.load.tokenizer import count_tokens, text_cost


async def test_the_cost_of_words_and_of_the_template_comes_from_the_server() -> None:
    with serving(MockOpenAI(tokens_of_a_word=5, template_tokens=11)) as server:
        assert await text_cost(Endpoint(server.url, "mock")) == TextCost(5.0, 11.0)
        assert await count_tokens(Endpoint(server.url, "mock"), {"prompt": "one two"}) == 10


async def test_a_server_that_does_not_say_is_guessed_at() -> None:
    with serving(MockOpenAI()) as server:
        assert await count_tokens(Endpoint(server.url, "mock"), {"prompt": "one two"}) is None
        assert await text_cost(Endpoint(server.url, "mock")) == ASSUMED_COST


@pytest.mark.parametrize("count", ["7", True, -1, None, 7.0])
async def test_an_answer_that_is_no_count_says_nothing(count: object, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(*_: object) -> object:
        return {"count": count}

    monkeypatch.setattr("workers.load.tokenizer.ask", answer)
    assert await count_tokens(Endpoint("http://h", "mock"), {"prompt": "one"}) is None
    assert await text_cost(Endpoint("http://h", "mock")) == ASSUMED_COST


async def test_a_server_that_is_gone_is_an_error_not_a_guess() -> None:
    with pytest.raises(EndpointError, match="cannot reach"):
        await text_cost(Endpoint("http://127.0.0.1:9", "mock"))
