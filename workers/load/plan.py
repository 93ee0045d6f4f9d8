"""What a load process is told to send, and what it gives back: a `LoadPlan` in, a `LoadResult` out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from contract.lengths import Lengths, lowest
from contract.rows import ClientRow, RequestRow
from contract.specs import Api, SharedPrefix
from workers.load.ending import REQUESTS, Stop
from workers.load.endpoint import Endpoint
from workers.load.prompts import ASSUMED_COST, TextCost
from workers.load.stalls import HeldBack, Raised, raised_by
from workers.load.start_line import StartLine


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One load level. Temperature is 0 and answers are streamed with usage.

    Raises:
        ValueError: a count or the time limit is below 1 (or not above 0), a prompt has no token behind its shared
            prefix, `first_ordinal` is negative, or an open loop has not one moment a request.
    """

    endpoint: Endpoint
    concurrency: int
    """Requests in flight: each of so many streams sends its next one as soon as its last has ended."""
    num_requests: int
    prompt_tokens: Lengths
    """Of every prompt: exact for completions, about it with its template for chat; not looked at with `text`."""
    output_tokens: Lengths
    """max_tokens, and with `ignore_eos` the exact length of every answer."""
    first_ordinal: int
    """Ordinal of the level's first request. Ordinals must never be used twice on one server: they make prompts
    unique."""
    vocab_size: int
    """Of the model; not looked at with `text`."""
    seed: int
    timeout_s: float
    """Time limit of one request, from its send to the end of its body."""
    ignore_eos: bool = True
    """A vLLM extension; False does not send it, for servers that refuse unknown fields."""
    cores: tuple[int, ...] = ()
    """Cores that `generate` keeps to; empty: any. A server that binds its compute threads to cores starves what shares
    them. Processes of one level share them all: which of them are idle only the kernel knows."""
    start: StartLine | None = None
    """Where to wait for the other processes of the level before the window opens."""
    text: str | None = None
    """Send this text behind a prefix unique per (seed, ordinal) instead of token ids or drawn words."""
    api: Api = Api.COMPLETIONS
    shared_prefix: SharedPrefix | None = None
    text_cost: TextCost = ASSUMED_COST
    """Of a chat's words on this server."""
    due_s: tuple[float, ...] = ()
    """Of an open loop: when each request is due, seconds since the window's opening, ascending. Then `concurrency` is
    only how many lines are connected beforehand. Empty: a closed loop."""
    stop: Stop | None = None
    """What ends a closed loop before its requests are used up."""
    numbers: tuple[int, ...] = ()
    """Of its requests in their level, where other plans send some of them too; empty: from 0 on. Ordinals go by them,
    lengths and shared prefixes by them alone: so they depend neither on how many processes send a level nor on what the
    server was asked before."""

    def __post_init__(self) -> None:
        least = {"concurrency": 1, "num_requests": 1, "output_tokens": 1}
        if self.text is None:
            least["prompt_tokens"] = 1 + (self.shared_prefix.tokens if self.shared_prefix else 0)
        for name, limit in least.items():
            if lowest(getattr(self, name)) < limit:
                raise ValueError(f"{name} is {getattr(self, name)}: must be at least {limit}")
        if self.due_s and (len(self.due_s) != self.num_requests or self.stop is not None):
            raise ValueError("due_s: an open loop needs one moment for each request, and ends with the last")
        if self.numbers and len(self.numbers) != self.num_requests:
            raise ValueError(f"numbers: {len(self.numbers)} for {self.num_requests} requests")
        if self.first_ordinal < 0:
            raise ValueError(f"first_ordinal is {self.first_ordinal}: must not be negative")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s}: must be above 0")


@dataclass(frozen=True)
class LoadResult:
    """What one load level gave. Times in `requests` are seconds since the window opened."""

    requests: list[RequestRow]
    """By ordinal, failed ones included. In a failed row `e2e_s` is the time from its send until it was given up."""
    duration_s: float
    """From the window's opening to the last byte or failure of the last request. A closed loop sends its first requests
    at the opening, an open one its first when that is due."""
    started_monotonic_s: float
    """The window's opening on `time.monotonic()`, which all processes of a host share."""
    started_wall_s: float
    """The same moment as seconds since the epoch, for provenance only."""
    clients: list[ClientRow]
    """One for each process that took part."""
    stopped_by: str = REQUESTS
    """`requests`, `time` or `precision`: which of them ended the level."""
    judging_cpu_s: float = 0.0
    """CPU time of judging the answers, after the window."""
    achieved_share: float | None = None
    """Of a closed loop: `workers.load.limits.achieved_share`, of several processes the mean by their streams."""
    held_back: HeldBack = field(default_factory=HeldBack)
    """By stalls of the processes that took part."""

    @cached_property
    def raised(self) -> Raised:
        """By how much these stalls raised the level's figures."""
        return raised_by(self.requests, self.held_back)
