"""Bad configurations: every problem at once, in the user's own words."""

import pytest

from orchestrator.problems import ConfigError
from orchestrator.schema import KvSweep, is_secret, validate
from tests.configs import raw


def problems(**changes: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(raw(**changes), ["batching", "kv"])  # type: ignore[arg-type]
    return caught.value.problems


def test_the_shipped_configuration_is_valid() -> None:
    assert isinstance(validate(raw(), []).sweep, KvSweep)


def test_every_problem_is_reported_at_once() -> None:
    found = problems(
        server__max_mdl_len=5, server__gpu_memory_utilization=1.7, server__tensor_parallel_size=0, sweep__sequences=-3,
        load__output_tokens="many",
    )  # fmt: skip
    assert found == [
        "load.output_tokens: should be a valid integer, got 'many'",
        "server.gpu_memory_utilization: should be less than or equal to 1 or 'auto', got 1.7",
        "server.max_mdl_len: no such key (did you mean 'max_model_len'?)",
        "server.tensor_parallel_size: should be greater than or equal to 1, got 0",
        "sweep.sequences: should be greater than or equal to 1 or 'auto', got -3",
    ]


@pytest.mark.parametrize("share", [-0.01, 1.01])
def test_share_of_prefix_hits_is_a_share(share: float) -> None:
    (found,) = problems(load__prefix_hit_limit=share)
    assert found.startswith("load.prefix_hit_limit: should be ")


def test_unknown_section_suggests_the_known_one() -> None:
    assert problems(modle={}) == ["modle: no such key (did you mean 'model'?)"]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ([], "sweep.max_model_len: must not be empty"),
        ([512, -1], "sweep.max_model_len.1: should be greater than or equal to 1, got -1"),
        ([1024, 512], "sweep: max_model_len: must ascend without repeats, got [1024, 512]"),
        ([512, 512], "sweep: max_model_len: must ascend without repeats, got [512, 512]"),
    ],
)
def test_axes_are_not_empty_positive_and_ascending(axis: list[int], message: str) -> None:
    assert problems(sweep__max_model_len=axis) == [message]


def test_no_sweep_lists_the_sweeps_beside_other_problems() -> None:
    found = problems(sweep=None, server__max_model_len=1)  # type: ignore[arg-type]
    assert "no sweep named: add +sweep=NAME, NAME one of batching, kv" in found
    assert len(found) == 2


def test_a_bool_is_not_a_number() -> None:
    assert problems(load__prompt_tokens=True) == ["load.prompt_tokens: should be a valid integer, got True"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max-model-len": 5}, "server.extra_args: max_model_len has a key of its own: server.max_model_len"),
        ({"no_enforce_eager": True}, "server.extra_args: enforce_eager has a key of its own: server.enforce_eager"),
        ({"data-parallel-size": 2}, "server.extra_args: data_parallel_size is not supported"),
        ({"uds": "/tmp/x"}, "server.extra_args: uds is set by the tool itself"),
        (
            {"hf_token": "x"},
            "server.extra_args: hf_token looks like a secret: secrets are read from the environment only",
        ),
        ({"block_size": "foo"}, "server.extra_args: block_size should be a whole number above 0, got 'foo'"),
    ],
)
def test_extra_args_hold_further_flags_only(flags: dict[str, object], message: str) -> None:
    assert problems(server__extra_args=flags) == [message]


def test_extra_args_are_known_by_one_name() -> None:
    made = validate(raw(server__extra_args={"--block-size": 32}), [])
    assert made.server.extra_args == {"block_size": 32}


@pytest.mark.parametrize("name", ["hf_token", "HF-TOKEN", "api_key", "apikey", "db.password", "secret"])
def test_secrets_are_known_by_their_names(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["max_num_batched_tokens", "load.prompt_tokens", "tokenizer", "key", "secretary"])
def test_other_names_hold_no_secret(name: str) -> None:
    assert not is_secret(name)


def test_sim_device_belongs_to_the_sim_engine() -> None:
    assert problems(engine__device="sim") == ["engine: device: 'sim' belongs to engine=sim and to nothing else"]
