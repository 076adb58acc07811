"""What arms have shown: scores over seeds with intervals, and claims held against them. Reads run folders alone."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from comparison.arms import ArmsSettings, Claim, Entry, matched_lines
from comparison.difference import RESAMPLES, Difference
from comparison.estimate import Estimate, estimate
from comparison.others import read_runs
from comparison.seen import SeenRun, read_seen
from comparison.verdicts import differences
from run.facts import read_run
from run.metrics import Row

NOTHING_PLANNED = ArmsSettings(bases={"runs": ""}, arms={"runs": {}})
"""Of runs that no comparison has trained."""


@dataclass(frozen=True)
class Arm:
    """What one arm's run has shown, by the number of steps since it branched: 0 is zero-shot."""

    base: str
    seed: int
    name: str
    rows: dict[int, list[Row]]


@dataclass(frozen=True)
class Verdict:
    """How one claim stands on one base at one moment; of its arms those that were measured, and no others."""

    claim: Claim
    above: tuple[str, ...]
    below: tuple[str, ...]
    base: str
    steps: int
    difference: Estimate
    """Of the two groups' means, seed by seed."""
    nearest: float
    """The lowest mean above less the highest mean below: above 0 when every arm keeps to its side."""

    def __str__(self) -> str:
        above, below = ("{" + ", ".join(names) + "}" for names in (self.above, self.below))
        what = f"{self.base}, {moment(self.steps)}, {self.claim.task} at {self.claim.length:,}"
        mean, half = self.difference.mean, self.difference.half
        if math.isnan(half):
            return f"{what}: one seed gives no interval: {above} less {below} is {mean:+.2f}"
        told = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
        if mean - half > 0:
            apart = "every arm keeps to its side" if self.nearest > 0 else "single arms overlap"
            return f"{what}: {above} above {below} by {told}; {apart} ({self.nearest:+.2f})"
        if mean + half < 0:
            return f"{what}: {above} BELOW {below}: {told}"
        return f"{what}: no evidence that {above} differ from {below}: {told}"


@dataclass(frozen=True)
class Comparison:
    """The arms' runs that have anything to tell."""

    settings: ArmsSettings
    arms: tuple[Arm, ...]
    """Those that branched, or of which something is claimed."""
    runs: tuple[SeenRun, ...] = ()
    """All of them."""
    matched: tuple[str, ...] = ()
    """What was made alike, line by line."""
    first: str | None = None
    """The arm that others are held against; None: the first."""
    resamples: int = RESAMPLES

    @cached_property
    def moments(self) -> list[int]:
        """The numbers of steps that tables show."""
        measured = sorted({steps for arm in self.arms for steps in arm.rows})
        return [steps for steps in measured if steps in self.settings.after_steps or not self.settings.after_steps]

    @cached_property
    def lengths(self) -> list[int]:
        """At which needles were looked for."""
        return sorted({row["length"] for arm in self.arms for rows in arm.rows.values() for row in _needles(rows)})

    @cached_property
    def differences(self) -> list[Difference]:
        """Of every pair of arms by every headline measure; none of sizes at budgets, which are points of curves."""
        if self.settings.isoflop is not None:
            return []
        return differences(self.runs, self.first, self.resamples)

    def of(self, base: str, name: str) -> list[Arm]:
        """One arm's runs, a seed each."""
        return [arm for arm in self.arms if (arm.base, arm.name) == (base, name)]

    def score(self, base: str, name: str, steps: int, length: int, task: str = "needle") -> Estimate | None:
        """Mean over depths, then over seeds."""
        return estimate(list(self._by_seed(base, name, steps, length, task).values()))

    def loss(self, base: str, name: str, steps: int, length: int) -> Estimate | None:
        """Bits per byte at the positions that end at a length, or, where they were not asked, of text cut to it."""
        values = [bits_at(arm.rows.get(steps, []), length) for arm in self.of(base, name)]
        return estimate([value for value in values if value is not None])

    def verdicts(self) -> list[Verdict]:
        """Each claim on each base at each moment that was measured."""
        found = (
            self._verdict(claim, base, steps)
            for claim in self.settings.claims
            for base in self.settings.chosen_bases
            for steps in self.moments
        )
        return [verdict for verdict in found if verdict is not None]

    def _by_seed(self, base: str, name: str, steps: int, length: int, task: str) -> dict[int, float]:
        means = {}
        for arm in self.of(base, name):
            scores = [row["score"] for row in arm.rows.get(steps, []) if (row["task"], row["length"]) == (task, length)]
            if scores:
                means[arm.seed] = statistics.fmean(scores)
        return means

    def _verdict(self, claim: Claim, base: str, steps: int) -> Verdict | None:
        sides = [
            {name: scores for name in names if (scores := self._by_seed(base, name, steps, claim.length, claim.task))}
            for names in (claim.above, claim.below)
        ]
        if not all(sides):
            return None
        # Seeds that every arm has: the same base weights under each, so that differences pair.
        seeds = set.intersection(*(set(scores) for side in sides for scores in side.values()))
        above, below = ([[scores[seed] for seed in sorted(seeds)] for scores in side.values()] for side in sides)
        differences = [
            statistics.fmean(high) - statistics.fmean(low)
            for high, low in zip(zip(*above, strict=True), zip(*below, strict=True), strict=True)
        ]
        difference = estimate(differences)
        if difference is None:
            return None
        nearest = min(map(statistics.fmean, above)) - max(map(statistics.fmean, below))
        return Verdict(claim, tuple(sides[0]), tuple(sides[1]), base, steps, difference, nearest)


def compare(settings: ArmsSettings, entries: Iterable[Entry]) -> Comparison:
    """What lies in the folders of the arms; one that is not there yet is passed over."""
    entries = list(entries)
    named = [(entry, entry.arm) for entry in entries if entry.arm is not None]
    seen = [read_seen(entry.folder, arm, entry.seed, entry.base) for entry, arm in named]
    arms: list[Arm | None] = []
    if settings.branch_stage is not None or settings.claims:
        arms = [read_arm(entry.folder, entry.base, entry.seed, arm) for entry, arm in named]
    return Comparison(
        settings,
        tuple(arm for arm in arms if arm is not None),
        tuple(run for run in seen if run is not None),
        tuple(matched_lines(entries)),
        settings.match.to if settings.match else None,
    )


def compare_runs(words: Sequence[str]) -> Comparison:
    """Runs that exist, as `comparison.others.read_runs` has them. Raises Refusal."""
    return Comparison(NOTHING_PLANNED, (), tuple(read_runs(words)))


def read_arm(folder: Path, base: str, seed: int, name: str) -> Arm | None:
    """The rows of an arm's evals, by steps since it branched; None where it has not begun."""
    if not (folder / "config.toml").is_file():
        return None
    facts = read_run(folder)
    begin = facts.origin.get("step", 0)
    rows: dict[int, list[Row]] = {}
    for row in facts.starts:
        if row["step"] == begin:
            rows.setdefault(0, []).append(row)
    for row in facts.evals:
        if row["step"] > begin:  # what stands at the branch itself was asked under the rotation of before
            rows.setdefault(row["step"] - begin, []).append(row)
    told = {steps: [_with_number(row) for row in rows[steps]] for steps in sorted(rows)}
    return Arm(base, seed, name, told) if rows else None


def _with_number(row: Row) -> Row:
    """A run that went astray has scores that are no numbers; of these the mean over seeds is none either."""
    return {**row, "score": math.nan} if row["score"] is None else row


def bits_at(rows: Sequence[Row], length: int) -> float | None:
    """Mean bits per byte, over sources, of the stretch of positions that ends at a length; else of text cut to it."""
    late = [row["score"] for row in rows if row["task"].startswith("positions/") and row["stop"] == length]
    found = late or [row["score"] for row in rows if row["task"].startswith("held_out/") and row["length"] == length]
    return statistics.fmean(found) if found else None


def moment(steps: int) -> str:
    return "zero-shot" if steps == 0 else f"after {steps} step{'' if steps == 1 else 's'}"


def _needles(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["task"] == "needle"]
