"""What a user types, and what Hydra gets."""

from orchestrator.arguments import read


def test_sweep_is_accepted_with_and_without_plus() -> None:
    assert read(["sweep=kv"]).overrides == read(["+sweep=kv"]).overrides == ["+sweep=kv"]


def test_groups_go_to_hydra_and_keys_reach_our_schema() -> None:
    asked = read(["model=tiny", "server.max_mdl_len=5", "hydra.verbose=true", "~load.seed", "+a.b=1"])
    assert asked.overrides == ["model=tiny", "++server.max_mdl_len=5", "hydra.verbose=true", "~load.seed", "+a.b=1"]


def test_flags_and_their_values_follow_the_overrides() -> None:
    asked = read(["+sweep=kv", "--cfg", "job", "seed=3"])
    assert (asked.overrides, asked.flags) == (["+sweep=kv", "++seed=3"], ["--cfg", "job"])
    assert asked.inspects


def test_resume_is_ours_and_needs_no_sweep() -> None:
    asked = read(["resume=outputs/a=b"])
    assert (asked.resume, asked.overrides) == ("outputs/a=b", [])
    assert read(["resume=outputs/a", "resume.strict=False"]).resume_strict == "false"


def test_value_of_sees_through_prefixes() -> None:
    asked = read(["engine.device=cpu", "model=hf"])
    assert asked.value_of("engine.device") == "cpu"
    assert asked.value_of("model") == "hf"
    assert asked.value_of("cluster") is None
