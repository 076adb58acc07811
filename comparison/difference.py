"""Whether two arms differ: paired seeds and pieces of the same text drawn again, Student's t, and a plain sentence.

A bootstrap over two or three seeds leaves out 0 by chance in a quarter of cases or more: all seeds need only fall on
one side. Student's t knows that of seeds, and nothing of the text that all seeds have read. So nothing is called
evidence unless both intervals leave out 0; what is told is the hull of both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from comparison.estimate import estimate
from comparison.measures import Draws, Measure, Sample

RESAMPLES = 2000
LEVEL = 0.95
TINY = 1e-12
NONE = (math.nan, math.nan)
Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """One arm less another, by one measure."""

    measure: Measure
    arm: str
    other: str
    seeds: tuple[int | None, ...]
    """The pairs that both have a number for; None: of one run each, whose seeds are not the same or not known."""
    ours: float
    """Means over the pairs."""
    theirs: float
    student: Interval
    """Over seeds; NaN for fewer than two."""
    bootstrap: Interval
    """Seeds drawn again and, within them, the text or samples; NaN where a single pair says nothing of these."""
    lost: tuple[str, ...] = ()
    """Runs that have no number here, as they went astray."""
    unpaired: str = ""
    """Why there are no pairs."""
    notes: tuple[str, ...] = ()
    group: str = ""

    @property
    def mean(self) -> float:
        return self.ours - self.theirs

    @property
    def interval(self) -> Interval:
        """The hull of both; of one pair, that of its text."""
        known = [each for each in (self.student, self.bootstrap) if not math.isnan(each[0])]
        return (min(low for low, _ in known), max(high for _, high in known)) if known else NONE

    @property
    def is_evidence(self) -> bool:
        """Whether chance in seeds and text would hardly have made it."""
        low, high = self.interval
        is_told = len(self.seeds) >= max(2, self.measure.least_seeds) and not self.lost and not self.unpaired
        return is_told and not math.isnan(self.student[0]) and (low > 0 or high < 0)

    @property
    def verdict(self) -> str:
        """For files: `evidence`, `no evidence`, `one seed`, or `no verdict`."""
        if self.lost or not self.seeds:
            return "no verdict"
        if len(self.seeds) == 1:
            return "one seed"
        return "evidence" if self.is_evidence else "no evidence"

    @property
    def numbers(self) -> str:
        """`-0.031 [-0.042, -0.021]`."""
        form = "+" + self.measure.form
        low, high = self.interval
        return f"{self.mean:{form}}" + ("" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]")

    def __str__(self) -> str:
        told = self._sentence()
        return f"{told} ({'; '.join(self.notes)})" if self.notes else told

    def _sentence(self) -> str:
        words = self.measure.words
        if self.lost:
            tail = f"; where both have a number the difference is {self.numbers}" if self.seeds else ""
            return f"no verdict on {words}: {' and '.join(self.lost)} went astray and has no number{tail}"
        if self.unpaired and not self.seeds:
            return f"no verdict on {words}: {self.unpaired}; the means differ by {self.mean:+{self.measure.form}}"
        if len(self.seeds) == 1:
            return self._of_one_seed(words)
        count = f"{len(self.seeds)} paired seeds"
        if self.is_evidence:
            return f"{self._side(words)} ({count}): evidence"
        few = ""
        low, high = self.interval
        if len(self.seeds) < self.measure.least_seeds and (low > 0 or high < 0):
            few = f"; two seeds fall alike too often by chance, {self.measure.least_seeds} are needed"
        return f"no evidence that {self.arm} and {self.other} differ in {words}: {self.numbers} ({count}){few}"

    def _of_one_seed(self, words: str) -> str:
        text = f", an interval over the {self.measure.over} alone" if not math.isnan(self.interval[0]) else ""
        why = f"one run each, and {self.unpaired}" if self.unpaired else "one seed"
        return f"{self._side(words)}{text}; {why}: that says nothing of other seeds"

    def _side(self, words: str) -> str:
        form, (low, high) = self.measure.form, self.interval
        low, high = (-high, -low) if self.mean < 0 else (low, high)
        told = "" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]"
        if abs(self.mean) < TINY:
            return f"{self.arm} is level with {self.other} in {words}{told}"
        side = "below" if self.mean < 0 else "above"
        return f"{self.arm} is {side} {self.other} by {abs(self.mean):{form}} {self.measure.joint}{words}{told}"


def difference(
    measure: Measure, arms: tuple[str, str], ours: Sequence[tuple[int | None, Sample]],
    theirs: Sequence[tuple[int | None, Sample]], resamples: int = RESAMPLES,
) -> Difference | None:  # fmt: skip
    """`arms[0]` less `arms[1]`, from the (seed, sample) of each of their runs; None where one of them has none."""
    if not ours or not theirs:
        return None
    lost = [
        arm if seed is None else f"{arm} (seed {seed})"
        for arm, side in zip(arms, (ours, theirs), strict=True)
        for seed, sample in side
        if math.isnan(sample.value)
    ]
    pairs, unpaired = _paired(ours, theirs)
    whole = [(seed, a, b) for seed, a, b in pairs if not math.isnan(a.value - b.value)]
    seeds = tuple(seed for seed, _, _ in whole)
    if whole:
        means = [_mean([a.value for _, a, _ in whole]), _mean([b.value for _, _, b in whole])]
    else:
        means = [_mean([sample.value for _, sample in side]) for side in (ours, theirs)]
    told = estimate([a.value - b.value for _, a, b in whole])
    student = NONE if told is None or math.isnan(told.half) else (told.mean - told.half, told.mean + told.half)
    # Of one seed a length up to which needles are found comes out the same from nearly any samples: [0, 0].
    is_bare = len(whole) == 1 and not measure.over
    boot = NONE if is_bare else bootstrap([(a, b) for _, a, b in whole], resamples)
    return Difference(measure, *arms, seeds, means[0], means[1], student, boot, tuple(lost), unpaired)


def bootstrap(pairs: Sequence[tuple[Sample, Sample]], resamples: int = RESAMPLES) -> Interval:
    """Of the mean difference of pairs: pairs drawn again, and for each the text that both of them read."""
    if not pairs or (len(pairs) == 1 and all(sample.drawn is None for sample in pairs[0])):
        return NONE
    draws = Draws(resamples)
    values_SX = np.stack([a.values(draws) - b.values(draws) for a, b in pairs])
    count = len(pairs)
    chosen_SX = draws.rng.integers(count, size=(count, resamples))
    means_X, drawn_X = values_SX.mean(axis=0), np.take_along_axis(values_SX, chosen_SX, axis=0).mean(axis=0)
    # Means of few that are drawn again vary less than means of few others would: by sqrt((S - 1) / S).
    stretch = math.sqrt(count / (count - 1)) if count > 1 else 0.0
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means_X + stretch * (drawn_X - means_X), [tail, 1 - tail])
    return float(low), float(high)


def _paired(
    ours: Sequence[tuple[int | None, Sample]], theirs: Sequence[tuple[int | None, Sample]]
) -> tuple[list[tuple[int | None, Sample, Sample]], str]:
    """Pairs of one seed, and why there are none where there are none."""
    first, second = ({seed: sample for seed, sample in side if seed is not None} for side in (ours, theirs))
    shared = sorted(first.keys() & second.keys())
    if shared:
        return [(seed, first[seed], second[seed]) for seed in shared], ""
    why = "no seed is known of both" if not first or not second else "they have no seed in common"
    if len(ours) == len(theirs) == 1:
        return [(None, ours[0][1], theirs[0][1])], why
    return [], why


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
