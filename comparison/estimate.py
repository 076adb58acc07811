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
        return self.told(".2f")

    def told(self, form: str) -> str:
        """`0.90 ±0.25`, each written in a form such as `.2f`."""
        return f"{self.mean:{form}}" + ("" if math.isnan(self.half) else f" ±{self.half:{form}}")


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
