"""Growth inside a stage: which length, or which window, each step has. Pure arithmetic, the same after a resume.

Rows are packed anew for each length (data/), so nothing is cut off to shorten a row and no row is split into several:
what length-warm-ups that truncate or split have to check (that every length is a power of two, or divides the longest)
does not come up here. One rule is left, for all kinds: a step holds a whole number of rows.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from context.lengths import Lengths, check_length, divisors, one_length
from data.positions import LONGEST
from settings import Refusal, Section

MOST_STEPS = 10_000_000
"""Of a stage whose length grows: what each step has is held in memory."""


class LinearGrowth(Section):
    """From `start` to the stage's length along a straight line over the stage, as step lengths allow.

    A step has the longest length at or below the line of which tokens_per_step holds a whole number. `start` may lie
    above the stage's length: then rows become shorter.
    """

    kind: Literal["linear"] = "linear"
    start: int = Field(ge=1, le=LONGEST)
    """Tokens of a row at the stage's first step; a multiple of `granularity`."""
    granularity: int = Field(default=1, ge=1, le=LONGEST)
    """Lengths before the stage's own are multiples of it."""

    @model_validator(mode="after")
    def _starts_on_a_rung(self) -> Self:
        if self.start % self.granularity:
            near = max(d for d in divisors(self.start) if d <= self.granularity)
            raise ValueError(
                f"start={self.start} must be a multiple of granularity={self.granularity}; try granularity={near}"
            )
        return self


class PowerOfTwoGrowth(Section):
    """Short rows mostly, then longer ones, in cycles: Grow-P2 of Dataset Decomposition (arXiv 2405.13226, section 3.3).

    The lengths are the stage's, its half, its quarter, ... down to `shortest`, and in a cycle each has as many steps;
    what does not share out goes to the longest ones, a step each. A step is `odds` times likelier to have a length than
    the next longer one, among those that have steps left. Nothing is drawn: the steps come in the order in which the
    odds expect them. The stage's first step has its longest rows, so that what does not fit into memory shows at once.
    """

    kind: Literal["power_of_two"] = "power_of_two"
    shortest: int = Field(ge=1)
    """Tokens of the shortest rows: the stage's length, halved some times."""
    cycles: int = Field(default=8, ge=1)
    """How many times the lengths are gone through."""
    odds: float = Field(default=2.0, ge=1e-3, le=1e3)
    """2: 32:16:8:4:2:1 for six lengths. 1: all lengths evenly. Below 1: long rows first."""


class WindowGrowth(Section):
    """SkyLadder (arXiv 2503.15450, section 3): rows keep their length, and what attention sees of them grows.

    In training every layer sees min(end, start + floor(rate * steps done in the stage)) tokens back, or its own window
    where that is narrower; evaluation sees all. Here the window slides with each token; the paper cuts rows into blocks
    of that length.
    """

    kind: Literal["window"] = "window"
    start: int = Field(default=32, ge=1)
    """Tokens seen at the stage's first step."""
    rate: float = Field(default=0.125, gt=0)
    """Tokens that the window gains with each step."""
    end: int | None = Field(default=None, ge=1)
    """The widest window; left out, the stage's length, at which it is no limit any more."""

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.end is not None and self.end < self.start:
            raise ValueError(f"end={self.end} must not be below start={self.start}; the window only widens")
        return self


Growth = Annotated[LinearGrowth | PowerOfTwoGrowth | WindowGrowth, Field(discriminator="kind")]


@lru_cache(maxsize=16)  # a configuration is placed in its run again for each check of it
def lengths_of(growth: Growth | None, key: str, length: int, tokens_per_step: int, num_steps: int) -> Lengths:
    """The length of every step of a stage. Raises Refusal where its growth cannot be.

    key: the stage's place in the configuration, for the refusal. length: the stage's own, of which a step holds a whole
    number.
    """
    if isinstance(growth, WindowGrowth) and growth.start >= length:
        raise Refusal(
            f"{key}.growth.start={growth.start} must be below sequence_length={length}, or the window limits nothing; "
            f"try {max(1, length // 8)}, or leave the growth out"
        )
    if isinstance(growth, WindowGrowth) and growth.end is not None and growth.end > length:
        raise Refusal(
            f"{key}.growth.end={growth.end} is above sequence_length={length}, and no window is wider than a row; "
            "leave it out to see all in the end"
        )
    if growth is None or isinstance(growth, WindowGrowth):
        return one_length(length)
    if num_steps > MOST_STEPS:
        raise Refusal(
            f"{key}.growth: the stage has {num_steps} steps, more than {MOST_STEPS}; raise tokens_per_step, or split it"
        )
    cycle: np.ndarray = CYCLES[growth.kind](growth, f"{key}.growth", length, tokens_per_step, num_steps)
    return Lengths(cycle)


def window_of(growth: Growth | None, length: int, step: int) -> int | None:
    """How many tokens back the stage's step of this number sees in training; None: no growth says so."""
    if not isinstance(growth, WindowGrowth):
        return None
    window = min(growth.end or length, growth.start + int(min(growth.rate * step, length)))
    return None if window >= length else window


def ladder(growth: LinearGrowth, length: int, tokens_per_step: int) -> list[int]:
    """The lengths between the start and the stage's that a step can have, ascending, both ends among them."""
    low, high = sorted((growth.start, length))
    between = [d for d in divisors(tokens_per_step) if low < d < high and d % growth.granularity == 0]
    return sorted({low, *between, high})


def _linear(growth: LinearGrowth, key: str, length: int, tokens_per_step: int, num_steps: int) -> np.ndarray:
    check_length(f"{key}.start", growth.start, tokens_per_step)
    steps = np.arange(num_steps, dtype=np.int64)
    # In whole numbers: a line in floating point could miss the stage's own length by one at the last step.
    last = max(1, num_steps - 1)
    line = growth.start + (length - growth.start) * steps // last if num_steps > 1 else np.full(1, length)
    rungs = np.array(ladder(growth, length, tokens_per_step), dtype=np.int64)
    return rungs[np.searchsorted(rungs, line, side="right") - 1]


def _power_of_two(growth: PowerOfTwoGrowth, key: str, length: int, tokens_per_step: int, num_steps: int) -> np.ndarray:
    halvings = (length // growth.shortest).bit_length() - 1
    if growth.shortest << max(halvings, 0) != length:
        odd = length // (length & -length)  # what is left when no half is whole any more
        choices = [odd << shift for shift in range((length // odd).bit_length())]
        raise Refusal(
            f"{key}.shortest={growth.shortest} must be sequence_length={length} halved some times; "
            f"try {min(choices, key=lambda choice: abs(choice - growth.shortest))}"
        )
    lengths = growth.shortest << np.arange(halvings + 1)
    if num_steps < growth.cycles * len(lengths):
        raise Refusal(
            f"{key}: {growth.cycles} cycles of {len(lengths)} lengths need as many steps at least, but the stage has "
            f"{num_steps}; use fewer cycles, a longer shortest, or more tokens"
        )
    bounds = [cycle * num_steps // growth.cycles for cycle in range(growth.cycles + 1)]
    cycle = np.concatenate([one_cycle(lengths, growth.odds, stop - start) for start, stop in pairwise(bounds)])
    first_long = int(np.argmax(cycle))
    return np.concatenate([cycle[first_long : first_long + 1], np.delete(cycle, first_long)])


def one_cycle(lengths: np.ndarray, odds: float, num_steps: int) -> np.ndarray:
    """Every length as often as the others, the longest once more where they do not share out, in the order of odds.

    Lengths that are drawn by fixed odds, each until its steps are used up, are all used at their own steady pace, if
    time is counted in draws of any one of them. So the n-th of a length, from 0, comes at (n + 1/2) / its odds.
    """
    share, left = divmod(num_steps, len(lengths))
    counts = np.full(len(lengths), share)
    counts[len(lengths) - left :] += 1
    weights = np.power(float(odds), np.arange(len(lengths))[::-1])
    which = np.repeat(np.arange(len(lengths)), counts)
    numbers = np.arange(num_steps) - np.repeat(np.cumsum(counts) - counts, counts)
    return lengths[which[np.argsort((numbers + 0.5) / weights[which], kind="stable")]]


CYCLES: dict[str, Callable[[Any, str, int, int, int], np.ndarray]] = {"linear": _linear, "power_of_two": _power_of_two}
