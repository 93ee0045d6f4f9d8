"""Model files and the directories made from them: what vLLM is given must be consistent and loadable."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from contract.specs import ModelSpec
from orchestrator.models import resolve_all
from orchestrator.problems import ConfigError
from orchestrator.schema import Experiment
from tests.configs import experiment
from workers.models import (
    INDEX,
    ModelNotFound,
    missing_weights,
    read_commit,
    read_config,
    special_tokens,
    tokenizer_json,
    write_model_dir,
)

MODELS = sorted((Path(__file__).parent.parent / "conf" / "model").glob("*.yaml"))
SHAPES = [path for path in MODELS if path.stem != "hf"]
KEYS = {"name", "kind", "source", "cut", "path", "revision", "config"}
by_name = pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)


def load(path: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def shape(path: Path) -> ModelSpec:
    content = load(path)
    return ModelSpec(name=content["name"], config=content["config"], dummy_weights=True, cut=content["cut"])


# --- the files ---


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_file_has_the_same_keys_each_explained(path: Path) -> None:
    assert set(load(path)) == KEYS
    for line in path.read_text().splitlines():
        if line and not line.startswith((" ", "#")):
            assert " #" in line, f"no comment: {line}"


@by_name
def test_a_shape_is_named_as_its_file_and_says_where_it_is_from(path: Path) -> None:
    content = load(path)
    assert content["name"] == path.stem
    assert content["kind"] == "shape"
    assert content["source"]
    assert content["path"] is None


@by_name
def test_a_config_is_whole_and_its_numbers_are_numbers(path: Path) -> None:
    config = load(path)["config"]
    assert len(config["architectures"]) == 1
    assert config["torch_dtype"] == "bfloat16"
    assert isinstance(config["rms_norm_eps"], float)
    assert isinstance(config["rope_theta"], float)
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert all(0 <= token_id < config["vocab_size"] for token_id in special_tokens(config))


def test_a_cut_model_says_so() -> None:
    content = load(next(path for path in SHAPES if path.stem == "qwen3-next-cut"))
    layers, experts = content["config"]["num_hidden_layers"], content["config"]["num_experts"]
    assert content["cut"] == f"{layers} of 48 layers, {experts} of 512 experts"


def test_real_weights_need_a_name() -> None:
    assert OmegaConf.is_missing(OmegaConf.load(next(path for path in MODELS if path.stem == "hf")), "name")


# --- the directory ---


@by_name
def test_a_shape_becomes_a_directory_that_reads_back(path: Path, tmp_path: Path) -> None:
    model = shape(path)
    directory = write_model_dir(model, tmp_path / "a" / "model")
    assert read_config(str(directory)) == model.config
    assert (
        json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == model.config["eos_token_id"]
    )


@by_name
def test_every_id_below_the_vocabulary_size_can_be_decoded(path: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    model = shape(path)
    tokenizer = Tokenizer.from_file(str(write_model_dir(model, tmp_path) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == model.vocab_size
    step = max(1, model.vocab_size // 1000)
    ids = [*range(0, model.vocab_size, step), model.vocab_size - 1]
    assert all(tokenizer.id_to_token(token_id) is not None for token_id in ids)
    assert tokenizer.decode(ids)


def test_any_text_survives_the_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    directory = write_model_dir(shape(next(path for path in SHAPES if path.stem == "tiny")), tmp_path)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "Grüße, 世界!\n\t\x00 <|eos|>"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("name", ["tiny", "tiny-sliding", "tiny-mla", "tiny-linear", "qwen2.5-1.5b"])
def test_transformers_loads_the_tokenizer_as_vllm_does(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = shape(next(path for path in SHAPES if path.stem == name))
    tokenizer = transformers.AutoTokenizer.from_pretrained(write_model_dir(model, tmp_path), local_files_only=True)
    assert len(tokenizer) == model.vocab_size
    assert tokenizer.eos_token_id in special_tokens(model.config)
    assert tokenizer.decode(tokenizer.encode("hello wörld", add_special_tokens=False)) == "hello wörld"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "user: hi\nassistant: "


def test_a_vocabulary_must_hold_all_bytes() -> None:
    with pytest.raises(ValueError, match="too small"):
        tokenizer_json(256, {1: "<|eos_1|>"})
    with pytest.raises(ValueError, match="too small"):
        tokenizer_json(1000, {1000: "<|eos_1000|>"})


# --- published weights ---


def test_a_directory_without_config_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="cannot be read"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(ModelNotFound, match="cannot be read"):
        read_config(str(tmp_path))


def test_a_cached_model_is_read_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = str(tmp_path / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: found)
    monkeypatch.setattr("urllib.request.build_opener", lambda *_, **__: pytest.fail("the hub was asked"))
    assert read_config("org/name") == {"model_type": "llama"}


def test_an_absent_model_offline_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        read_config("nobody/no-such-model")


@pytest.mark.parametrize("name", ["not a model", "a/b/c"])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFound, match="ORG/NAME"):
        read_config(name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str | None]]]:
    """A hub of our own: its answer is named by the model, and it remembers what it was asked."""
    from huggingface_hub import constants

    asked: list[tuple[str, str | None]] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            name = self.path.split("/")[2]
            if name == "renamed":
                self.send_response(307)
                self.send_header("Location", self.path.replace("renamed", "answers-200"))
                self.end_headers()
                return
            self.send_response(int(name.removeprefix("answers-")))
            self.send_header("X-Repo-Commit", f"commit-of-{self.path.split('/')[4]}")
            self.end_headers()
            self.wfile.write(b'{"model_type": "llama"}')

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield asked
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_once_with_the_token_of_the_environment(
    hub: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    assert read_config("org/answers-200", "v1") == {"model_type": "llama"}
    assert hub == [("/org/answers-200/resolve/v1/config.json", "Bearer from-the-environment")]


def hub_models(*revisions: str | None) -> list[Experiment]:
    """Experiments with a model of the hub."""
    return [experiment("kv", model__name="org/answers-200", model__kind="hf", model__revision=r) for r in revisions]


@pytest.mark.usefixtures("hub")
def test_a_model_of_the_hub_is_pinned_to_its_commit() -> None:
    ((pinned, model),) = resolve_all(hub_models(None))
    assert (model.revision, pinned.model.revision) == ("commit-of-main", "commit-of-main")


def test_two_revisions_of_a_model_are_two_runs(hub: list[tuple[str, str | None]]) -> None:
    assert len(resolve_all(hub_models("v1", "v1"))) == 2
    assert len(hub) == 1  # one model, however many experiments
    with pytest.raises(ConfigError, match="org/answers-200 at commit-of-v1 and commit-of-v2 in one run"):
        resolve_all(hub_models("v1", "v2"))


def test_a_model_in_the_cache_of_the_hub_says_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--org--name" / "snapshots" / "abc" / "config.json"
    cached.parent.mkdir(parents=True)
    cached.write_text("{}")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(cached))
    assert read_commit("org/name") == ({}, "abc")


def test_the_token_goes_along_to_the_new_name_of_a_model(
    hub: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    assert read_config("org/renamed") == {"model_type": "llama"}
    assert [key for _, key in hub] == ["Bearer from-the-environment"] * 2


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (401, "HF_TOKEN; check model.name"),
        (403, "gated: accept its licence"),
        (404, "model.revision"),
        (500, "HTTP 500"),
    ],
)
def test_what_the_hub_says_becomes_advice(hub: list[tuple[str, str | None]], code: int, words: str) -> None:
    with pytest.raises(ModelNotFound, match=words):
        read_config(f"org/answers-{code}")
    assert len(hub) == 1


def test_a_hub_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ModelNotFound, match="check the network"):
        read_config("org/name")


# --- are its weights there? ---


def files_of(directory: Path, *names: str, index: tuple[str, ...] = ()) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", *names):
        (directory / name).write_text("{}")
    if index:
        weight_map = {f"layer{n}": name for n, name in enumerate(index)}
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("names", "index", "said"),
    [
        (("model.safetensors",), (), None),
        (("pytorch_model.bin",), (), None),
        (SHARDS, SHARDS, None),
        (("consolidated.safetensors",), SHARDS, None),
        ((), (), "has no weights"),
        ((), SHARDS, "has no weights"),
        (SHARDS[:1], SHARDS, f"lacks 1 of the 2 files of its {INDEX}, {SHARDS[1]} first"),
    ],
)
def test_a_directory_that_was_copied_in_part_is_told(
    names: tuple[str, ...], index: tuple[str, ...], said: str | None, tmp_path: Path
) -> None:
    found = missing_weights(str(files_of(tmp_path, *names, index=index)))
    assert found is None if said is None else found is not None and said in found


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
def test_an_index_that_cannot_be_read_is_for_vllm_to_judge(content: str, tmp_path: Path) -> None:
    (files_of(tmp_path, "model.safetensors") / INDEX).write_text(content)
    assert missing_weights(str(tmp_path)) is None


@pytest.mark.parametrize("offline", [True, False])
def test_a_cache_with_a_config_alone_is_told_where_the_hub_may_not_be_asked(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = files_of(tmp_path / "snapshots" / "c0ffee")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(snapshot / "config.json"))
    monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    assert (missing_weights("org/name") is not None) is offline
    (snapshot / "model.safetensors").touch()
    assert missing_weights("org/name") is None
