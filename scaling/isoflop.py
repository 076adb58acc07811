"""IsoFLOP curves: of runs of one number of FLOPs, the size of least loss, by a parabola in log N.

Hoffmann et al. 2022, section 3.2; intervals by drawing what the parabola leaves anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from settings import Refusal

Interval = tuple[float, float]
FEWEST = 3


@dataclass(frozen=True)
class Valley:
    """The least loss along sizes at one budget."""

    flops: float
    size: float
    """Parameters at the bottom."""
    loss: float
    size_interval: Interval
    """95%; from 0 to infinity where some draws had no bottom, or three runs leave nothing to draw."""
    is_inside: bool
    """Whether the bottom lies between the smallest and the largest size that was run."""
    curvature: float
    """Of the loss in log N; what has none is no valley."""


def valley(flops: float, size_R: np.ndarray, loss_R: np.ndarray, *, rounds: int = 1000, seed: int = 0) -> Valley:
    """The bottom of one budget's runs; several seeds of a size are several runs.

    Raises Refusal for fewer than three sizes, and where the losses have no lowest point between others.
    """
    log_R = np.log(size_R)
    num_sizes = len(np.unique(log_R))
    if num_sizes < FEWEST:
        raise Refusal(f"{flops:.3g} FLOPs: {num_sizes} sizes make no parabola; run {FEWEST} at least")
    found = _Parabola.through(log_R, loss_R)
    if found.square <= 0:
        raise Refusal(
            f"{flops:.3g} FLOPs: the loss has no lowest point over the {num_sizes} sizes; add smaller or larger ones"
        )
    low, high = _interval(found, log_R, loss_R, rounds, seed)
    inside = bool(log_R.min() < found.place < log_R.max())
    return Valley(flops, _exp(found.place), found.level, (_exp(low), _exp(high)), inside, found.square)


def exponents(valleys: Sequence[Valley]) -> tuple[float, float]:
    """(power, factor) of size = factor * FLOPs^power through the bottoms, by least squares in logarithms."""
    if len({each.flops for each in valleys}) < 2:
        raise Refusal("one budget has no slope; give runs of two numbers of FLOPs at least")
    flops, sizes = np.log([each.flops for each in valleys]), np.log([each.size for each in valleys])
    power, log_factor = np.polyfit(flops, sizes, 1)
    return float(power), _exp(log_factor)


class _Parabola(NamedTuple):
    """square * (x - place)^2 + level, in x = log size."""

    square: float
    place: float
    level: float

    @classmethod
    def through(cls, log_R: np.ndarray, loss_R: np.ndarray) -> "_Parabola":
        middle = log_R.mean()
        square, slope, level = np.polyfit(log_R - middle, loss_R, 2)
        if square == 0:
            return cls(0.0, float(middle), float(level))
        away = -slope / (2 * square)
        return cls(float(square), float(middle + away), float(level - square * away**2))

    def at(self, log_R: np.ndarray) -> np.ndarray:
        return self.square * (log_R - self.place) ** 2 + self.level


def _interval(found: _Parabola, log_R: np.ndarray, loss_R: np.ndarray, rounds: int, seed: int) -> Interval:
    """95% of the places of bottoms, where what the parabola leaves is drawn anew and added to it."""
    left = len(log_R) - FEWEST
    if left == 0:  # the parabola goes through every run, and says nothing of its own error
        return -np.inf, np.inf
    error_R = (loss_R - found.at(log_R)) * np.sqrt(len(log_R) / left)
    draws = np.random.default_rng(seed)
    again = (found.at(log_R) + draws.choice(error_R, len(error_R)) for _ in range(rounds))
    parabolas = [_Parabola.through(log_R, some_R) for some_R in again]
    if any(each.square <= 0 for each in parabolas):
        return -np.inf, np.inf
    low, high = np.percentile([each.place for each in parabolas], (2.5, 97.5))
    return float(low), float(high)


def _exp(value: float) -> float:
    return float(np.exp(value))
