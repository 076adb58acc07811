"""SIGKILL at random moments: runs are killed and started again until they arrive, and then compared."""

import random
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.bench import Bench, Outcome
from benchmarks.faults.compare import differences
from benchmarks.faults.lives import Life, Start, place, succeeded
from benchmarks.faults.moments import Clock, Moment, last_step, newest_checkpoint, resumed_step

TERM_AFTER, KILL_AFTER = 0.1, 30.0
"""Seconds until torchrun asks the ranks to end that have lost one, and until it makes them."""
MOST_KILLS = 12
"""Of one run; a run that is always killed before its first checkpoint would never arrive."""


@dataclass
class Tally:
    """What came of the kills over one number of ranks."""

    phases: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    single: int = 0
    """Kills of one rank of several; the others were all at once."""
    made: int = 0
    """Of single kills, those after which the other ranks had to be killed too."""
    repeated: int = 0
    """The most steps that were done again after a kill."""
    lost: int = 0
    """Steps that a checkpoint had and the next life did not."""
    problems: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.phases.total()


def outcome_of(bench: Bench, ranks: int, layout: tuple[str, ...], kills: int) -> Outcome:
    """So many kills over so many ranks, as a line of the table."""
    start, clock = bench.whole(ranks, layout)
    tally = kill_runs(start, clock, kills, bench.dice, above=bench.above)
    problems = list(tally.problems)
    problems += [f"{tally.lost} steps of checkpoints were lost"] * (tally.lost > 0)
    problems += [f"{tally.repeated} steps were done again after one kill"] * (tally.repeated > bench.most_repeated)
    problems += [f"{tally.made} times ranks went on that had lost one"] * (tally.made > 0)
    phases = ", ".join(f"{count} {phase}" for phase, count in sorted(tally.phases.items()))
    ended = f"the same losses; at most {tally.repeated} steps done again ({phases}; {tally.single} of one rank)"
    how = f" {' '.join(layout)}" if layout else ""
    return Outcome(f"SIGKILL{how}", ranks, tally.kills, ended, problems)


def kill_runs(whole: Start, clock: Clock, kills: int, dice: random.Random, *, above: Path) -> Tally:
    """Kill runs until there have been so many kills; `whole` is the start of the unbroken run that they must equal."""
    tally = Tally()
    while tally.kills < kills:
        tally.runs += 1
        with place(above, f"kills_{whole.ranks}_{tally.runs}") as folder:
            before = len(tally.problems)
            _kill_one_run(whole.at(folder), clock, min(MOST_KILLS, kills - tally.kills), dice, tally)
            if len(tally.problems) == before:
                tally.problems += [f"run {tally.runs}: {line}" for line in differences(whole.folder, folder)]
    return tally


def _kill_one_run(start: Start, clock: Clock, kills: int, dice: random.Random, tally: Tally) -> None:
    """One run from its first life to its last, which is left alone."""
    for number in range(kills + 1):
        saved, reached = newest_checkpoint(start.run), last_step(start.run)
        moment = clock.draw(dice, saved) if number < kills else None
        with Life(start) as life:
            was_killed = moment is not None and _kill(life, moment, dice, tally)
            if not was_killed and not succeeded(life.wait()):
                tally.problems.append(f"run {tally.runs}, life {number + 1}: ended with {life.statuses()}: {life.said}")
                return
        _judge_resume(tally, saved, reached, resumed_step(life.said))
        if not was_killed:
            return


def _kill(life: Life, moment: Moment, dice: random.Random, tally: Tally) -> bool:
    """Kill at this moment; False when the life ended before it came."""
    if not life.wait_for(moment.waits_for(life.start.run)):
        return False
    life.wait_for(lambda: False, moment.seconds)
    ranks = life.pids()
    if life.is_over():
        return False
    tally.phases[moment.phase] += 1
    if len(ranks) > 1 and dice.random() < 0.4:
        tally.single += 1
        life.send(signal.SIGKILL, dice.choice(ranks))
        life.wait(TERM_AFTER)
        life.send(signal.SIGTERM)
        tally.made += None in life.wait(KILL_AFTER)
    life.kill()
    return True


def _judge_resume(tally: Tally, saved: int, reached: int, resumed: int | None) -> None:
    """Where a life went on, against the newest checkpoint and the last step that were there when it began."""
    if resumed is None and saved == 0:
        resumed = 0
    if resumed is None:
        return  # killed before it said so
    tally.lost += max(0, saved - resumed)
    if reached:
        tally.repeated = max(tally.repeated, reached - resumed)
