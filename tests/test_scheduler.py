"""The queue: order, backfill, retries, and the promise that no node is ever given more than it has."""

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.causes import SESSION_STARTS, Again
from orchestrator import scheduler
from orchestrator.scheduler import Job, Queue, makespan_s, ordered, place, placed_first


def test_large_jobs_start_first_then_long_ones() -> None:
    jobs = [Job("short", 1, 1), Job("long", 1, 9), Job("wide", 4, 2)]
    assert [job.id for job in ordered(jobs)] == ["wide", "long", "short"]


def test_small_job_waits_when_it_would_delay_the_head() -> None:
    head, small = Job("head", 4, 10), Job("small", 1, 50)
    placed = place([head, small], {"a": 2}, [(5.0, "a", 2)], now=0.0)
    assert placed == []


def test_small_job_is_backfilled_when_it_ends_before_the_head_can_start() -> None:
    head, small = Job("head", 4, 10), Job("small", 1, 3)
    assert place([head, small], {"a": 2}, [(5.0, "a", 2)], now=0.0) == [(small, "a")]


def test_what_starts_at_once_fills_few_nodes_and_the_rest_is_placed_later() -> None:
    sixteen = {f"n{number}": 8 for number in range(16)}
    assert placed_first([Job("one", 1, 60.0)], sixteen) == {"one": "n0"}
    ten = placed_first([Job(str(number), 1, 60.0) for number in range(10)], sixteen)
    assert (len(ten), set(ten.values())) == (10, {"n0", "n1"})
    assert placed_first([Job("a", 1, 9.0), Job("b", 1, 60.0)], {"n": 1}) == {"b": "n"}


def test_of_one_key_one_server_compiles_and_the_room_goes_to_others_meanwhile() -> None:
    first, second, other = Job("first", 1, 9, compiles="k"), Job("second", 1, 8, compiles="k"), Job("other", 1, 7)
    assert place([first, second, other], {"a": 2}, [], now=0.0) == [(first, "a"), (other, "a")]


def test_a_key_is_compiled_on_every_node_once() -> None:
    jobs = [Job(str(n), 1, 9, compiles="k") for n in range(4)]
    assert place(jobs, {"a": 2, "b": 2}, [], now=0.0) == [(jobs[0], "a"), (jobs[1], "b")]
    assert place(jobs, {"a": 2}, [], now=0.0, compiling={("a", "other")}) == [(jobs[0], "a")]
    assert place(jobs, {"a": 2}, [], now=0.0, compiling={("a", "k")}) == []


def test_a_job_that_waits_for_a_compilation_holds_no_room_that_a_longer_one_can_use() -> None:
    second, longer = Job("second", 1, 5, compiles="k"), Job("longer", 1, 50)
    placed = place([second, longer], {"a": 1}, [(1.0, "a", 1)], now=0.0, compiling={("a", "k")})
    assert placed == [(longer, "a")]


def test_estimates_wait_for_no_compilation() -> None:
    assert makespan_s([Job(str(n), 1, 20, compiles="k") for n in range(4)], {"a": 4}) == 20


async def test_a_job_starts_beside_one_of_its_key_once_that_is_ready() -> None:
    queue, said = Queue({"a": 2}), list[str]()
    first_up, second_began = asyncio.Event(), asyncio.Event()

    async def execute(job: Job, node: str) -> Again:
        said.append(f"{job.id} begins")
        if job.id == "first":
            await first_up.wait()
            said.append("first is up")
            queue.ready(job.id)
            await second_began.wait()  # it measures on
        else:
            second_began.set()
        return Again.NEVER

    jobs = [Job("first", 1, 9, compiles="k"), Job("second", 1, 8, compiles="k")]
    running = asyncio.ensure_future(queue.run(jobs, execute))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not queue.drained
    first_up.set()
    assert await asyncio.wait_for(running, 20) == []
    assert said == ["first begins", "first is up", "second begins"]


@pytest.mark.parametrize("again", [Again.NEVER, Again.FRESH_SERVER])
async def test_a_job_does_not_wait_for_a_server_that_never_came_up(again: Again) -> None:
    began: list[str] = []

    async def execute(job: Job, node: str) -> Again:
        began.append(job.id)
        return again if job.id == "first" and began.count("first") == 1 else Again.NEVER

    jobs = [Job("first", 1, 9, compiles="k"), Job("second", 1, 8, compiles="k")]
    assert await asyncio.wait_for(Queue({"a": 2}).run(jobs, execute), 20) == []
    assert sorted(set(began)) == ["first", "second"]


def test_twelve_equal_jobs_on_four_slots_take_three_rounds() -> None:
    assert makespan_s([Job(str(i), 1, 20) for i in range(12)], {"a": 4}) == 60


async def test_retry_goes_to_another_node_and_ends() -> None:
    seen: list[tuple[str, int]] = []

    async def execute(job: Job, node: str) -> Again:
        seen.append((node, job.attempt))
        return Again.OTHER_NODE if len(seen) < 3 else Again.NEVER

    await Queue({"a": 1, "b": 1}).run([Job("x", 1, 1)], execute)
    assert [attempt for _, attempt in seen] == [1, 2, 3]
    assert seen[0][0] != seen[1][0]


async def test_a_large_job_is_tried_again_on_the_only_node_that_holds_it() -> None:
    seen: list[str] = []

    async def execute(job: Job, node: str) -> Again:
        seen.append(node)
        return Again.OTHER_NODE if len(seen) < 2 else Again.NEVER

    await Queue({"a": 4, "b": 1}).run([Job("x", 4, 1)], execute)
    assert seen == ["a", "a"]


async def test_a_job_that_fits_nowhere_is_handed_back_not_waited_for() -> None:
    async def execute(job: Job, node: str) -> Again:
        return Again.NEVER

    large, small = Job("x", 2, 1), Job("y", 1, 1)
    assert await Queue({"a": 1}).run([large, small], execute) == [large]


async def test_a_lost_node_gets_nothing_more_not_even_what_it_alone_has_room_for() -> None:
    queue, seen = Queue({"a": 2, "b": 1}), list[tuple[str, str]]()

    async def execute(job: Job, node: str) -> Again:
        seen.append((job.id, node))
        if node == "a":
            queue.lose("a")
            return Again.OTHER_NODE
        return Again.NEVER

    left = await queue.run([Job("wide", 2, 9), Job("x", 1, 5), Job("y", 1, 5)], execute)
    assert [job.id for job in left] == ["wide"]
    assert seen == [("wide", "a"), ("x", "b"), ("y", "b")]


async def test_a_job_whose_last_other_node_is_lost_goes_back_to_where_it_failed() -> None:
    queue, seen = Queue({"a": 1, "b": 1}), list[tuple[str, str]]()

    async def execute(job: Job, node: str) -> Again:
        seen.append((job.id, node))
        if job.id == "long":
            queue.lose(node)
            return Again.NEVER
        return Again.OTHER_NODE if job.attempt == 1 else Again.NEVER

    assert await queue.run([Job("long", 1, 9), Job("x", 1, 5)], execute) == []
    assert [job for job, _ in seen] == ["long", "x", "x"]
    assert seen[1][1] == seen[2][1]


@dataclass
class Cards:
    """Of nodes with so many each, given out as Ray does: the lowest free one first. Those of `sick` fail their jobs;
    one that is kept back stays taken until it is let go."""

    number: int
    sick: set[int]
    """Numbered through all nodes."""
    nodes: str = "a"
    lasts: bool = False
    taken: set[int] = field(default_factory=set)
    runs: list[tuple[str, int]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Jobs that have had all their starts."""
    queue: Queue = field(init=False)

    def __post_init__(self) -> None:
        self.queue = Queue(dict.fromkeys(self.nodes, self.number))

    async def execute(self, job: Job, node: str) -> Again:
        first = self.nodes.index(node) * self.number
        card = min(set(range(first, first + self.number)) - self.taken)
        self.taken.add(card)
        self.runs.append((job.id, card))
        for _ in range(3 if card in self.sick else 40):
            await asyncio.sleep(0)
        if card not in self.sick:
            self.taken.remove(card)
            return Again.NEVER
        if not self.queue.keep_back(job.id, lambda: self.taken.remove(card), self.lasts):
            self.taken.remove(card)
        if job.attempt < SESSION_STARTS:
            return Again.OTHER_CARD
        self.lost.append(job.id)
        return Again.NEVER

    def on_good_cards(self) -> list[str]:
        return sorted(job for job, card in self.runs if card not in self.sick)


@pytest.mark.parametrize("lasts", [True, False])
@pytest.mark.parametrize(
    ("nodes", "number", "jobs"),
    [("a", 2, 1), ("a", 2, 8), ("a", 4, 3), ("a", 8, 60), ("ab", 1, 9), ("abcd", 8, 60)],
)
async def test_a_sick_card_fails_one_start_and_no_job(nodes: str, number: int, jobs: int, lasts: bool) -> None:
    cards, names = Cards(number, {0}, nodes, lasts), [f"job{n:02}" for n in range(jobs)]
    assert await cards.queue.run([Job(name, 1, 10) for name in names], cards.execute) == []
    assert cards.on_good_cards() == names
    assert [card for _, card in cards.runs].count(0) == 1
    assert cards.queue.free == dict.fromkeys(nodes, number)
    assert cards.taken == set()


@given(st.integers(2, 8), st.integers(1, 3), st.data())
def test_no_job_is_lost_to_cards_that_are_lost(number: int, nodes: int, data: st.DataObject) -> None:
    every = range(number * nodes)
    sick = data.draw(st.sets(st.sampled_from(every), max_size=len(every) - 1))
    cards, names = Cards(number, sick, "abc"[:nodes], lasts=True), [f"job{n:02}" for n in range(40)]
    assert asyncio.run(cards.queue.run([Job(name, 1, 10) for name in names], cards.execute)) == []
    if len(sick) < SESSION_STARTS:  # else the first to start may meet one at each of theirs
        assert (cards.on_good_cards(), cards.lost) == (names, [])
    assert all([card for _, card in cards.runs].count(each) <= 1 for each in sick)
    assert cards.queue.free == dict.fromkeys("abc"[:nodes], number)


async def test_where_every_card_is_filled_each_job_has_its_starts_and_the_queue_ends() -> None:
    cards = Cards(2, {0, 1})
    assert await cards.queue.run([Job(name, 1, 10) for name in "abc"], cards.execute) == []
    assert sorted(job for job, _ in cards.runs) == sorted("abc" * SESSION_STARTS)
    assert cards.queue.free == {"a": 2}


async def test_a_job_that_needs_the_card_that_is_kept_back_gets_it_when_nothing_else_runs() -> None:
    cards = Cards(2, {0})

    async def execute(job: Job, node: str) -> Again:
        if job.id != "wide":
            return await cards.execute(job, node)
        cards.runs.append((job.id, -1))
        return Again.NEVER

    queue_jobs = [Job("narrow", 1, 10), Job("wide", 2, 5, rank=1)]
    assert await cards.queue.run(queue_jobs, execute) == []
    assert [job for job, _ in cards.runs] == ["narrow", "narrow", "wide"]
    assert cards.queue.free == {"a": 2}


@pytest.mark.parametrize("lasts", [True, False])
async def test_a_card_is_tried_again_after_a_while_but_one_that_is_lost(
    monkeypatch: pytest.MonkeyPatch, lasts: bool
) -> None:
    monkeypatch.setattr(scheduler, "KEPT_BACK_S", -1.0)
    cards, names = Cards(2, {0}, lasts=lasts), [f"job{n}" for n in range(4)]
    assert await cards.queue.run([Job(name, 1, 10) for name in names], cards.execute) == []
    assert ([card for _, card in cards.runs].count(0) == 1) is lasts


def test_a_lower_rank_starts_first_whatever_its_size() -> None:
    jobs = [Job("wide", 4, 9, rank=1), Job("narrow", 1, 1)]
    assert [job.id for job in ordered(jobs)] == ["narrow", "wide"]


async def test_cancelling_waits_for_running_jobs() -> None:
    ended: list[str] = []

    async def execute(job: Job, node: str) -> Again:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append(job.id)
        return Again.NEVER

    task = asyncio.ensure_future(Queue({"a": 2}).run([Job("x", 1, 1), Job("y", 1, 1)], execute))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == ["x", "y"]


job_lists = st.lists(
    st.tuples(st.integers(1, 4), st.floats(0.1, 20), st.sampled_from([None, "k", "l"])), min_size=1, max_size=30
)


@given(job_lists, st.integers(1, 3))
def test_no_node_is_overbooked_and_every_job_runs_once(sizes: list[tuple[int, float, str | None]], nodes: int) -> None:
    free = {f"n{i}": 4 for i in range(nodes)}
    in_use = dict.fromkeys(free, 0)
    ran: list[str] = []
    queue, compiling = Queue(dict(free)), set[tuple[str, str]]()

    async def execute(job: Job, node: str) -> Again:
        in_use[node] += job.slots
        assert in_use[node] <= 4
        if job.compiles is not None:
            assert (node, job.compiles) not in compiling
            compiling.add((node, job.compiles))
        await asyncio.sleep(0)
        if job.compiles is not None:
            compiling.remove((node, job.compiles))
        queue.ready(job.id)
        await asyncio.sleep(0)
        in_use[node] -= job.slots
        ran.append(job.id)
        return Again.NEVER

    jobs = [Job(str(i), slots, seconds, compiles=key) for i, (slots, seconds, key) in enumerate(sizes)]
    asyncio.run(queue.run(jobs, execute))
    assert sorted(ran) == sorted(job.id for job in jobs)
    total = sum(job.slots * job.estimate_s for job in jobs)
    lower = max(total / (4 * nodes), max(job.estimate_s for job in jobs))
    assert lower - 1e-6 <= makespan_s(jobs, free) <= 4 * lower + 1e-6
