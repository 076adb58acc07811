"""Break runs in every way there is, and compare what is left with the unbroken run: `python -m benchmarks.faults`.

Every fault has to end in the numbers of the unbroken run, bit for bit, or in one message and exit status 2. The exit
status of the campaign is 1 when one did not.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM

from benchmarks.faults import arithmetic, cases, nodes
from benchmarks.faults.bench import LAYOUTS, Bench, NotTried, Outcome
from benchmarks.faults.disk import LIMITS, disk_full
from benchmarks.faults.kills import outcome_of
from benchmarks.faults.lives import warm_up
from benchmarks.faults.table import markdown
from benchmarks.record import keep

Case = partial[Outcome]
SMALL_KILLS, KILLS = 12, 200


def single_faults(bench: Bench, ranks: list[int], *, small: bool) -> list[Case]:
    """All faults but the kills; small: few of them, and none that has to start torchrun."""
    several = [size for size in ranks if size > 1]
    some: list[Case] = [partial(cases.stopped, bench, size, SIGTERM) for size in ranks]
    some += [partial(cases.stopped, bench, 1, SIGINT)]
    some += [partial(cases.damaged, bench, 1, kind, every_file=not small) for kind in cases.DAMAGE]
    some += [partial(case, bench, 1) for case in (cases.all_damaged, cases.torn_rows, cases.other_text)]
    some += [partial(cases.taken_folder, bench, 1)]
    wrong = (arithmetic.nan, arithmetic.gradient_spike, arithmetic.loss_spike)
    some += [partial(fault, bench, size) for fault in wrong for size in (ranks[:1] if small else ranks[:2])]
    some += [partial(cases.stalled_rank, bench, size) for size in several[:1]]
    some += [partial(disk_full, bench, 1, when) for when in list(LIMITS)[:1] * small or LIMITS]
    if small:
        return some
    some += [partial(cases.damaged, bench, size, kind, every_file=False) for kind in cases.DAMAGE for size in several]
    some += [partial(disk_full, bench, size, "in the middle of a save") for size in several]
    some += [partial(cases.other_code, bench, 1)]
    some += [partial(cases.stopped_torchrun, bench, size) for size in several]
    some += [partial(case, bench) for case in (nodes.lost_rank_of_a_node, nodes.lost_node) if several]
    return some + [partial(cases.lost_rank, bench, size, restarts) for restarts in (0, 3) for size in several]


def kills(bench: Bench, ranks: list[int], count: int) -> list[Case]:
    """SIGKILL, as many times, shared out among numbers of ranks and their layouts."""
    kinds = [(size, layout) for size in ranks for layout in LAYOUTS[size]]
    shares = [count * (place + 1) // len(kinds) - count * place // len(kinds) for place in range(len(kinds))]
    return [partial(outcome_of, bench, *kind, share) for kind, share in zip(kinds, shares, strict=True) if share]


def campaign(todo: list[Case]) -> list[Outcome]:
    """Go through all of them, and tell each as it ends."""
    outcomes = []
    for case in todo:
        begin = time.monotonic()
        try:
            outcome = case()
        except NotTried as lacking:
            outcome = Outcome(_name(case), 1, 0, f"not tried: this machine lacks {lacking}")
        outcome.seconds = time.monotonic() - begin
        outcomes.append(outcome)
        verdict = "ok" if outcome.is_good else "FAILED"
        print(
            f"{verdict}: {outcome.fault}, {outcome.ranks} ranks, {outcome.seconds:.1f} s: {outcome.ended}", flush=True
        )
        for problem in outcome.problems[:5]:
            print(f"  {problem}", flush=True)
    return outcomes


def _name(case: Case) -> str:
    return case.func.__name__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help=f"how often SIGKILL is sent; {KILLS}, small: {SMALL_KILLS}")
    parser.add_argument("--ranks", default="1,2,4", help="over so many ranks: of 1, 2 and 4")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the bytes that are damaged")
    parser.add_argument("--only", default="", help="of the single faults, those whose function has this in its name")
    parser.add_argument("--small", action="store_true", help="a few of each, in about a minute")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/faults.json")
    arguments = parser.parse_args()
    ranks = [int(size) for size in arguments.ranks.split(",")]
    count = arguments.kills if arguments.kills is not None else SMALL_KILLS if arguments.small else KILLS
    print(f"seed {arguments.seed}, {count} kills", flush=True)
    warm_up()
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        bench = Bench(Path(folder), arguments.seed)
        singles = single_faults(bench, ranks, small=arguments.small)
        singles = [case for case in singles if arguments.only in _name(case)]
        outcomes = campaign(kills(bench, ranks, count) + singles)
    print(markdown(outcomes))
    if arguments.keep:
        print(keep("faults", [{**vars(outcome), "is_good": outcome.is_good} for outcome in outcomes]))
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
