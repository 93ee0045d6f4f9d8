"""`python -m orchestrator`: reads the command line, plans, runs, reduces, and ends with the exit code that says how.

0 all points measured, or left out by the budget · 2 bad configuration, nothing started · 3 some points failed · 4 no or
too few GPUs, or no cluster · 130 interrupted. Imports Ray, pandas and the rest only once there is something to run.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import arguments, interrupts, output
from orchestrator.arguments import Arguments

if TYPE_CHECKING:
    from contract.specs import ModelSpec, SessionSpec
    from orchestrator.budget import Budget
    from orchestrator.cluster import Cluster
    from orchestrator.driver import Outcome
    from orchestrator.fleet import Fleet
    from orchestrator.plan import Plan
    from orchestrator.schema import Experiment
    from orchestrator.store import Store

OK, BAD_CONFIGURATION, SOME_FAILED, NO_ROOM, INTERRUPTED = 0, 2, 3, 4, 130


def main() -> int:
    """Entry of the program; returns the exit code."""
    try:
        interrupts.raise_on_all()
        return _main(arguments.read(sys.argv[1:]))
    except KeyboardInterrupt:
        interrupts.ignore()
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _main(asked: Arguments) -> int:
    experiments = _experiments(asked)
    if isinstance(experiments, int):
        return experiments
    from orchestrator.cluster import ClusterError
    from orchestrator.fleet import NoRoom
    from orchestrator.preflight import NotReady
    from orchestrator.problems import ConfigError
    from orchestrator.store import NotWritten

    try:
        return _run(experiments, asked)
    except ConfigError as error:
        return _refuse(error.problems, BAD_CONFIGURATION)
    except NotReady as error:
        return _refuse(error.problems, NO_ROOM)
    except (NoRoom, ClusterError) as error:
        return _refuse([str(error)], NO_ROOM)
    except NotWritten as error:  # before there was anything to lose
        return _refuse([str(error)], BAD_CONFIGURATION)


def _experiments(asked: Arguments) -> list[Experiment] | int:
    """The experiments of a command line, or of the run to go on with; an exit code where there is nothing to run."""
    from orchestrator.compose import compose
    from orchestrator.problems import ConfigError

    try:
        if asked.resume:
            return _resumed(asked)
        experiments = compose([*_default_model(asked), *asked.overrides], asked.flags)
    except SystemExit as end:  # Hydra has printed what was wrong
        return BAD_CONFIGURATION if end.code else OK
    except ConfigError as error:
        return _refuse(error.problems, BAD_CONFIGURATION)
    if not experiments and not asked.inspects:
        return _refuse(["Hydra composed nothing: a launcher that runs elsewhere cannot be used"], BAD_CONFIGURATION)
    return experiments or OK


def _resumed(asked: Arguments) -> list[Experiment]:
    """The experiments of the run, with what may be said anew, and those that the rest of the command line adds."""
    from orchestrator.compose import compose, parsed
    from orchestrator.problems import ConfigError
    from orchestrator.resume import changes_of, experiments_of
    from orchestrator.store import Store

    if asked.resume_strict not in ("true", "false"):
        raise ConfigError([f"resume.strict={asked.resume_strict}: should be true or false"])
    changes, others = changes_of(parsed(asked.overrides))
    more = [*others, *asked.flags]
    if more and asked.value_of("sweep") is None:
        nothing = f"resume={asked.resume}: {' '.join(more)} changes nothing of it"
        raise ConfigError([f"{nothing}; name a whole grid to add (+sweep=NAME ...)"])
    store = Store(Path(asked.resume or ""))
    store.manifest()  # before Hydra says anything
    store.refuse_links()
    further = compose([*_default_model(asked), *asked.overrides], asked.flags) if more else []
    return experiments_of(store, further, changes)


def _default_model(asked: Arguments) -> list[str]:
    """Without `model=`: the tutorial's model where there are GPUs, else the tiny one that the configuration names."""
    if asked.value_of("model") is not None or asked.value_of("engine.device") == "cpu":
        return []
    elsewhere = (asked.value_of("cluster") or asked.value_of("cluster.address") or "local") != "local"
    return ["model=phi-3-mini-4k"] if elsewhere or asked.value_of("engine") == "sim" or _gpus_here() else []


def _gpus_here() -> bool:
    from workers.devices.nvml import NoSuchCard, visible_cards

    try:
        return bool(visible_cards())
    except NoSuchCard:
        return True  # said in words when the fleet is looked at


def _run(experiments: list[Experiment], asked: Arguments) -> int:
    with contextlib.ExitStack() as until_end:
        return _carry_out(experiments, asked, until_end)


def _carry_out(experiments: list[Experiment], asked: Arguments, until_end: contextlib.ExitStack) -> int:
    from orchestrator import models
    from orchestrator.cluster import Cluster
    from orchestrator.driver import Outcome
    from orchestrator.fleet import local_fleet
    from orchestrator.preflight import check
    from orchestrator.resume import left_to_do
    from orchestrator.run_lock import held
    from orchestrator.store import Store, check_root, rebuild

    check(experiments)
    first = experiments[0]
    store = Store(Path(asked.resume)) if asked.resume else None
    root = check_root(store.directory, "resume") if store else check_root(first.output_root)
    resolved = models.resolve_all(experiments)
    experiments = [experiment for experiment, _ in resolved]
    local = local_fleet(first.cluster, first.engine) if first.cluster.address == "local" else None
    plan = _plan(resolved, local) if local is not None else None
    if store and not first.dry_run:
        until_end.enter_context(held(store.directory))
    if store and local:
        _compare(store, local, asked)
    if store and not first.dry_run:
        for path in store.discard_torn():
            print(f"WARNING  {path} was not whole and is set aside: what it held is not known any more")
    if plan and local:
        left = left_to_do(plan, store)
        _check_budget(left, first)
        if first.dry_run:
            return _show(plan, local, first)
    if plan and store and not left:
        print(f"nothing is left to do in {store.directory}")
        return _conclude(store, Outcome())
    try:
        with Cluster(first.cluster, local) as cluster:
            fleet = cluster.fleet(first.engine)
            if store and not local:
                _compare(store, fleet, asked)
            if plan is None:
                plan = _plan(resolved, fleet)
                left = left_to_do(plan, store)
                _check_budget(left, first)
            if first.dry_run:
                return _show(plan, fleet, first)
            _warm_up(cluster, fleet, left, _budget(first))
            _look_at_nodes(cluster, fleet, first, root, tuple(dict.fromkeys(model for _, model in resolved)))
            if store is None:
                store = Store.create(root, "+".join(dict.fromkeys(e.sweep.kind for e in experiments)))
                until_end.enter_context(held(store.directory))
            outcome = _measure(cluster, fleet, store, experiments, plan, left)
            cluster.hurried = outcome.interrupted
        return _conclude(store, outcome)
    except KeyboardInterrupt:  # at once: nothing else says where it is
        if store:
            print(f"what was measured is in {store.directory}; its artifacts: {rebuild(store)}")
            print(f"go on with: python -m orchestrator resume={store.directory}")
        raise


def _compare(store: Store, fleet: Fleet, asked: Arguments) -> None:
    """Stop where the run was made with something else; say so and go on with `resume.strict=false`."""
    from orchestrator.problems import ConfigError
    from orchestrator.resume import differences

    found = differences(store.manifest(), fleet)
    if found and asked.resume_strict == "true":
        way_out = "resume.strict=false measures what is left all the same; every row says what it was measured with"
        raise ConfigError([f"{store.directory} was made with something else", *found, way_out])
    for line in found:
        print(f"WARNING  {line}")


def _look_at_nodes(
    cluster: Cluster, fleet: Fleet, experiment: Experiment, root: Path, models: tuple[ModelSpec, ...]
) -> None:
    """Before the first server. What is no reason to stop is said."""
    from orchestrator.preflight import check_nodes
    from orchestrator.store import free_bytes

    cluster.remove_left(fleet)
    engine, shared = experiment.engine, experiment.cluster.shared_gpus
    if engine.name == "sim":
        models = tuple(replace(model, dummy_weights=True) for model in models)  # it loads none
    reports, held = cluster.reports(fleet, models), cluster.held_by_others(fleet)
    for line in check_nodes(fleet, reports, engine, shared, free_bytes(root), held):
        print(f"WARNING  {line}")
    if held:
        names = ", ".join(f"{gpus} on {reports[node].host}" for node, gpus in held.items())
        print(f"WARNING  other jobs hold GPUs: {names}; sessions wait for theirs while others of the run live there")


def _warm_up(cluster: Cluster, fleet: Fleet, sessions: list[SessionSpec], budget: Budget) -> None:
    """As soon as the fleet and what is left to do are known: an import takes as long as a cold start, and nodes can be
    looked at and the run directory made meanwhile. On the nodes that the queue places servers on at once."""
    from contract.specs import Start
    from orchestrator.budget import jobs
    from orchestrator.scheduler import placed_first
    from workers.engines import make_engine

    warm = [each for each in sessions if each.start is Start.WARM and make_engine(each.engine).warm_modules]
    if warm:
        at = placed_first(jobs(sessions, budget), {node.id: node.slots for node in fleet.nodes})
        first = {at[each.id]: each for each in reversed(warm) if each.id in at}
        cluster.warm_up(fleet, first)


def _plan(resolved: list[tuple[Experiment, ModelSpec]], fleet: Fleet) -> Plan:
    from orchestrator.plan import make_plan

    return make_plan(resolved, fleet)


def _check_budget(sessions: list[SessionSpec], experiment: Experiment) -> None:
    from orchestrator.problems import ConfigError

    problems = _budget(experiment).problems(sessions)
    if problems:
        raise ConfigError(problems)


def _budget(experiment: Experiment) -> Budget:
    from orchestrator.budget import Budget

    return Budget(**experiment.budget.model_dump())


def _show(plan: Plan, fleet: Fleet, experiment: Experiment) -> int:
    from orchestrator.preview import describe

    print(describe(plan, fleet, _budget(experiment)))
    return OK


def _measure(
    cluster: Cluster, fleet: Fleet, store: Store, experiments: list[Experiment], plan: Plan, sessions: list[SessionSpec]
) -> Outcome:
    """Measure what is left of the plan. Raises `NotWritten` where a new run cannot even begin."""
    from orchestrator.driver import Driver, Outcome
    from orchestrator.manifest import make_manifest, server_entry
    from orchestrator.plan import searched_points
    from orchestrator.preview import budget_words, estimate_s, points_words
    from orchestrator.progress import Progress
    from orchestrator.store import NotWritten, rebuild

    earlier = store.made_so_far()
    manifest = make_manifest(store.directory.name, experiments, plan, fleet) | earlier
    try:
        store.put_manifest(manifest)
    except NotWritten as error:
        if not earlier:
            raise
        return Outcome(not_written=str(error))
    seconds = estimate_s(sessions, fleet)
    progress = Progress(sum(len(session.points) for session in sessions), seconds)
    try:
        searched = sum(searched_points(plan, session) for session in sessions)
        points = points_words(progress.total_points, searched)
        progress.say(f"{len(sessions)} servers, {points}, about {seconds / 60:.0f} min")
        progress.say(f"on {fleet.describe()}; results in {store.directory}")
        budget = _budget(experiments[0])
        for line in budget_words(sessions, fleet, budget):
            progress.say(line)
        outcome = Driver(cluster, fleet, store, progress, budget).run(sessions, plan.searches, plan.controls)
        manifest["servers"] += [server_entry(row) for row in outcome.servers]
        manifest["status"] = _status(outcome)
        try:
            store.put_manifest(manifest)
        except NotWritten as error:
            outcome.not_written = outcome.not_written or str(error)
        if outcome.interrupted:  # whoever is killed while it reduces has said how to
            progress.say(f"what was measured is in its shards; its artifacts: {rebuild(store)}")
    finally:
        progress.close()  # who reads it may not go on
    return outcome


def _status(outcome: Outcome) -> str:
    if outcome.interrupted:
        return "interrupted"
    if outcome.not_written:
        return "ended early"
    return "failed points" if outcome.failed else "budget used up" if outcome.left_out else "complete"


def _conclude(store: Store, outcome: Outcome) -> int:
    import analysis
    from analysis.pages.answer import answer

    reduced = True
    try:
        written = analysis.reduce(store.directory)
        print(answer(store.directory))
        print("\n".join(f"  {path}" for path in written))
    except (analysis.AnalysisError, ValueError, OSError) as error:
        reduced = False
        print(f"no artifacts: {error}\nwhat was measured is in {store.directory}; python -m analysis rebuilds from it")
    if outcome.failed:
        print(f"{len(outcome.failed)} point(s) failed:\n" + "\n".join(f"  {line}" for line in outcome.failed))
    if outcome.left_out:
        left = f"{outcome.left_out} point(s) left out: the budget had no room for them"
        print(f"{left}; go on with: python -m orchestrator resume={store.directory}")
    if outcome.not_written:
        print(f"ended early: {outcome.not_written}; go on with: python -m orchestrator resume={store.directory}")
        return SOME_FAILED
    if outcome.interrupted:
        print(f"interrupted; go on with: python -m orchestrator resume={store.directory}")
        return INTERRUPTED
    return SOME_FAILED if outcome.failed or not reduced else OK


def _refuse(problems: list[str], code: int) -> int:
    heading = "configuration refused" if code == BAD_CONFIGURATION else "cannot run"
    print(f"{heading}:\n" + "\n".join(f"  {problem}" for problem in problems), file=sys.stderr)
    return code


if __name__ == "__main__":
    output.outlives_its_reader()
    sys.exit(main())
