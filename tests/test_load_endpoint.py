"""Endpoints: what people paste as a URL, keys that stay secret, proxies, and the list of models."""

from __future__ import annotations

import asyncio

import pytest
from mock_openai import MockOpenAI, serving

from contract.specs import Api
from workers.load.endpoint import KEEPALIVE_S, Endpoint, EndpointError, open_session, served_models


@pytest.mark.parametrize(
    "tail", ["", "/", "/v1", "/v1/", "/v1/completions", "/v1/completions/", "/v1/chat/completions"]
)
def test_a_base_url_may_be_pasted_in_any_form(tail: str) -> None:
    endpoint = Endpoint(f"https://host:8443/serve{tail}", "m")
    assert endpoint.load_url(Api.COMPLETIONS) == "https://host:8443/serve/v1/completions"
    assert endpoint.load_url(Api.CHAT) == "https://host:8443/serve/v1/chat/completions"
    assert endpoint.tokenize_url == "https://host:8443/serve/tokenize"
    assert endpoint.models_url == "https://host:8443/serve/v1/models"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:8000",
        "ftp://host",
        "http://",
        "http://h:port",
        "http://h:70000",
        "http://h?a=1",
        "http://a b",
        "http://[::1",
    ],
)
def test_what_is_no_server_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        Endpoint(url, "m")


def test_credentials_never_show() -> None:
    assert "s3cret" not in repr(Endpoint("http://h", "m", api_key="s3cret"))
    with pytest.raises(ValueError, match="user name") as caught:
        Endpoint("http://user:s3cret@h", "m")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "a\nb", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="API key"):
        Endpoint("http://h", "m", api_key=key)


def test_the_proxy_is_for_others_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "internal.example")
    assert Endpoint("http://far.example", "m").proxy() == "http://proxy:3128"
    for near in ("http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000", "http://internal.example"):
        assert Endpoint(near, "m").proxy() is None
    assert Endpoint("http://far.example", "m", uds="/run/s").proxy() is None


@pytest.mark.parametrize("proxy", ["127.0.0.1:3128", "socks5://127.0.0.1:1080", "http://"])
async def test_what_is_no_http_proxy_is_named_as_such(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(EndpointError) as caught:
        await served_models(Endpoint("http://far.example", ""), 5)
    assert str(caught.value) == f"the proxy {proxy} (from http_proxy) is no http:// URL"


async def test_a_proxy_that_is_not_there_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:s3cret@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(EndpointError, match=r"v1/models through the proxy http://127\.0\.0\.1:9: ") as caught:
        await served_models(Endpoint("http://far.example", ""), 5)
    assert "s3cret" not in str(caught.value)
    assert "ssl:" not in str(caught.value)


async def test_models_are_listed_in_the_servers_order() -> None:
    with serving(MockOpenAI(models=("b", "a"))) as server:
        assert list((await served_models(Endpoint(server.url, ""), 5)).items()) == [("b", None), ("a", None)]
    with serving(MockOpenAI(max_model_len=4096)) as server:
        assert await served_models(Endpoint(server.url, ""), 5) == {"mock": 4096}


@pytest.mark.parametrize("body", ["<html>hello</html>", "{}", '{"data": []}', '{"data": [{"id": 3}]}', "[]", '"data"'])
async def test_something_else_behind_the_url_is_named(body: str) -> None:
    with serving(MockOpenAI(models_body=body)) as server:
        with pytest.raises(EndpointError, match="no list of models") as caught:
            await served_models(Endpoint(server.url, ""), 5)
        assert "\n" not in str(caught.value)


async def test_the_key_is_sent_and_a_wrong_one_is_named() -> None:
    with serving(MockOpenAI(api_key="right")) as server:
        assert await served_models(Endpoint(server.url, "", api_key="right"), 5) == {"mock": None}
        with pytest.raises(EndpointError, match="API key") as caught:
            await served_models(Endpoint(server.url, "", api_key="wrong"), 5)
        assert caught.value.status == 401


async def test_nobody_there_is_an_endpoint_error() -> None:
    with pytest.raises(EndpointError, match="cannot reach"):
        await served_models(Endpoint("http://127.0.0.1:9", ""), 5)
    with pytest.raises(EndpointError, match="cannot reach"):
        await served_models(Endpoint("http://localhost", "", uds="/nonexistent/socket"), 5)


async def test_an_idle_connection_is_given_up_before_the_server_does() -> None:
    assert KEEPALIVE_S < 5  # uvicorn's
    with serving(MockOpenAI(keepalive_s=0.05)) as server:
        endpoint = Endpoint(server.url, "mock")
        body = {"prompt": [1], "max_tokens": 1}
        async with open_session(endpoint) as session:
            for _ in range(3):
                async with session.post(endpoint.load_url(Api.COMPLETIONS), json=body) as response:
                    assert response.status == 200
                    await response.read()
                await asyncio.sleep(0.2)
        assert len(server.bodies) == 3
