"""`python -m tests.chaos.real [--victims driver server engine_core] [OVERRIDE ...]`: kill -9 in a sweep on real vLLM.

One undisturbed run of a short sweep, then the same for each victim: it is killed while a level computes and a point is
done, what is left is looked for, and the run is gone on with. Overrides are Hydra's, of one concurrency sweep on this
host. Prints Markdown; exit 1 where something was lost, doubled or left, or a run is not like the undisturbed one.
"""

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

from tests.chaos.killed import Cards, Report, Victim, killed, shown, undisturbed

SWEEP = (
    "+sweep=concurrency", "model=tiny", "sweep.concurrency=[1,2,4]", "server.max_model_len=1024", "controls=off",
    "load.requests_min=128", "load.requests_per_level=1", "load.output_tokens=16",
)  # fmt: skip
"""Without controls, whose number follows from how long levels take."""
HEADING = """\
| killed | the run itself | server gone, s after the kill | nothing left, s after the run's end | GPU memory at its \
baseline, s after the kill | measured after resume | like the undisturbed run |
|---|---|---|---|---|---|---|"""


def main() -> int:
    """Run it all; return the exit code."""
    victims, overrides = _arguments()
    given = {_key(override) for override in overrides}
    asked = [*(each for each in SWEEP if _key(each) not in given), *overrides]
    cards = Cards()
    reports: list[Report] = []
    print(f"python -m orchestrator {' '.join(asked)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="vco-", dir="/tmp") as made:
        reports.append(_told(undisturbed(asked, _room(made, "nobody"))))
        if (shape := reports[0].shape) is not None:
            reports += [_told(killed(victim, asked, _room(made, victim), cards, shape)) for victim in victims]
    load = os.getloadavg()[0]
    print(f"\n{os.cpu_count()} cores, load average {load:.1f} at the end, Python {platform.python_version()}")
    print("\n".join(["", HEADING, *(_row(report, cards.used_bytes() is not None) for report in reports)]))
    return 1 if any(report.findings or report.unlike for report in reports) else 0


def _arguments() -> tuple[list[Victim], list[str]]:
    """The victims, and the overrides, also those that follow `--victims`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--victims", nargs="+", default=list(Victim), metavar="|".join(Victim))
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    asked = parser.parse_args()
    words = [*asked.victims, *asked.overrides]
    try:
        return [Victim(word) for word in words if "=" not in word], [word for word in words if "=" in word]
    except ValueError as error:
        parser.error(str(error))


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _room(made: str, name: str) -> Path:
    room = Path(made) / name
    room.mkdir()
    return room


def _told(report: Report) -> Report:
    """Say at once what came of a run: the next ones take minutes."""
    wrong = [*report.findings, *(f"unlike the undisturbed run: {line}" for line in report.unlike)]
    print(f"{report.victim or 'nobody'} killed: {report.at_kill or 'a whole run'}", flush=True)
    if wrong:
        print("\n".join([*(f"  FOUND {line}" for line in wrong), report.said]), flush=True)
    return report


def _row(report: Report, has_cards: bool) -> str:
    many = f"{report.starts} start{'s' if report.starts != 1 else ''} of the server"
    what = ", ".join(filter(None, (f"exit {report.exit_code}", many, report.how)))
    if report.victim is None:
        cells = ["nobody", what, "", "", "", report.points, ""]
    else:
        memory = shown(report.memory_back_s) if has_cards else "no GPU"
        cells = [report.victim, what, shown(report.server_gone_s), shown(report.nothing_left_s), memory]
        cells += [report.points, "no" if report.unlike or report.shape is None else "yes"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
