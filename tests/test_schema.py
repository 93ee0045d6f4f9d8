"""Bad configurations: every problem at once, in the user's own words."""

import pytest

from contract.lengths import Lengths, LogNormal, Normal, Uniform
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


@pytest.mark.parametrize(
    "ending",
    [{"load__seconds": 5.0}, {"load__seconds": 5.0, "load__precision": {"metric": "p95_e2e_s", "within": 0.1}}],
)
def test_what_ends_a_closed_loop_is_refused_for_an_open_one(ending: dict[str, object]) -> None:
    found = problems(sweep="rate", **ending)
    assert found == ["load.seconds, load.precision: end closed loops; a rate's levels last sweep.seconds"]
    assert validate(raw("concurrency", **ending), []).load.seconds == 5.0


@pytest.mark.parametrize("share", [-0.01, 1.01])
def test_share_of_prefix_hits_is_a_share(share: float) -> None:
    (found,) = problems(load__prefix_hit_limit=share)
    assert found.startswith("load.prefix_hit_limit: should be ")


@pytest.mark.parametrize("price", [0, -1.5, "2", float("inf")])
def test_the_price_of_a_gpu_hour_is_a_number_above_zero(price: object) -> None:
    (found,) = problems(cost__gpu_hour=price)
    assert found.startswith("cost.gpu_hour: should be ")


def test_the_price_of_a_gpu_hour_may_be_left_out() -> None:
    assert validate(raw(cost__gpu_hour=2), []).cost.gpu_hour == 2
    content = raw()
    del content["cost"]
    assert validate(content, []).cost.gpu_hour is None, "manifests of earlier runs have no such key"


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


@pytest.mark.parametrize(
    ("sweep", "changes", "message"),
    [
        ("knee", {"sweep__concurrency": {"lowest": 8, "highest": 8}}, "highest: must be above lowest, got 8 to 8"),
        ("slo", {"sweep__concurrency": None, "sweep__request_rate": None}, "at least one must have a range"),
        ("envelope", {"sweep__output_share": 0.99, "sweep__context_tokens": [64]}, "64 leaves no prompt of 2 tokens"),
        ("envelope", {"sweep__context_tokens": [64, 32]}, "context_tokens: must ascend"),
    ],
)
def test_ranges_and_cells_of_searches_make_sense(sweep: str, changes: dict[str, object], message: str) -> None:
    (found,) = problems(sweep=sweep, **changes)
    assert message in found


def test_no_sweep_lists_the_sweeps_beside_other_problems() -> None:
    found = problems(sweep=None, server__max_model_len=1)  # type: ignore[arg-type]
    assert "no sweep named: add +sweep=NAME, NAME one of batching, kv" in found
    assert len(found) == 2


def test_a_bool_is_not_a_number() -> None:
    assert problems(load__prompt_tokens=True) == ["load.prompt_tokens: should be a valid integer, got True"]


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        (12, 12),
        ({"uniform": {"low": 100, "high": 400}}, Uniform(100, 400)),
        ({"normal": {"mean": 512, "std": 128, "low": 64, "high": 1024}}, Normal(512, 128, 64, 1024)),
        ({"lognormal": {"mean": 512.5, "std": 128, "low": 64, "high": 1024}}, LogNormal(512.5, 128, 64, 1024)),
    ],
)
def test_lengths_are_a_number_or_a_distribution(lengths: object, kept: Lengths) -> None:
    made = validate(raw(load__prompt_tokens=lengths, load__output_tokens=lengths), [])
    assert (made.load.prompt_lengths, made.load.output_lengths) == (kept, kept)
    assert validate(made.model_dump(mode="json"), []) == made, "resume reads it from the manifest"


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ("many", ": should be a valid integer, got 'many'"),
        (0, ": should be greater than or equal to 1, got 0"),
        ({}, ": should be one of uniform, normal or lognormal, got none"),
        ({"unifrom": {"low": 1, "high": 2}}, ".unifrom: no such key (did you mean 'uniform'?)"),
        ({"uniform": {"low": 2, "high": 1}}, ".uniform: low 2 is above high 1"),
        ({"uniform": {"low": 2}}, ".uniform.high: is missing"),
        ({"uniform": {"low": 2, "hihg": 3, "high": 4}}, ".uniform.hihg: no such key (did you mean 'high'?)"),
        ({"normal": {"mean": 9, "std": 0, "low": 2, "high": 9}}, ".normal.std: should be greater than 0, got 0"),
        ({"normal": {"mean": 90, "std": 1, "low": 2, "high": 9}}, ".normal: mean 90 is not within low 2 and high 9"),
        ({"uniform": {"low": 2, "high": 4}, "normal": {"mean": 9, "std": 1, "low": 2, "high": 9}},
         ": should be one of uniform, normal or lognormal, got uniform and normal"),
    ],
)  # fmt: skip
def test_lengths_that_make_no_sense_are_named_where_they_were_typed(lengths: object, message: str) -> None:
    assert problems(load__output_tokens=lengths) == [f"load.output_tokens{message}"]


def test_every_problem_of_a_load_is_reported_at_once() -> None:
    found = problems(
        load__prompt_tokens={"lognormal": {"mean": 9, "std": "wide", "low": 0, "high": 9}}, load__api="chats",
        load__output_tokens={"uniform": {"low": 5, "high": 4}}, load__shared_prefix={"groups": 0},
    )  # fmt: skip
    assert found == [
        "load.api: should be 'completions' or 'chat', got 'chats'",
        "load.output_tokens.uniform: low 5 is above high 4",
        "load.prompt_tokens.lognormal.low: should be greater than or equal to 1, got 0",
        "load.prompt_tokens.lognormal.std: should be a valid number, got 'wide'",
        "load.shared_prefix.groups: should be greater than or equal to 1, got 0",
        "load.shared_prefix.tokens: is missing",
    ]


def test_prompts_must_be_longer_than_what_they_share() -> None:
    prefix, drawn = {"groups": 8, "tokens": 256}, {"uniform": {"low": 256, "high": 999}}
    for lengths in (256, drawn):
        assert problems(load__shared_prefix=prefix, load__prompt_tokens=lengths) == [
            "load: shared_prefix: prompts of 256 tokens are not longer than a prefix of 256"
        ]
    assert validate(raw(load__shared_prefix=prefix, load__prompt_tokens=257), []).load.shared_prefix_spec
    assert problems(load__prompt_tokens=1) == ["load: prompt_tokens: must be at least 2, got 1"]


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
