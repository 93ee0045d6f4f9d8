"""A model as vLLM is given it: a directory made from a shape, or the config.json of published weights.

Called by the session before a server starts and by the plan, to learn a model's sizes. It must never read a token from
anywhere but the environment, nor import a heavy library before it is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from contract.specs import ModelSpec

HUB_TIMEOUT_S = 4.0

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "


class ModelNotFound(Exception):
    """No config.json could be read; the message says what to do."""


def write_model_dir(model: ModelSpec, directory: Path) -> Path:
    """Write a shape's config.json, generation_config.json and a tokenizer; return `directory`, made if need be.

    vLLM serves it with `--load-format dummy` and no hub.
    """
    return _write(_files(model), directory)


def cached_model_dir(model: ModelSpec, root: Path) -> Path:
    """Return a directory below `root` with what `write_model_dir` writes, named after its content; made if need be.

    The path of a model is part of the key of what vLLM compiles for it: another path, and it compiles again.
    """
    files = _files(model)
    directory = root / hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    if all((directory / name).is_file() for name in files):
        return directory
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as made:
        _write(files, Path(made, "model"))
        shutil.rmtree(directory, ignore_errors=True)  # one that something has cleaned up in part
        with contextlib.suppress(OSError):  # another session was faster
            Path(made, "model").rename(directory)
    return directory


def _files(model: ModelSpec) -> dict[str, str]:
    """A shape's files by name."""
    special_keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    text = model.config.get("text_config") or model.config
    special = {key: text[key] for key in special_keys if text.get(key) is not None}
    tokens = special_tokens(text)
    contents = {
        "config.json": model.config,
        "generation_config.json": special,
        "tokenizer.json": tokenizer_json(model.vocab_size, tokens),
        "tokenizer_config.json": _tokenizer_config(special, tokens),
    }
    return {name: json.dumps(content, ensure_ascii=False, separators=(",", ":")) for name, content in contents.items()}


def _write(files: dict[str, str], directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def special_tokens(text: Mapping[str, Any]) -> dict[int, str]:
    """Return the special tokens by id: those the config names for begin, end and padding."""
    tokens: dict[int, str] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = text.get(key)
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None:
                tokens.setdefault(token_id, f"<|{key.removesuffix('_token_id')}_{token_id}|>")
    return tokens


def tokenizer_json(vocab_size: int, special: Mapping[int, str]) -> dict[str, Any]:
    """Return a byte-level BPE tokenizer of exactly `vocab_size` ids, without merges, in the format of `tokenizers`.

    Text becomes one token a byte, so it can always be encoded; every other id is a number with a space before it, so
    whatever a model of random weights emits can be decoded.
    """
    ordinary = vocab_size - len(special)
    if ordinary < 256 or any(not 0 <= token_id < vocab_size for token_id in special):
        raise ValueError(f"vocab_size {vocab_size} is too small for 256 bytes and {len(special)} special tokens")
    letters = iter(_byte_letters())
    # U+0120 is byte-level BPE's letter for a space.
    vocabulary = {
        special.get(token_id) or next(letters, None) or f"\u0120{token_id}": token_id for token_id in range(vocab_size)
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, "content": special[token_id], **flags} for token_id in sorted(special)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def _byte_letters() -> Iterator[str]:
    """Yield the letters that stand for the bytes 0 to 255 in byte-level BPE: printable ones for themselves."""
    shifted = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            yield chr(byte)
        else:
            yield chr(0x100 + shifted)
            shifted += 1


def _tokenizer_config(special: Mapping[str, Any], tokens: Mapping[int, str]) -> dict[str, Any]:
    named = {}
    for key, value in special.items():
        token_id = value[0] if isinstance(value, list) else value
        named[key.removesuffix("_id")] = tokens[token_id]
    # Model-specific tokenizer classes give names that are left out tokens of their own, beyond the vocabulary.
    for key in ("eos_token", "bos_token", "pad_token", "unk_token"):
        named.setdefault(key, named.get("eos_token") or "0")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "fix_mistral_regex": False,
        "chat_template": _CHAT_TEMPLATE,
        **named,
    }


def read_config(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """Return config.json of a model. See `read_commit`."""
    return read_commit(name_or_path, revision)[0]


def read_commit(name_or_path: str, revision: str | None = None) -> tuple[dict[str, Any], str | None]:
    """Return config.json of a directory, or of a model on the Hugging Face hub (from its cache where it can be), and
    the commit of the hub that it is of; None for a directory, or where the hub does not say.

    Args:
        name_or_path: a directory, or ORG/NAME.
        revision: branch, tag or commit of a hub model; None is the hub's default.

    Raises:
        ModelNotFound: there is none to be read.
    """
    directory = Path(name_or_path).expanduser()
    found, commit = (directory / "config.json", None) if directory.is_dir() else _hub_file(name_or_path, revision)
    try:
        config = json.loads(found.read_text(encoding="utf-8") if isinstance(found, Path) else found)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"config.json of {name_or_path} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ModelNotFound(f"config.json of {name_or_path} is not a JSON object")
    return config, commit


WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""Files that hold weights, by what vLLM's loaders look for."""
INDEX = "model.safetensors.index.json"


def missing_weights(name_or_path: str, revision: str | None = None) -> str | None:
    """Return what of a model's weights is not on this host, in words; None where nothing is known to be missing.

    Of a model on the hub it is known only where that may not be asked (HF_HUB_OFFLINE): else a server fetches them.
    """
    directory = Path(name_or_path).expanduser()
    if not directory.is_dir():
        if not _is_offline():
            return None
        config, _ = _hub_file(name_or_path, revision)
        assert isinstance(config, Path)  # else it is not in the cache, which has been said
        directory = config.parent
    there = {file.name for pattern in WEIGHTS for file in directory.glob(pattern)}
    if not there:
        return f"{directory} has no weights ({', '.join(WEIGHTS)})"
    named: set[str] = set()
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):  # vLLM judges an index, not we
        named = set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    # consolidated weights of another loader may lie there without those that the index names
    if lacks := sorted(named - there) if named & there else []:
        return f"{directory} lacks {len(lacks)} of the {len(named)} files of its {INDEX}, {lacks[0]} first"
    return None


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _hub_file(name: str, revision: str | None) -> tuple[Path | str, str | None]:
    """The cached file, or what the hub gives in one request (its own client tries again for half a minute), and its
    commit. The cache has a file of a commit at snapshots/COMMIT/FILE."""
    from huggingface_hub import constants, errors, try_to_load_from_cache

    where = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFound(f"there is no directory {name!r} (and it is no hub name, ORG/NAME)")
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except errors.HFValidationError as error:
        raise ModelNotFound(f"{name!r} is neither a directory nor a hub name of the form ORG/NAME") from error
    if isinstance(cached, str):
        return Path(cached), Path(cached).parent.name
    if _is_offline():
        raise ModelNotFound(f"{where} is not in the local cache: unset HF_HUB_OFFLINE, or download it before")
    return _from_hub(f"{constants.ENDPOINT}/{name}/resolve/{quote(revision or 'main', safe='')}/config.json", where)


_HUB_SAYS = {
    401: "is not there, or private or gated: put a token with access in HF_TOKEN; check model.name",
    403: "is gated: accept its licence on the hub and put a token with access in HF_TOKEN",
    404: "is not on the hub, or has no config.json or no such revision: check model.name and model.revision",
}


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Takes the token along to another path of the hub (a renamed model), never to another host."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        again = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if again is not None and token and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            again.add_unredirected_header("Authorization", token)
        return again


def _from_hub(url: str, where: str) -> tuple[str, str | None]:
    request = urllib.request.Request(url)
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(_SameHost).open(request, timeout=HUB_TIMEOUT_S) as response:
            return str(response.read().decode()), response.headers.get("X-Repo-Commit")
    except urllib.error.HTTPError as error:
        raise ModelNotFound(
            f"{where} {_HUB_SAYS.get(error.code, f'was not given by the hub: HTTP {error.code}')}"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"{where} is not in the local cache and the hub did not answer ({error}): check the network"
        ) from None
