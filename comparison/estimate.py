"""A mean over seeds and how far chance may have moved it: Student's t."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from evals.intervals import student_quantile

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half width of its 95% interval (Student's t); NaN where one seed says nothing of it."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if math.isnan(self.half) else f" ±{self.half:.2f}")


def estimate(values: Sequence[float]) -> Estimate | None:
    """None where there is no value."""
    count = len(values)
    if not count:
        return None
    mean = statistics.fmean(values)
    if count == 1:
        return Estimate(mean, math.nan, 1)
    t = -student_quantile((1 - LEVEL) / 2, count - 1)
    return Estimate(mean, t * statistics.stdev(values) / math.sqrt(count), count)
