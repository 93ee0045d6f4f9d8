"""One frozen, validated `Experiment` from a composed configuration: the last place where a plain dict is seen.

Called by `orchestrator.compose`. Reports every problem at once, in the words of the person who typed the key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from contract.arrivals import HIGHEST_RATE, ArrivalProcess, Arrivals, Stage
from contract.lengths import Lengths, LogNormal, Normal, Uniform, lowest
from contract.specs import Precision, SharedPrefix
from orchestrator.problems import ConfigError

Auto = Literal["auto"]
Count = Annotated[int, Strict(), Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=HIGHEST_RATE)]
SHORTEST_PROMPT = 2
Axis = Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]


OWN_FLAGS = (
    "model", "served_model_name", "revision", "load_format", "host", "port", "uds", "api_key", "root_path",
    "distributed_executor_backend", "disable_uvicorn_access_log",
)  # fmt: skip
UNSUPPORTED_FLAGS = (
    "config", "trust_remote_code", "api_server_count", "pipeline_parallel_size", "data_parallel_size",
    "data_parallel_size_local", "nnodes", "headless",
)  # fmt: skip
_CODE = re.compile(
    r"(^|[._-])(cls|class|plugins?|module_path|middleware|logits_processors?|log_config(_file)?|inductor_passes|"
    r"class_overrides|trust_remote_code)$"
)
"""Flags, and keys inside them, by which vLLM imports what they name: a manifest from elsewhere could name anything."""
_CODE_FLAGS = (
    "worker_cls", "worker_extension_cls", "scheduler_cls", "middleware", "logits_processors", "log_config_file",
    "io_processor_plugin", "reasoning_parser_plugin", "tool_parser_plugin", "model_class_overrides",
)  # fmt: skip
"""vLLM's flags of that kind, which its command line takes in any shorter form that is no other flag's."""
_FLAG_NAME = re.compile(r"[a-z][a-z0-9_]*")
_CREDENTIALS = re.compile(r"://[^/@\s]+:[^/@\s]*@")
_SECRET = re.compile(r"(^|[._-])(token|api_?key|secret|passw(or)?d|credentials?)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Return whether a key of that name holds a secret: `hf_token` does, `prompt_tokens` does not."""
    return bool(_SECRET.search(name))


def _holds_secret(value: Any) -> bool:
    if isinstance(value, dict):
        return any(is_secret(str(key)) or _holds_secret(item) for key, item in value.items())
    if isinstance(value, list):
        return any(map(_holds_secret, value))
    return isinstance(value, str) and bool(_CREDENTIALS.search(value))


def _names_code(value: Any) -> bool:
    if isinstance(value, dict):
        return any(
            _CODE.search(str(key)) or (key == "backend" and "." in str(item)) or _names_code(item)
            for key, item in value.items()
        )
    return isinstance(value, list) and any(map(_names_code, value))


def _reads_as_flag(value: Any) -> bool:
    """Return whether vLLM's command line would take a value, or one of a list, for a flag."""
    if isinstance(value, list):
        return any(map(_reads_as_flag, value))
    return isinstance(value, str) and value.startswith("-")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(_Section):
    name: Annotated[str, Field(min_length=1)]
    kind: Literal["shape", "hf"]
    source: str | None = None
    cut: str | None = None
    path: str | None = None
    revision: str | None = None
    config: dict[str, Any] = {}

    @model_validator(mode="after")
    def _has_config(self) -> Self:
        if self.kind == "shape" and not self.config:
            raise ValueError("a shape needs its config (the content of config.json)")
        return self


class ServerConfig(_Section):
    max_model_len: Annotated[int, Field(ge=2)]
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | Auto
    kv_cache_memory_bytes: Count | None
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"]
    max_num_seqs: Count | None
    max_num_batched_tokens: Count | Auto | None
    tensor_parallel_size: Count
    enforce_eager: bool | Auto
    enable_prefix_caching: bool | None
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    quantization: str | None
    transport: Literal["uds", "tcp"]
    start: Literal["auto", "cold", "warm"] = "auto"
    extra_args: dict[str, Any]

    @field_validator("extra_args")
    @classmethod
    def _only_further_flags(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Flags under their underscored names; none that has a key of its own, that we own, or that holds a secret."""
        flags = {name.replace("-", "_").lstrip("_"): value for name, value in given.items()}
        for given_name, value in flags.items():
            name = given_name.removeprefix("no_")
            if not _FLAG_NAME.fullmatch(name):
                raise ValueError(f"{given_name!r} is no flag's name: letters, digits and underscores")
            if name in cls.model_fields:
                raise ValueError(f"{name} has a key of its own: server.{name}")
            if name in OWN_FLAGS:
                raise ValueError(f"{name} is set by the tool itself")
            if name in UNSUPPORTED_FLAGS:
                raise ValueError(f"{name} is not supported")
            kept = (*cls.model_fields, *OWN_FLAGS, *UNSUPPORTED_FLAGS, *_CODE_FLAGS, "hf_token")
            if meant := [flag for flag in kept if flag.startswith(name) and flag not in (name, given_name)]:
                raise ValueError(f"{name} may be short for {meant[0]}: give the flag's whole name")
            if _reads_as_flag(value):
                raise ValueError(f"{name} has a value that starts with '-': vLLM would take it for a flag")
            if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
                raise ValueError(f"{name} is JSON text: give it as a mapping or a list")
            if _names_code({name: value}):
                raise ValueError(f"{name} has vLLM run code that it names: not supported")
            if _holds_secret({name: value}):
                raise ValueError(f"{name} looks like a secret: secrets are read from the environment only")
            if name == "block_size" and not (isinstance(value, int) and value > 0):
                raise ValueError(f"block_size should be a whole number above 0, got {value!r}")
        return flags


class EngineConfig(_Section):
    name: Literal["vllm", "sim"]
    device: Literal["auto", "cuda", "cpu", "sim"]
    ready_timeout_s: Seconds
    stop_grace_s: Seconds
    memory_back_s: Seconds

    @model_validator(mode="after")
    def _device_fits(self) -> Self:
        if (self.name == "sim") != (self.device == "sim"):
            raise ValueError("device: 'sim' belongs to engine=sim and to nothing else")
        return self


class UniformConfig(_Section):
    low: Count
    high: Count

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        Uniform(self.low, self.high)
        return self


class BellConfig(_Section):
    mean: Annotated[float, Field(gt=0)]
    std: Annotated[float, Field(gt=0)]
    low: Count
    high: Count

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        Normal(self.mean, self.std, self.low, self.high)
        return self


class DrawnConfig(_Section):
    uniform: UniformConfig | None = None
    normal: BellConfig | None = None
    lognormal: BellConfig | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        named = [name for name, value in self if value is not None]
        if len(named) != 1:
            raise ValueError(f"should be one of uniform, normal or lognormal, got {' and '.join(named) or 'none'}")
        return self

    def lengths(self) -> Lengths:
        """Return the distribution."""
        if self.uniform is not None:
            return Uniform(self.uniform.low, self.uniform.high)
        if self.normal is not None:
            return Normal(**self.normal.model_dump())
        assert self.lognormal is not None
        return LogNormal(**self.lognormal.model_dump())


def _lengths_tag(value: Any) -> str:
    return "drawn" if isinstance(value, dict | DrawnConfig) else "int"


LengthsConfig = Annotated[
    Annotated[Count, Tag("int")] | Annotated[DrawnConfig, Tag("drawn")], Discriminator(_lengths_tag)
]


class SharedPrefixConfig(_Section):
    groups: Count
    tokens: Count


class PrecisionConfig(_Section):
    metric: Literal["mean_e2e_s", "p50_e2e_s", "p95_e2e_s", "mean_ttft_s", "p50_ttft_s", "p95_ttft_s"]
    within: Annotated[float, Field(gt=0, lt=1)]


class LoadConfig(_Section):
    api: Literal["completions", "chat"] = "completions"
    prompt_tokens: LengthsConfig
    output_tokens: LengthsConfig
    shared_prefix: SharedPrefixConfig | None = None
    requests_min: Count
    requests_per_level: Count
    seconds: Seconds | None = None
    precision: PrecisionConfig | None = None
    warmup: bool
    processes: Auto | Count
    prefix_hit_limit: Annotated[float, Field(ge=0, le=1)]
    request_timeout_s: Seconds

    def requests(self, concurrency: int) -> int:
        """Requests that a point at this level sends."""
        return max(self.requests_min, self.requests_per_level * concurrency)

    @property
    def prompt_lengths(self) -> Lengths:
        """Lengths of the prompts, as a plan carries them."""
        return self.prompt_tokens if isinstance(self.prompt_tokens, int) else self.prompt_tokens.lengths()

    @property
    def output_lengths(self) -> Lengths:
        """The same of the answers."""
        return self.output_tokens if isinstance(self.output_tokens, int) else self.output_tokens.lengths()

    @property
    def shared_prefix_spec(self) -> SharedPrefix | None:
        """What prompts share, as a plan carries it."""
        return SharedPrefix(**self.shared_prefix.model_dump()) if self.shared_prefix else None

    @property
    def precision_spec(self) -> Precision | None:
        """What ends a level early, as a plan carries it."""
        return Precision(**self.precision.model_dump()) if self.precision else None

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.precision is not None and self.seconds is None:
            raise ValueError("precision: needs load.seconds, the time after which a level ends in any case")
        if self.seconds is not None and not self.warmup:
            raise ValueError("seconds: needs load.warmup, which tells how many requests so many seconds take")
        return self

    @model_validator(mode="after")
    def _prompts_are_long_enough(self) -> Self:
        shortest = lowest(self.prompt_lengths)
        if shortest < SHORTEST_PROMPT:
            raise ValueError(f"prompt_tokens: must be at least {SHORTEST_PROMPT}, got {shortest}")
        if self.shared_prefix is not None and shortest <= self.shared_prefix.tokens:
            prefix = self.shared_prefix.tokens
            raise ValueError(f"shared_prefix: prompts of {shortest} tokens are not longer than a prefix of {prefix}")
        return self


class ClusterConfig(_Section):
    address: Annotated[str, Field(min_length=1)]
    num_gpus: Annotated[int, Field(ge=0)] | None
    cores_per_session: Count
    gpu: Annotated[str, Field(min_length=1)] | None = None
    shared_gpus: bool = False


class SloConfig(_Section):
    p95_e2e_s: Seconds | None
    p95_ttft_s: Seconds | None
    p95_tpot_s: Seconds | None


class CostConfig(_Section):
    gpu_hour: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class BudgetConfig(_Section):
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    gpu_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class TargetConfig(_Section):
    concurrency: Count
    context_tokens: Count


def _ascending(name: str, axis: tuple[float, ...] | None) -> None:
    if axis is not None and list(axis) != sorted(set(axis)):
        raise ValueError(f"{name}: must ascend without repeats, got {list(axis)}")


class KvSweep(_Section):
    kind: Literal["kv"]
    max_model_len: Axis
    modes: Annotated[tuple[Literal["committed", "utilization"], ...], Field(min_length=1, strict=False)]
    utilization_max_model_len: Axis | None
    sequences: Count | Auto

    @model_validator(mode="after")
    def _axes_ascend(self) -> Self:
        _ascending("max_model_len", self.max_model_len)
        _ascending("utilization_max_model_len", self.utilization_max_model_len)
        if len(set(self.modes)) != len(self.modes):
            raise ValueError(f"modes: named twice: {list(self.modes)}")
        if min(self.max_model_len + (self.utilization_max_model_len or ())) < 2:
            raise ValueError("max_model_len: must be at least 2 tokens (a prompt token and an answer)")
        return self


class BatchingSweep(_Section):
    kind: Literal["batching"]
    concurrency: Axis
    repeats: Count
    comparison_requests: Count
    comparison_concurrency: Annotated[int, Field(ge=2)]

    @model_validator(mode="after")
    def _axes_ascend(self) -> Self:
        _ascending("concurrency", self.concurrency)
        return self


class ConcurrencySweep(_Section):
    kind: Literal["concurrency"]
    concurrency: Axis
    repeats: Count

    @model_validator(mode="after")
    def _axes_ascend(self) -> Self:
        _ascending("concurrency", self.concurrency)
        return self


class StageConfig(_Section):
    seconds: Seconds
    share: Annotated[float, Field(ge=0)]
    to: Annotated[float, Field(ge=0)] | None = None

    @property
    def end(self) -> float:
        """Share of the level's rate at its end."""
        return self.share if self.to is None else self.to

    @model_validator(mode="after")
    def _sends(self) -> Self:
        if not max(self.share, self.end) > 0:
            raise ValueError("share: a stage needs a rate above 0 at one of its ends")
        return self


class RateSweep(_Section):
    kind: Literal["rate"]
    request_rate: Annotated[tuple[Rate, ...], Field(min_length=1, strict=False)]
    seconds: Seconds
    arrivals: Literal["poisson", "gamma", "constant"]
    burstiness: Annotated[float, Field(gt=0, le=1e3)]
    stages: Annotated[tuple[StageConfig, ...], Field(strict=False)] | None
    repeats: Count

    @model_validator(mode="after")
    def _axes_ascend(self) -> Self:
        _ascending("request_rate", self.request_rate)
        if self.stages is not None and not (self.stages and self.stages[-1].end > 0):
            raise ValueError("stages: the last one must end at a rate above 0")
        if self.burstiness != 1 and self.arrivals != "gamma":
            raise ValueError("burstiness: belongs to arrivals=gamma")
        return self

    def at(self, rate: float) -> Arrivals:
        """Return the arrivals of the level of `rate` requests a second."""
        stages = tuple(Stage(each.seconds, each.share, each.end) for each in self.stages or ())
        return Arrivals(ArrivalProcess(self.arrivals), rate, stages or (Stage(self.seconds),), self.burstiness)


class LevelRange(_Section):
    lowest: Count
    highest: Count

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if self.highest <= self.lowest:
            raise ValueError(f"highest: must be above lowest, got {self.lowest} to {self.highest}")
        return self


class RateRange(_Section):
    lowest: Rate
    highest: Rate

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if self.highest <= self.lowest:
            raise ValueError(f"highest: must be above lowest, got {self.lowest:g} to {self.highest:g}")
        return self


class KneeSweep(_Section):
    kind: Literal["knee"]
    concurrency: LevelRange
    repeats: Count


class SloSweep(_Section):
    kind: Literal["slo"]
    concurrency: LevelRange | None
    request_rate: RateRange | None
    seconds: Seconds
    repeats: Count

    @model_validator(mode="after")
    def _searches(self) -> Self:
        if self.concurrency is None and self.request_rate is None:
            raise ValueError("concurrency and request_rate: at least one must have a range")
        return self

    def at(self, rate: float) -> Arrivals:
        """Return the Poisson arrivals of the level of `rate` requests a second."""
        return Arrivals(ArrivalProcess.POISSON, rate, (Stage(self.seconds),))


class EnvelopeSweep(_Section):
    kind: Literal["envelope"]
    context_tokens: Axis
    concurrency: Axis | Auto
    sequences: Count
    output_share: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _axes_ascend(self) -> Self:
        _ascending("context_tokens", self.context_tokens)
        _ascending("concurrency", None if self.concurrency == "auto" else self.concurrency)
        shortest = self.lengths(self.context_tokens[0])
        if shortest[0] < SHORTEST_PROMPT:
            raise ValueError(f"context_tokens: {self.context_tokens[0]} leaves no prompt of {SHORTEST_PROMPT} tokens")
        return self

    def lengths(self, context_tokens: int) -> tuple[int, int]:
        """Return prompt and answer (tokens, each at least one) that fill a context."""
        output = max(1, round(self.output_share * context_tokens))
        return context_tokens - output, output


class NearFullContext(_Section):
    sequences: Count | Auto
    concurrency: Axis | None
    repeats: Count

    @model_validator(mode="after")
    def _axes_ascend(self) -> Self:
        _ascending("concurrency", self.concurrency)
        return self


class CapacitySweep(_Section):
    kind: Literal["capacity"]
    kv: KvSweep
    batching: BatchingSweep
    concurrency: ConcurrencySweep
    near_full_context: NearFullContext


Sweep = Annotated[
    KvSweep | BatchingSweep | ConcurrencySweep | RateSweep | CapacitySweep | KneeSweep | SloSweep | EnvelopeSweep,
    Field(discriminator="kind"),
]


class Experiment(_Section):
    """One composed and validated configuration."""

    model: ModelConfig
    server: ServerConfig
    engine: EngineConfig
    load: LoadConfig
    cluster: ClusterConfig
    sweep: Sweep
    target: TargetConfig
    slo: SloConfig
    cost: CostConfig = CostConfig()
    budget: BudgetConfig = BudgetConfig()
    output_root: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0)]
    controls: Literal["on", "off"] = "on"
    dry_run: bool

    @model_validator(mode="after")
    def _has_objectives(self) -> Self:
        if isinstance(self.sweep, SloSweep) and not any(self.slo.model_dump().values()):
            keys = " or ".join(f"slo.{name}" for name in SloConfig.model_fields)
            raise ValueError(f"slo: +sweep=slo searches for where objectives begin to be missed; set {keys} (seconds)")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if isinstance(self.sweep, RateSweep) and (self.load.seconds is not None or self.load.precision is not None):
            raise ValueError("load.seconds, load.precision: end closed loops; a rate's levels last sweep.seconds")
        return self


def validate(content: dict[str, Any], sweeps: list[str]) -> Experiment:
    """Return the experiment that `content` (plain dicts and lists) describes.

    `sweeps` are the names a user may choose from. Raises `ConfigError` with every problem found.
    """
    problems = []
    if content.get("sweep") is None:
        problems.append(f"no sweep named: add +sweep=NAME, NAME one of {', '.join(sweeps)}")
        content = {key: value for key, value in content.items() if key != "sweep"}
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        problems += [p for p in _problems(error) if not (problems and p.startswith("sweep:"))]
        raise ConfigError(sorted(problems)) from None
    return experiment


def _problems(error: ValidationError) -> Iterator[str]:
    """One line a path. A value tried against the members of a union gives one line that names them all."""
    grouped: dict[str, list[ErrorDetails]] = {}
    for item in error.errors():
        grouped.setdefault(_path(item), []).append(item)
    for path, items in grouped.items():
        if any(other.startswith(f"{path}.") for other in grouped):
            continue  # the parts of this value have problems of their own, which say more
        first = items[0]
        if first["type"] == "extra_forbidden":
            yield f"{path}: no such key{_did_you_mean([str(part) for part in first['loc']])}"
        elif first["type"] == "missing":
            yield f"{path}: is missing"
        elif first["type"] == "value_error":
            yield f"{path}: {first['ctx']['error']}" if path else str(first["ctx"]["error"])
        elif first["type"] == "too_short":
            yield f"{path}: must not be empty"
        else:
            wishes = [_WISH.sub("", item["msg"]).replace("tuple", "list") for item in items]
            yield f"{path}: should {' or '.join(wishes).replace(' or be ', ' or ')}, got {first['input']!r}"


_WISH = re.compile(r"^\w+ should ")
_SWEEP_KINDS = ("kv", "batching", "concurrency", "rate", "capacity", "knee", "slo", "envelope")
_UNION_TAG = re.compile(r"literal\[|constrained-|nullable|int$|float$|bool$|str$|drawn$")


def _path(item: ErrorDetails) -> str:
    """`sweep.kv.modes` is `sweep.modes` to a user: pydantic names the member of a union that it tried."""
    parts = [str(part) for part in item["loc"]]
    if parts[:1] == ["sweep"] and parts[1:2] and parts[1] in _SWEEP_KINDS:
        del parts[1]
    return ".".join(part for part in parts if not _UNION_TAG.match(part))


def _did_you_mean(location: list[str]) -> str:
    known = _known_keys(location[:-1])
    close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(sorted(known))})"


def _known_keys(location: list[str]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "model": ModelConfig, "server": ServerConfig, "engine": EngineConfig, "load": LoadConfig,
        "cluster": ClusterConfig, "target": TargetConfig, "slo": SloConfig, "cost": CostConfig, "kv": KvSweep,
        "budget": BudgetConfig,
        "batching": BatchingSweep, "concurrency": ConcurrencySweep, "rate": RateSweep,
        "near_full_context": NearFullContext, "capacity": CapacitySweep, "knee": KneeSweep, "envelope": EnvelopeSweep,
        "stages": StageConfig, "precision": PrecisionConfig,
        "drawn": DrawnConfig, "uniform": UniformConfig, "normal": BellConfig, "lognormal": BellConfig,
        "shared_prefix": SharedPrefixConfig,
    }  # fmt: skip
    section = sections.get(location[-1], Experiment) if location else Experiment
    return list(section.model_fields)
