"""What must stand in nothing that is kept: which secrets a process has, and the forms in which texts hold them."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, quote_plus, unquote

SHORTEST_SECRET = 8
"""Characters: a shorter value would blot out ordinary words."""
MASK = "***"
_NAMED = re.compile(
    r"(^(?!VLLM_).*TOKEN|^VLLM_.*TOKEN(?!S|_THRESHOLD))(?!IZERS)|KEY|SECRET|PASSW|CREDENTIAL|(?<!^NO_)PROXY",
    re.IGNORECASE,
)
"""vLLM counts tokens of text in variables of its own, and `no_proxy` holds names of hosts: neither is a secret."""
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
"""USER:PASSWORD@ of a URL, whatever variable or message it stands in."""
_LOGIN = re.compile(r"(?:^|://)(?P<user>[^:/@\s]*):(?P<password>[^/\s]+)@")
"""Of a variable's value; a proxy's may lack the scheme."""


def is_named_secret(name: str) -> bool:
    """Whether a variable is named like a secret."""
    return bool(_NAMED.search(name))


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """Return the secrets of an environment: values of variables that are named like secrets, passwords of URLs, alone
    and as the header `Authorization: Basic` has them, and the token that `hf auth login` has left, which vLLM reads."""
    named = [value for name, value in environment.items() if is_named_secret(name)]
    urls = [value for value in environment.values() if "://" in value]
    logins = [part for value in (*named, *urls) for part in _of_a_login(value)]
    found = dict.fromkeys([*named, *logins, _hub_token(environment)])
    return [value for value in found if len(value.strip()) >= SHORTEST_SECRET]


def hidden(text: str, *secrets: str | None) -> str:
    """Return a text without the given secrets, also as other texts quote them, and without any URL's password."""
    forms = {form for secret in filter(None, secrets) for form in (secret, *_quoted(secret))}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, MASK)
    return without_logins(text)


def without_logins(text: str) -> str:
    """Return a text without the passwords of its URLs."""
    return _CREDENTIALS.sub(f"{MASK}@", text)


def _of_a_login(value: str) -> Iterator[str]:
    for login in _LOGIN.finditer(value):
        yield from (login["password"], unquote(login["password"]))
        sent = unquote(f"{login['user']}:{login['password']}")
        for encoded in (sent.encode(errors="surrogateescape"), sent.encode("latin-1", "replace")):  # clients differ
            yield base64.b64encode(encoded).decode()


def _hub_token(environment: Mapping[str, str]) -> str:
    """Source: huggingface_hub.constants, HF_TOKEN_PATH."""
    caches = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = environment.get("HF_HOME") or f"{caches}/huggingface"
    path = os.path.expandvars(environment.get("HF_TOKEN_PATH") or f"{home}/token")
    try:
        return Path(path).expanduser().read_text(errors="replace").strip()
    except (OSError, RuntimeError, ValueError):  # no file, no home, no path
        return ""


def _quoted(secret: str) -> set[str]:
    """Return how Python, JSON, one inside the other, and URLs write a secret, and what a URL's part means."""
    plain = secret.strip()
    written = {quote(plain, "", errors="surrogateescape"), quote_plus(plain, errors="surrogateescape")}
    said = {plain, unquote(plain), *written}
    once = said | {form for each in said for form in _escaped(each)}
    twice = once | {form for each in once for form in _escaped(each)}
    return {form for form in twice if len(form) >= SHORTEST_SECRET}


def _escaped(text: str) -> Iterator[str]:
    """Give a text as it stands in the middle of a Python or JSON string. repr chooses quotes by the whole string."""
    for quoted in (text, f'{text}"'):
        end = len(text) - len(quoted) - 1
        yield repr(quoted)[1:end]
        yield ascii(quoted)[1:end]
        yield repr(quoted.encode(errors="surrogateescape"))[2:end]
    yield json.dumps(text)[1:-1]
    yield json.dumps(text, ensure_ascii=False)[1:-1]
