"""`python -m tests.chaos --seed N --faults K [--nodes]`: trials of seeds N, N+1, … until K faults were done.

One trial is replayed by its seed and `--faults 1`. Exit 1 where the oracle has found something.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.place import chaos_place
from tests.chaos.schedule import Where, trial
from tests.chaos.trial import carry_out


def main() -> int:
    """Run the trials; say what each came to and the sums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--nodes", action="store_true", help="on a cluster of three nodes, not a private Ray for each")
    parser.add_argument("--say", action="store_true", help="show what the runs said, also where nothing was found")
    asked = parser.parse_args()
    kinds: Counter[str] = Counter()
    not_tried: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    trials = found = resumed = 0
    began = time.monotonic()
    where = Where.NODES if asked.nodes else Where.PRIVATE
    with chaos_place(where) as place:
        while kinds.total() < asked.faults:
            with tempfile.TemporaryDirectory(prefix="vco-", dir="/tmp") as outputs:
                report = carry_out(trial(asked.seed + trials, where), place, Path(outputs))
            trials += 1
            kinds.update(fault.name for fault in report.done)
            not_tried.update(report.not_tried)
            ends.update(report.statuses)
            found += len(report.findings)
            resumed += report.resumed
            print(report, flush=True)
            if report.findings or asked.say:
                print(report.said, flush=True)
    print(f"{kinds.total()} faults in {trials} runs, {resumed} gone on with, {time.monotonic() - began:.0f} s")
    for kind, count in [*kinds.most_common(), *((f"not tried: {kind}", n) for kind, n in not_tried.most_common())]:
        print(f"{count:4} {kind}")
    print(f"points: {dict(ends)}; found: {found}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
