"""When a run is killed: moments drawn over its whole life, and into what it does there (a save, an evaluation, ...)."""

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.compare import read
from benchmarks.faults.lives import Life, Start

PHASES = {"start": 2, "step": 6, "save": 6, "evaluation": 4, "stage end": 4, "end": 3}
"""What a kill is aimed at, and how often in a run of kills."""
CONTINUES = re.compile(r"continues at step (\d+)")


@dataclass(frozen=True)
class Moment:
    """A kill to come: when this has happened, and so many seconds later."""

    phase: str
    seconds: float
    step: int = 0
    """Its row of metrics.jsonl is what is waited for; in a save, its checkpoint begun."""

    def waits_for(self, run: Path) -> Callable[[], bool]:
        """Whether what the moment waits for has happened in a run's folder."""
        if self.phase == "start":
            return lambda: True
        if self.phase == "save":
            return lambda: is_saving(run) and last_step(run) >= self.step
        return lambda: last_step(run) >= self.step


@dataclass
class Clock:
    """How long an unbroken run takes for what it does, in seconds from its start; kills are drawn within."""

    every_steps: int
    boundaries: list[int]
    """The last step of each stage."""
    rows: dict[int, float] = field(default_factory=dict)
    """When the row of a step was there."""
    evals: dict[int, float] = field(default_factory=dict)
    saves: dict[int, tuple[float, float]] = field(default_factory=dict)
    """When the checkpoint of a step was begun, and when it was there."""
    seconds: float = 0.0

    @property
    def num_steps(self) -> int:
        return max(self.rows)

    def steps(self, phase: str) -> list[int]:
        """The steps at which a run can be in this phase."""
        inside = [step for step in self.boundaries if step < self.num_steps]
        return {
            "start": [0],
            "step": [step for step in self.rows if step < self.num_steps],
            "save": sorted(self.saves),
            "evaluation": sorted(self.evals),
            "stage end": inside,
            "end": [self.num_steps],
        }[phase]

    def spread(self, phase: str, step: int) -> float:
        """How many seconds the phase lasts from where a moment begins to wait in it."""
        if phase == "start":
            return min(self.rows.values())
        if phase == "save":
            begin, end = self.saves[step]
            return max(end - begin, 0.01)
        if phase == "evaluation":
            return max(self.evals[step] - self.rows[step], 0.01)
        return self.rows.get(step + 1, self.seconds) - self.rows[step]

    def draw(self, dice: random.Random, done: int) -> Moment | None:
        """A moment of a run that goes on from step `done`; None to leave it alone, as half of those at the end."""
        if done == self.num_steps and dice.random() < 0.5:
            return None
        ahead = {phase: [s for s in self.steps(phase) if s > done or phase == "start"] for phase in PHASES}
        phases = [phase for phase in PHASES if ahead[phase]]
        phase = dice.choices(phases, [PHASES[phase] for phase in phases])[0]
        # The nearer of two, so that a run is killed more often before it arrives.
        step = min(dice.choice(ahead[phase]), dice.choice(ahead[phase]))
        return Moment(phase, dice.uniform(0.0, self.spread(phase, step)), step)


def watch(start: Start, every_steps: int, boundaries: list[int]) -> tuple[Clock, str]:
    """Let a run go to its end and take the time of everything; raises RuntimeError when it does not end well."""
    clock, run = Clock(every_steps, boundaries), start.run
    begun: dict[int, float] = {}

    def look() -> bool:
        now = time.monotonic() - begin
        step = last_step(run)
        if step and step not in clock.rows:
            clock.rows[step] = now
        if step and step not in clock.evals and any(row.get("step") == step for row in read(run / "evals.jsonl")):
            clock.evals[step] = now
        if is_saving(run):
            begun.setdefault(step, now)
        newest = newest_checkpoint(run)
        if newest and newest not in clock.saves:
            clock.saves[newest] = (begun.get(newest, now), now)
        return False

    begin = time.monotonic()
    with Life(start) as life:
        life.wait_for(look)
        clock.seconds, statuses = time.monotonic() - begin, life.statuses()
        if any(statuses) or not clock.rows:
            raise RuntimeError(f"the unbroken run ended with {statuses}:\n{life.said}")
        return clock, life.said


def last_step(run: Path) -> int:
    """The step of the last whole row of a run's metrics; 0 where there is none."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except OSError:
        return 0
    found = re.search(rb'"step": (\d+)', lines[-1]) if lines else None
    return int(found[1]) if found else 0


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is being written: what is not whole yet has a hidden name."""
    return any((run / "checkpoints").glob(".*"))


def newest_checkpoint(run: Path) -> int:
    """The step of the newest checkpoint that has its place; 0 where there is none."""
    return max((int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")), default=0)


def resumed_step(said: str) -> int | None:
    """The step that a life has said it goes on from; None as long as it has not."""
    found = CONTINUES.search(said)
    return int(found[1]) if found else None
