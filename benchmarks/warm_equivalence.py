"""Whether warm and cold starts are equivalent, from what `benchmarks/warm_start.py` has seen. Starts nothing.

A *go* is one run of that script: rounds on one machine, in each of which every length has had a server of either way. A
round counts with both of them or not at all, so that what one machine or one hour differs by from another is in both
ways alike.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from analysis.numbers.intervals import Spread, mean_log, pooled, pooled_noise, scatter_alike, spread, t_quantile
from contract.rows import MEASURED
from contract.specs import Start

MIB = 2**20
MOST_MARGIN = 0.10
"""Of tok/s and p95, by which the two ways may be apart at the most, however much a repeat scatters: a noisier machine
must not make it easier. What the rest of the tool lets two starts of one server differ by (`analysis.load.checks`)."""
TAIL = 0.05
"""Of each of the two one-sided tests; and of all variance ratios together, both ways."""
METRICS = {"tok/s": "tok_s", "p95": "p95_e2e_s"}
MEMORY = {"ready": "ready_bytes", "loaded": "loaded_bytes"}
TOLD = {
    "enforce_eager": ".config.model_config.enforce_eager",
    "max_num_seqs": ".config.scheduler_config.max_num_seqs",
}
"""What decides how levels run, by its path in the configuration that servers tell."""
OF_ONE_SERVER = ("instance_id", "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME")
"""Names in the configuration that are made anew for every server."""
BESIDE = {
    "ttft_ms": "a TTFT of {:.2f} and {:.2f} ms",
    "tpot_ms": "a TPOT of {:.3f} and {:.3f} ms",
    "cores": "{:.2f} and {:.2f} cores",
    "faults_per_s": "{:.0f} and {:.0f} minor page faults a second",
    "huge_mib": "{:.0f} and {:.0f} MiB on huge pages",
    "sm_clock_mhz": "an SM clock of {:.0f} and {:.0f} MHz",
}
"""What servers, cold and warm, did at a level, in words."""
OF_FORKING = ("VLLM_WORKER_MULTIPROC_METHOD",)
"""What differs by intent: how a server makes its processes."""


@dataclass(frozen=True, slots=True)
class Level:
    """One repeat of a load level on one server."""

    concurrency: int
    status: str
    tok_s: float | None = None
    p95_e2e_s: float | None = None
    ttft_ms: float | None = None
    """The median, as is `tpot_ms`: which of the two the time of a request is told apart by."""
    tpot_ms: float | None = None
    cores: float | None = None
    """That the server's processes used, warm-up included: seconds of CPU a second."""
    faults_per_s: float | None = None
    """Their minor page faults meanwhile."""
    huge_mib: float | None = None
    """Of their memory, on huge pages, after it."""
    sm_clock_mhz: float | None = None
    """The card's, the mean of the measured window."""

    @property
    def has_figures(self) -> bool:
        """Whether it has all that is compared, a measurement of the server or not."""
        return bool(self.tok_s and self.p95_e2e_s)

    @property
    def measured(self) -> bool:
        """Whether these are measured, and the server's."""
        return self.status == MEASURED and self.has_figures


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one server, summed over its cards, less what they held before it; of the CPU backend a sum of PSS."""

    status: str
    ready_bytes: int | None = None
    loaded_bytes: int | None = None

    @property
    def measured(self) -> bool:
        """Whether there is a reading of all that is compared."""
        return self.status == MEASURED and None not in (self.ready_bytes, self.loaded_bytes)


@dataclass(frozen=True, slots=True)
class Server:
    """What one server has shown."""

    round: int
    start: Start
    max_model_len: int
    machine: str
    """Card and versions, in words."""
    ready_s: float
    cpu_s: float
    """Spent by its processes until then: what a busy machine changes least."""
    phases_s: dict[str, float]
    configuration: dict[str, str]
    """What it says it resolved, by path."""
    memory: Memory
    levels: list[Level] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Setting:
    """What was asked for: goes that are pooled have it in common."""

    model: str
    overrides: list[str]
    device: str
    lengths: list[int]
    levels: list[int]
    """Concurrencies that the servers of the longest length had; none: no load."""
    repeats: int
    """Of each level on one server."""
    side_by_side: bool = False
    """Whether the servers of all rounds were up at once, and had the levels in turns."""


@dataclass(slots=True)
class Go:
    """One run of the script."""

    setting: Setting
    servers: list[Server] = field(default_factory=list)
    complete: bool = True
    """Whether every server that was asked for was up, in the way that was asked for."""


class Pair(NamedTuple):
    """A round's two servers of one length."""

    cold: Server
    warm: Server


def save(go: Go, path: Path) -> None:
    """Write a go as JSON, in one piece."""
    half = path.with_name(f"{path.name}~")
    half.write_text(json.dumps(asdict(go)))
    half.replace(path)


def read(path: Path) -> Go:
    """Return the go that `save` wrote. Raises `ValueError` where it did not write this file."""
    try:
        told = json.loads(path.read_text())
        servers = [_server(each) for each in told["servers"]]
        return Go(Setting(**told["setting"]), servers, told.get("complete", True))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what --save writes: {type(error).__name__}: {error}") from error


def _server(told: dict[str, Any]) -> Server:
    levels = [Level(**each) for each in told["levels"]]
    return Server(**{**told, "start": Start(told["start"]), "memory": Memory(**told["memory"]), "levels": levels})


def told_by(servers: Iterable[Server], name: str) -> list[str]:
    """Return the values that servers tell of one of `TOLD`; none where none of them tells."""
    return sorted({each.configuration[TOLD[name]] for each in servers if TOLD[name] in each.configuration})


def differing(goes: Sequence[Go]) -> list[str]:
    """Return in what goes differ, so that they cannot be pooled."""
    names, servers = [each.name for each in fields(Setting)], [server for go in goes for server in go.servers]
    found = [name for name in names if len({repr(getattr(go.setting, name)) for go in goes}) > 1]
    found += [name for name in TOLD if len(told_by(servers, name)) > 1]
    return [*found, *(["machine"] if len({server.machine for server in servers}) > 1 else [])]


def paired(go: Go, length: int) -> list[Pair]:
    """Return a go's rounds in which that length has had servers of both ways."""
    found = {(each.round, each.start): each for each in go.servers if each.max_model_len == length}
    rounds = sorted({number for number, _ in found})
    both = [(found.get((number, Start.COLD)), found.get((number, Start.WARM))) for number in rounds]
    return [Pair(cold, warm) for cold, warm in both if cold is not None and warm is not None]


def verdict(goes: Sequence[Go], within: float, memory_within_bytes: float) -> int:
    """Print what was seen. Returns the exit code: 0 where the two ways are equivalent in all that was compared.

    `within`: the fixed share of tok/s and p95 for which the verdict is printed as well; it does not decide. A length
    that has no whole round, of a run that was interrupted, is not compared.
    """
    setting = goes[0].setting
    rounds = {length: [pairs for go in goes if (pairs := paired(go, length))] for length in sorted(setting.lengths)}
    lengths = [length for length, seen in rounds.items() if seen]
    if not lengths:
        print("no length has had servers of both ways in one round: nothing to compare")
        return 1
    servers = [server for go in goes for server in go.servers]
    print(in_words(setting, servers))
    equivalent = []
    scatter = cold_scatter([pairs for length in lengths for pairs in rounds[length]])
    for length in lengths:
        _compare_starts(length, [pair for seen in rounds[length] for pair in seen])
        equivalent.append(_compare_configurations(rounds[length]))
        equivalent.append(_compare_memory(length, rounds[length], setting.device, memory_within_bytes, scatter))
    if scatter is None:
        print("memory, loaded: one round tells nothing of what cold servers differ by")
    else:
        print(f"memory, loaded: two cold servers of one length and go differ by {scatter / MIB:.1f} MiB at most")
    for shorter, longer in pairwise(lengths):
        equivalent.append(_compare_growth(goes, shorter, longer, memory_within_bytes))
    if setting.levels and max(setting.lengths) not in lengths:
        print(f"no load was compared: no round has ended both ways at {max(setting.lengths)}")
        equivalent.append(False)
    elif setting.levels:
        seats = min(map(int, told_by(servers, "max_num_seqs")), default=None)
        equivalent.append(_compare_levels(setting, rounds[max(setting.lengths)], within, seats))
    equivalent.append(_compare_names([each.configuration for each in servers if each.start == "warm"]))
    if not all(go.complete for go in goes):
        print("not every server that was asked for was up")
        equivalent.append(False)
    print("equivalent in all that was compared" if all(equivalent) else "NOT shown to be equivalent")
    return 0 if all(equivalent) else 1


def in_words(setting: Setting, servers: Sequence[Server]) -> str:
    """Return what was asked for, and what the servers say that they run."""
    kinds = {"True": "eager", "False": "CUDA graphs" if setting.device == "cuda" else "compiled"}
    eager = [kinds.get(value, value) for value in told_by(servers, "enforce_eager")]
    seats = " and ".join(told_by(servers, "max_num_seqs")) or "not told"
    asked = " ".join([setting.model, *setting.overrides])
    beside = ", side by side" if setting.side_by_side else ""
    ran = " and ".join(eager) or "eager or not: not told"
    return f"{asked} on {setting.device}: {ran}, max_num_seqs {seats}{beside}"


def _compare_starts(length: int, pairs: Sequence[Pair]) -> None:
    cold, warm = zip(*pairs, strict=True)
    medians = [statistics.median(each.ready_s for each in way) for way in (cold, warm)]
    print(
        f"max_model_len {length}: ready in {medians[0]:.1f} s cold and {medians[1]:.1f} s warm "
        f"(medians of {len(pairs)}), ratio {medians[1] / medians[0]:.3f}"
    )
    busy = [statistics.median(each.cpu_s for each in way) for way in (cold, warm)]
    print(f"  CPU seconds of its processes until then: {busy[0]:.1f} and {busy[1]:.1f}, ratio {busy[1] / busy[0]:.3f}")
    for name, way in (("cold", cold), ("warm", warm)):
        phases = dict.fromkeys(phase for each in way for phase in each.phases_s)
        taken = {phase: [each.phases_s[phase] for each in way if phase in each.phases_s] for phase in phases}
        print(f"  {name}: {', '.join(f'{phase} {statistics.median(seconds):.1f}' for phase, seconds in taken.items())}")


def unexpected_keys(configurations: Sequence[dict[str, str]]) -> list[str]:
    """Return the keys in which any two servers of one length differ, less those that are meant to."""
    keys = sorted({key for configuration in configurations for key in configuration})
    different = [key for key in keys if len({configuration.get(key) for configuration in configurations}) > 1]
    return [key for key in different if not key.endswith((*OF_ONE_SERVER, *OF_FORKING))]


def shared_names(configurations: Sequence[dict[str, str]]) -> list[str]:
    """Return the names made for one server that two servers have in common."""
    keys = sorted({key for configuration in configurations for key in configuration if key.endswith(OF_ONE_SERVER)})
    named = {key: [configuration[key] for configuration in configurations if key in configuration] for key in keys}
    return [key for key, values in named.items() if len(set(values)) < len(values)]


def _compare_configurations(goes: Sequence[Sequence[Pair]]) -> bool:
    """Of all servers of a length on one machine, both ways. One that told nothing shows nothing."""
    told = [[each.configuration for pair in pairs for each in pair] for pairs in goes]
    unexpected = sorted({key for configurations in told for key in unexpected_keys(configurations)})
    least = min(len(configuration) for configurations in told for configuration in configurations)
    print(f"  configuration: {least} keys, {len(unexpected)} differ unexpectedly {unexpected or ''}")
    return least > 0 and not unexpected


def _compare_names(warm: Sequence[dict[str, str]]) -> bool:
    shared = shared_names(warm)
    print(f"names made for one server: {len(shared)} are the same in two of {len(warm)} warm ones {shared or ''}")
    return not shared


def cold_scatter(cells: Iterable[Sequence[Pair]]) -> int | None:
    """Return by how many bytes two cold servers of a cell (one go, one length) have differed after a load, at most.

    None where no cell has two that were read.
    """
    cells_read = [[each for pair in cell if (each := pair.cold.memory.loaded_bytes) is not None] for cell in cells]
    return max((max(read) - min(read) for read in cells_read if len(read) > 1), default=None)


def _compare_memory(
    length: int, goes: Sequence[Sequence[Pair]], device: str, within_bytes: float, scatter: int | None
) -> bool:
    """Of cards: the least and the most that a go's servers of either way have, for a median hides the one that is off.

    When ready the two ways may be `within_bytes` apart. What torch keeps after a load differs from server to server of
    one way, too, by tens of MiB in few of them: there the ways may be as far apart as two cold servers of one go and
    length, any of them, have been (`scatter`, in bytes; None: not known), where that is more.
    """
    every = [each for pairs in goes for pair in pairs for each in pair]
    missing = Counter(each.memory.status for each in every if not each.memory.measured)
    if missing:
        print(f"memory, at {length}: NOT read of all {len(every)} servers ({_counted(missing)})")
        return False
    alike = []
    for name, column in MEMORY.items():
        ways = [_memory(pairs, column) for pairs in goes]
        apart = max(abs(end(warm) - end(cold)) for cold, warm in ways for end in (min, max))
        allowed = within_bytes if name == "ready" else max(within_bytes, scatter or 0)
        alike.append(apart <= allowed)
        cold, warm = (_range([value for way in ways for value in way[at]]) for at in range(2))
        judged = "not judged" if device == "cpu" else f"{'' if alike[-1] else 'NOT '}within {allowed / MIB:.1f}"
        print(f"memory, {name}, at {length}: {cold} cold, {warm} warm, at most {apart / MIB:.1f} MiB apart: {judged}")
    return device == "cpu" or all(alike)


def _range(values: Sequence[int]) -> str:
    return f"{min(values) / MIB:.1f} to {max(values) / MIB:.1f} MiB"


def _memory(pairs: Sequence[Pair], column: str) -> list[list[int]]:
    """Cold servers' and warm ones'."""
    return [[getattr(each.memory, column) for each in way] for way in zip(*pairs, strict=True)]


def _compare_growth(goes: Sequence[Go], shorter: int, longer: int, within_bytes: float) -> bool:
    """From one length to the next in the same round, by its median: PSS scatters by more than `within_bytes`.

    Ready decides; what a load leaves in the host's allocators is printed.
    """
    steps = [
        (before, after)
        for go in goes
        for before in paired(go, shorter)
        for after in paired(go, longer)
        if before.cold.round == after.cold.round and all(each.memory.measured for each in (*before, *after))
    ]
    if not steps:
        print(f"memory, {shorter} to {longer}: no round has read both")
        return False
    apart = {}
    for name, column in MEMORY.items():
        ways = [_memory(pairs, column) for pairs in zip(*steps, strict=True)]
        cold, warm = (
            statistics.median(b - a for a, b in zip(ways[0][way], ways[1][way], strict=True)) for way in range(2)
        )
        apart[name] = warm - cold
        print(
            f"memory, {name}, {shorter} to {longer}: {cold / MIB:+.1f} MiB cold, {warm / MIB:+.1f} MiB warm (medians "
            f"of {len(steps)}), warm minus cold {apart[name] / MIB:+.1f} MiB"
        )
    return abs(apart["ready"]) <= within_bytes


@dataclass(frozen=True, slots=True)
class Ratio:
    """Warm over cold at one level, in natural logarithms of servers' means."""

    apart: float
    margin: float
    """By which chance alone exceeds `apart`, either way, with probability `TAIL`."""
    df: int
    """Servers less groups; a group is what one go started one way."""
    variances: float
    """Of warm servers / of cold ones."""
    chance: float
    """Equal variances have a ratio above this, or below its inverse, with probability `TAIL`, all ratios together."""

    @property
    def scatters_alike(self) -> bool:
        """Whether the two ways' variances are not shown to differ."""
        return 1 / self.chance <= self.variances <= self.chance

    def is_within(self, bound: float) -> bool:
        """Whether two one-sided t-tests (TOST, Schuirmann 1987) show that the two ways differ by less than `bound`."""
        return abs(self.apart) + self.margin <= bound


def ratio(cells: Sequence[tuple[Sequence[float], Sequence[float]]], ratios: int = 1) -> Ratio | None:
    """Return warm over cold from `cells`: of each go the cold servers' means and the warm ones', one each a round.

    The noise is that of servers about their group's mean: what the machines of two goes differ by is in none. None
    where no go has two rounds. `ratios`: how many are looked at together.
    """
    noise = pooled_noise(way for cell in cells for way in cell)
    cold, warm = (pooled_noise(cell[way] for cell in cells) for way in range(2))
    if noise is None or cold is None or warm is None:
        return None
    logs = [math.log(b / a) for cell in cells for a, b in zip(*cell, strict=True)]
    variances = (warm.sd / cold.sd) ** 2 if cold.sd else math.inf if warm.sd else 1.0
    return Ratio(
        math.fsum(logs) / len(logs), noise.margin(2 / len(logs), TAIL), noise.df, variances,
        variance_ratio_limit(cold.df, TAIL / 2 / ratios),
    )  # fmt: skip


def variance_ratio_limit(df: int, tail: float) -> float:
    """Return what the ratio of two estimates of one variance, each with `df`, exceeds with probability `tail`.

    With equal degrees of freedom F is a function of Student's t: t = sqrt(df) / 2 * (sqrt(F) - 1 / sqrt(F)) (Cacoullos,
    Journal of the American Statistical Association 60, 1965).
    """
    half = t_quantile(1 - tail, df) / math.sqrt(df)
    return (half + math.sqrt(1 + half**2)) ** 2


def repeat_sd(own: Spread, every: Sequence[Spread]) -> float | None:
    """Return what one repeat scatters by at the level that `own`, one of `every`, is the spread of (of logarithms).

    Of all levels together where they scatter alike; else its own, so that a noisy level lends a quiet one nothing.
    """
    noise = pooled(every if scatter_alike(every) else [own])
    return noise.sd if noise else None


def margin(scatter: float) -> float:
    """Return by how much the two ways may be apart where one cold repeat scatters by that (both of logarithms)."""
    return min(scatter, math.log1p(MOST_MARGIN))


def _compare_levels(setting: Setting, goes: Sequence[Sequence[Pair]], within: float, seats: int | None) -> bool:
    """Each level and metric must be equivalent within one cold repeat's scatter, `MOST_MARGIN` at the most, and the two
    ways scatter alike.

    `seats`: how many requests the servers say they run at once; the name of a level above it says that others waited.
    """
    known = [level for level in setting.levels if _all_measured(level, setting.repeats, goes)]
    equivalent = [len(known) == len(setting.levels)]
    for metric, column in METRICS.items():
        print(f"{metric}: warm / cold with 90 % interval, from {sum(map(len, goes))} rounds in {len(goes)} goes")
        spreads = [_spread_on_one_server(level, column, goes, setting.side_by_side) for level in known]
        for level, own in zip(known, spreads, strict=True):
            cells = [_means(level, column, pairs) for pairs in goes]
            found, scatter = ratio(cells, len(known) * len(METRICS)), repeat_sd(own, spreads)
            if found is None or scatter is None:
                print(f"  {_name(level, seats)}: one round, or one repeat a server, tells nothing of noise")
                equivalent.append(False)
                continue
            equivalent.append(found.is_within(margin(scatter)) and found.scatters_alike)
            print(f"  {_name(level, seats)}: {_words(found, scatter, within)}")
    for level in known:
        print(f"at {level} in flight {_busy(level, [pair for pairs in goes for pair in pairs])}")
    return all(equivalent)


def _busy(level: int, pairs: Sequence[Pair]) -> str:
    """What the servers' processes did beside, to tell where a difference comes from; decides nothing."""
    rows = [
        [row for each in way for row in each.levels if row.concurrency == level] for way in zip(*pairs, strict=True)
    ]
    seen = {name: [[x for row in way if (x := getattr(row, name)) is not None] for way in rows] for name in BESIDE}
    told = [BESIDE[name].format(*map(statistics.median, ways)) for name, ways in seen.items() if all(ways)]
    return f"cold and warm servers had {', '.join(told)} (medians)" if told else "what servers did was not looked at"


def _name(level: int, seats: int | None) -> str:
    return f"{level:3}" if seats is None or level <= seats else f"{level} in flight, at most {seats} running"


def _all_measured(level: int, repeats: int, goes: Sequence[Sequence[Pair]]) -> bool:
    servers = [each for pairs in goes for pair in pairs for each in pair]
    if few := sum(sum(row.concurrency == level for row in each.levels) != repeats for each in servers):
        print(f"concurrency {level}: NOT compared, {few} of {len(servers)} servers did not have it {repeats} times")
        return False
    rows = [row for each in servers for row in each.levels if row.concurrency == level]
    missing = Counter(row.status for row in rows if not row.measured)
    if missing:
        print(f"concurrency {level}: NOT compared, {_counted(missing)} of {len(rows)} repeats are no measurement")
    return not missing


def _spread_on_one_server(level: int, column: str, goes: Sequence[Sequence[Pair]], side_by_side: bool) -> Spread:
    """Of a level's repeats on a cold server about its mean, over all cold servers.

    `side_by_side`: about the mean of the turn, too, which all servers share; what a machine does from turn to turn is
    not in the comparison of the two ways, so it must not be in what they are held against.
    """
    about = _about_turns if side_by_side else _about_servers
    found = [each for pairs in goes for each in about(level, column, pairs)]
    return Spread(math.fsum(each.squares for each in found), sum(each.df for each in found))


def _about_servers(level: int, column: str, pairs: Sequence[Pair]) -> list[Spread]:
    return [spread(_repeats(level, column, pair.cold)) for pair in pairs]


def _about_turns(level: int, column: str, pairs: Sequence[Pair]) -> list[Spread]:
    """A turn's mean is of these n servers, and takes 1/n of the squares away where both ways scatter alike. That is
    made good; degrees of freedom, of which it takes as large a part, are left as they are."""
    every = [_repeats(level, column, each) for pair in pairs for each in pair]
    turns = [math.exp(mean_log(turn)) for turn in zip(*every, strict=True)]
    cold = [[v / turn for v, turn in zip(its, turns, strict=True)] for its in every[::2]]
    share = 1 - 1 / len(every)
    return [Spread(each.squares / share, each.df) for each in map(spread, cold)]


def _means(level: int, column: str, pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """Geometric, of each server's repeats: what servers differ by is told by servers, however often each is asked."""
    cold, warm = (
        [math.exp(mean_log(_repeats(level, column, each))) for each in way] for way in zip(*pairs, strict=True)
    )
    return cold, warm


def _repeats(level: int, column: str, server: Server) -> list[float]:
    return [getattr(row, column) for row in server.levels if row.concurrency == level]


def _words(found: Ratio, scatter: float, within: float) -> str:
    low, high = math.exp(found.apart - found.margin), math.exp(found.apart + found.margin)
    alike = "" if found.scatters_alike else ", which is more: NOT alike"
    return (
        f"{math.exp(found.apart):.3f}, {low:.3f} to {high:.3f} ({found.df} degrees of freedom); "
        f"one cold repeat scatters by {scatter:.1%}: {_shown(found.is_within(margin(scatter)))} within "
        f"{'that' if margin(scatter) == scatter else f'{MOST_MARGIN:.0%}'}; "
        f"within {within:.1%}: {_shown(found.is_within(math.log1p(within)))}; "
        f"variance warm / cold {found.variances:.2f}, by chance {1 / found.chance:.2f} to {found.chance:.2f}{alike}"
    )


def _shown(equivalent: bool) -> str:
    return "equivalent" if equivalent else "NOT shown to be equivalent"


def _counted(statuses: Iterable[str] | Counter[str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(Counter(statuses).items()))
