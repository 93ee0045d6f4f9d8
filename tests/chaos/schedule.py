"""What is done to a run, and when: drawn from a seed, and from nothing else."""

import random
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """One way to hurt a run."""

    KILL = "kill -9"
    STOP = "SIGSTOP"
    FULL_DISK = "full disk"
    READ_ONLY = "read-only output"
    SLOW_STREAM = "slow stream"
    CUT_STREAM = "cut stream"
    PORT_TAKEN = "port taken"
    EARLY_READY = "ready too early"
    INTERRUPT = "Ctrl-C"
    TWO_INTERRUPTS = "two Ctrl-C"
    SIGTERM = "SIGTERM"
    HALF_SHARD = "shard cut in half"


class Role(StrEnum):
    """Whom a signal goes to."""

    SERVER = "server"
    CORE = "engine core"
    GUARD = "guard"
    ACTOR = "actor"
    LOAD_TASK = "load task"
    WARM_PARENT = "warm parent"
    WARM_ACTOR = "warm actor"
    RAYLET = "raylet"
    DRIVER = "driver"


class Where(StrEnum):
    """What Ray the run has."""

    PRIVATE = "private Ray"
    NODES = "three nodes"


@dataclass(frozen=True)
class Fault:
    """One fault. `at_s` counts from the end of planning; `pick` (0 to 1) chooses among several targets."""

    kind: Kind
    at_s: float
    role: Role | None = None
    pick: float = 0.0
    seconds: float = 0.0
    """Of a SIGSTOP, until it goes on."""

    @property
    def name(self) -> str:
        """What is done to whom."""
        return f"{self.kind}{f' of {self.role}' if self.role else ''}"

    def __str__(self) -> str:
        return self.name + (f" for {self.seconds:.1f} s" if self.seconds else "")


@dataclass(frozen=True)
class Trial:
    """One run, what is done to it in order of time, and what is done to its directory before it is gone on with."""

    seed: int
    where: Where
    warm: bool
    tcp: bool
    during: tuple[Fault, ...]
    after: tuple[Fault, ...]


_PASSING = 6
"""Faults of a trial that a run should outlive."""
_GAP_S = 1.1
_ENDING = (
    (Kind.KILL, Role.DRIVER), (Kind.KILL, Role.DRIVER), (Kind.INTERRUPT, None), (Kind.INTERRUPT, None),
    (Kind.TWO_INTERRUPTS, None), (Kind.SIGTERM, None), (Kind.FULL_DISK, None), (Kind.READ_ONLY, None),
)  # fmt: skip


def trial(seed: int, where: Where) -> Trial:
    """Return the trial of a seed."""
    draw = random.Random(f"{where}-{seed}")
    warm, tcp = draw.random() < 0.5, draw.random() < 0.4
    passing = [(Kind.KILL, role) for role in (Role.SERVER, Role.CORE, Role.GUARD, Role.ACTOR, Role.LOAD_TASK)]
    passing += [
        (Kind.STOP, role)
        for role in (Role.SERVER, Role.CORE, Role.GUARD, Role.ACTOR, Role.LOAD_TASK, Role.RAYLET, Role.DRIVER)
    ]
    passing += [(Kind.SLOW_STREAM, None), (Kind.CUT_STREAM, None), (Kind.EARLY_READY, None)]  # type: ignore[list-item]
    if tcp:
        passing += [(Kind.PORT_TAKEN, None)] * 2  # type: ignore[list-item]
    if warm:
        passing += [(Kind.KILL, Role.WARM_PARENT), (Kind.STOP, Role.WARM_PARENT), (Kind.KILL, Role.WARM_ACTOR)]
    at_s, during = 0.0, []
    chosen = [draw.choice(passing) for _ in range(_PASSING)]
    if where is Where.NODES and draw.random() < 0.6:
        chosen[draw.randrange(_PASSING)] = (Kind.KILL, Role.RAYLET)
    if draw.random() < 0.75:
        chosen.append(draw.choice(_ENDING))  # type: ignore[arg-type]
    elif where is Where.PRIVATE and draw.random() < 0.5:
        chosen.append((Kind.KILL, Role.RAYLET))
    for kind, role in chosen:
        at_s += draw.uniform(0.1, 2 * _GAP_S)
        during.append(Fault(kind, at_s, role, draw.random(), draw.uniform(0.5, 4) if kind is Kind.STOP else 0.0))
    halves = draw.choice((0, 1, 1, 2))
    after = tuple(Fault(Kind.HALF_SHARD, 0.0, None, draw.random()) for _ in range(halves))
    return Trial(seed, where, warm, tcp, tuple(during), after)
