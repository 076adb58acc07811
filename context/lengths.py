"""The sequence length of each step of a stage, and how many steps before it had the same."""

import math
from collections.abc import Iterator

import numpy as np

from settings import Refusal


class Lengths:
    """A cycle of lengths that repeats itself for ever: one length, or that of each step of a whole stage."""

    def __init__(self, cycle: np.ndarray) -> None:
        """cycle: int64 (steps,)."""
        self._cycle = cycle
        by_length = np.argsort(cycle, kind="stable")
        self.distinct, firsts, inverse, counts = np.unique(
            cycle, return_index=True, return_inverse=True, return_counts=True
        )
        self._firsts = firsts
        # The place of a step among those of its length: its place in the sorted order, less where its length begins.
        self._earlier = np.empty_like(cycle)
        self._earlier[by_length] = np.arange(len(cycle)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._in_a_cycle = counts[inverse]

    def at(self, step: int) -> tuple[int, int]:
        """(the step's length, how many steps before it had that length)."""
        cycles, place = divmod(step, len(self._cycle))
        return int(self._cycle[place]), int(cycles * self._in_a_cycle[place] + self._earlier[place])

    def first_steps(self) -> Iterator[int]:
        """The first step of each length, in the order they come."""
        return iter(sorted(self._firsts.tolist()))

    @property
    def longest(self) -> int:
        return int(self.distinct[-1])


def one_length(length: int) -> Lengths:
    return Lengths(np.array([length], dtype=np.int64))


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest_divisors(number: int, value: int) -> tuple[int | None, int | None]:
    """The nearest divisors of `number` below and above `value`."""
    below = [d for d in divisors(number) if d < value]
    above = [d for d in divisors(number) if d > value]
    return below[-1] if below else None, above[0] if above else None


def check_length(key: str, length: int, tokens_per_step: int, step_key: str = "tokens_per_step") -> None:
    """Refuse a length of which a step cannot hold a whole number. key, step_key: where the two were written."""
    if tokens_per_step % length == 0:
        return
    below, above = nearest_divisors(tokens_per_step, length)
    lengths = " or ".join(str(near) for near in (below, above) if near)
    raise Refusal(f"{key}={length} must divide {step_key}={tokens_per_step}; try {key.rpartition('.')[2]} {lengths}")
