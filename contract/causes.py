"""What follows from each class of failure: how far it reaches, whether it is a result, and where it is tried again.

One table, which `workers` and `orchestrator.driver` follow; docs/reliability.md shows it. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from contract.failures import FailureClass as F

SESSION_STARTS = 3
"""How often the actor and server of a session are started, at most."""
POINT_TRIES = 2
"""How often a point is tried, at most: one that ends its server twice must not cost the others theirs."""


class Reach(StrEnum):
    """What a failure costs, from the least to the most."""

    REQUEST = "the request"  # counted in its level, which goes on
    POINT = "the point"  # its server measures the others
    SERVER = "the point and its server"  # the others get a fresh server
    START = "all points of the server"
    NODE = "its servers on the node"  # they go elsewhere, and nothing is placed there any more
    RUN = "the run"


class Again(StrEnum):
    """Where what failed is tried again in the same run. Which cards of a node it gets is Ray's choice."""

    NEVER = "no"
    SAME_SERVER = "the same server"
    FRESH_SERVER = "a fresh server"
    OTHER_CARD = "a fresh server, on another card where there is one"
    OTHER_NODE = "a fresh server, on another node where there is one"


@dataclass(frozen=True, slots=True)
class Cause:
    """What follows from one class of failure."""

    reach: Reach
    again: Again
    why: str
    is_result: bool = False
    """The failure is the answer: resume does not try it again, as it does all others."""
    card_is_lost: bool = False
    """Its card would fail every other server of the run, too."""


def _request(why: str) -> Cause:
    return Cause(Reach.REQUEST, Again.NEVER, why)


def _fixed(why: str) -> Cause:
    """A start that would fail again."""
    return Cause(Reach.START, Again.NEVER, why)


CAUSES: dict[F, Cause] = {
    F.CONNECTION_FAILED: _request("a request sent twice is not the load that was asked for"),
    F.CONNECTION_LOST: _request("as above"),
    F.TIMEOUT: _request("as above"),
    F.HTTP_ERROR: _request("as above"),
    F.IN_BAND_ERROR: _request("as above"),
    F.MALFORMED_STREAM: _request("as above"),
    F.NO_DONE: _request("as above"),
    F.NO_FINISH_REASON: _request("as above"),
    F.UNEXPECTED_FINISH_REASON: _request("as above"),
    F.NO_USAGE: _request("as above"),
    F.WRONG_TOKEN_COUNT: _request("as above"),
    F.CLIENT_SOCKETS: Cause(
        Reach.POINT,
        Again.NEVER,
        "its host's limits stay what they are; of a request as above: its level is limited by it",
    ),
    F.BAD_ARGUMENT: _fixed("vLLM would refuse the same command line again"),
    F.LENGTH_ABOVE_MODEL: _fixed("the model stays what it is"),
    F.MODEL_MISSING: Cause(
        Reach.START,
        Again.OTHER_NODE,
        "another node may have it; else the name, the token or the network is to be mended",
    ),
    F.NOT_INSTALLED: Cause(Reach.START, Again.OTHER_NODE, "another node may have vLLM"),
    F.KV_TOO_SMALL: Cause(
        Reach.START,
        Again.NEVER,
        "the engine's own estimate is the measured limit; a forked server is started cold first",
        is_result=True,
    ),
    F.NO_SPACE: Cause(Reach.START, Again.OTHER_NODE, "another node may have room"),
    F.FREE_MEMORY_LOW: Cause(Reach.START, Again.OTHER_CARD, "somebody else uses this card"),
    F.MEMORY_PROFILE: Cause(Reach.START, Again.FRESH_SERVER, "somebody else's memory moved; it may be over"),
    F.OUT_OF_MEMORY: _fixed("the same weights and pool would not fit again; a forked server is started cold first"),
    F.GRAPH_MEMORY: _fixed("the same graphs would not fit again; a forked server is started cold first"),
    F.PORT_TAKEN: Cause(Reach.START, Again.FRESH_SERVER, "another port is drawn"),
    F.WRONG_SERVER: Cause(Reach.START, Again.FRESH_SERVER, "another port is drawn"),
    F.READY_TIMEOUT: _fixed(
        "the cap is long, and the start went on all the time: raise engine.ready_timeout_s; a forked server is started "
        "cold first, unless it was reading weights"
    ),
    F.NO_PROGRESS: Cause(
        Reach.START, Again.OTHER_NODE, "a hang that another start may not have; a forked server is started cold first"
    ),
    F.CUDA_ERROR: Cause(
        Reach.START, Again.OTHER_CARD, "another card tells whose it is; a forked server is started cold first"
    ),
    F.START_FAILED: _fixed(
        "nothing is known that would change; so too where an error that the log names as its own ended it at its first "
        "completion; a forked server is started cold first"
    ),
    F.ENGINE_DEAD: Cause(
        Reach.SERVER,
        Again.FRESH_SERVER,
        "what ended it may not happen again; so too at its first completion where the log names no error of its own (a "
        "killed worker, a hang)",
    ),
    F.MEMORY_UNDER_LOAD: Cause(Reach.SERVER, Again.NEVER, "the same load would need the same memory"),
    F.POINT_TIMEOUT: Cause(Reach.SERVER, Again.NEVER, "it would take as long again"),
    F.LOAD_LOST: Cause(Reach.POINT, Again.SAME_SERVER, "the server is as it was"),
    F.LOAD_TOO_LARGE: Cause(Reach.POINT, Again.NEVER, "its answers would take the same memory again"),
    F.CLIENT_LIMITED: Cause(
        Reach.POINT, Again.NEVER, "a row of an older version: whether the host had more is not known"
    ),
    F.CLIENT_CORES_FEW: Cause(Reach.POINT, Again.NEVER, "it has had as many processes as the host has cores for"),
    F.CLIENT_STREAMS_FEW: Cause(Reach.POINT, Again.NEVER, "it has had a process for every few of its streams"),
    F.CLIENT_PROCESSES_FIXED: Cause(Reach.POINT, Again.NEVER, "it has had as many processes as the user named"),
    F.CLIENT_PROCESSES_FEW: Cause(Reach.POINT, Again.NEVER, "its second try, with more processes, came to nothing"),
    F.PREFIX_HITS: Cause(Reach.POINT, Again.NEVER, "the same prompts would be found again"),
    F.LOAD_ERROR_RATE: Cause(Reach.POINT, Again.NEVER, "the server lives and answers so: that is to be looked into"),
    F.NOT_TRIED: Cause(Reach.POINT, Again.NEVER, "its session got no further start: nothing is known of the point"),
    F.STOPPED: Cause(Reach.RUN, Again.NEVER, "it was asked for"),
    F.ACTOR_LOST: Cause(Reach.SERVER, Again.OTHER_NODE, "it says nothing about the point"),
    F.CARD_LOST: Cause(Reach.SERVER, Again.OTHER_CARD, "it says nothing about the point", card_is_lost=True),
    F.CARD_FAILED: Cause(
        Reach.SERVER,
        Again.OTHER_CARD,
        "it says nothing about the point; a forked server is started cold first",
        card_is_lost=True,
    ),
    F.NODE_LOST: Cause(Reach.NODE, Again.OTHER_NODE, "it says nothing about the point"),
    F.NOT_WRITTEN: Cause(Reach.RUN, Again.NEVER, "what cannot be kept need not be measured"),
    F.INTERNAL: Cause(Reach.POINT, Again.NEVER, "a defect of ours: it would happen again"),
}


def cause(failure_class: str | None) -> Cause:
    """Return what follows from a row's failure class. One that is not known is taken for a defect of ours."""
    return CAUSES[F(failure_class) if failure_class in set(F) else F.INTERNAL]


def table() -> str:
    """Return the table as Markdown: what docs/reliability.md holds."""
    lines = ["| class | costs | a result | tried again on | why |", "|---|---|---|---|---|"]
    for failure_class, what in CAUSES.items():
        result = "yes" if what.is_result else "no"
        lines.append(f"| `{failure_class}` | {what.reach} | {result} | {what.again} | {what.why} |")
    return "\n".join(lines)
