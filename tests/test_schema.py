"""Bad configurations: every problem at once, in the user's own words."""

import pytest

from orchestrator.schema import ConfigError, KvSweep, validate
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


def test_sim_device_belongs_to_the_sim_engine() -> None:
    assert problems(engine__device="sim") == ["engine: device: 'sim' belongs to engine=sim and to nothing else"]
