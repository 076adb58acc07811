"""How far chance may have moved a score: 95% intervals over samples.

Right or wrong: Wilson's score interval (1927), which Brown, Cai and DasGupta (Statistical Science 2001, section 5)
advise for 40 samples or fewer; a bootstrap calls 20 right of 20 certain, Wilson says at least 0.84.
All else: the percentile bootstrap of the mean, widened for few samples (Hesterberg, The American Statistician 2015,
section 4.3): the plain one is too narrow by sqrt((n - 1) / n) and takes the normal's quantile for Student's.
"""

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]
Numbers = Sequence[float] | np.ndarray
RESAMPLES = 2000
DRAWS_AT_ONCE = 1 << 22
"""Numbers drawn at one time: 32 MiB of them."""
NORMAL = NormalDist()


def interval(values: Numbers, seed: int = 0, level: float = 0.95) -> Interval:
    """(low, high) around the mean of independent samples: Wilson's where all are 0 or 1, else a bootstrap's.

    Both NaN where nothing can be said: no sample, or a single one that is neither 0 nor 1.
    """
    values_S = np.asarray(values, dtype=np.float64)
    if len(values_S) and np.isin(values_S, (0.0, 1.0)).all():
        return wilson(int(values_S.sum()), len(values_S), level)
    return ratio_interval(values_S, np.ones_like(values_S), seed, level)


def bounds(values: Numbers, seed: int = 0) -> dict[str, float]:
    """`interval` as the fields `low` and `high` of a cell; none where nothing can be said."""
    return fields(interval(values, seed))


def fields(found: Interval) -> dict[str, float]:
    return {} if math.isnan(found[0]) else {"low": found[0], "high": found[1]}


def wilson(right: int, count: int, level: float = 0.95) -> Interval:
    """The shares of right answers that would not be surprised by `right` of `count` (Wilson 1927)."""
    if not count:
        return math.nan, math.nan
    z = NORMAL.inv_cdf((1 + level) / 2)
    centre = (right + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(right * (count - right) / count + z * z / 4)
    # At the ends the formula is exact; its rounding is not.
    return (0.0 if right == 0 else centre - half), (1.0 if right == count else centre + half)


def ratio_interval(above: Numbers, below: Numbers, seed: int = 0, level: float = 0.95) -> Interval:
    """(low, high) around sum(above) / sum(below): bits per byte over windows, which are drawn again as wholes.

    Tokens of one window are not independent: to draw tokens would make every loss look far too certain.
    """
    above_S, below_S = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    assert above_S.shape == below_S.shape, f"{above_S.shape} above, {below_S.shape} below"
    above_S, below_S = above_S[below_S > 0], below_S[below_S > 0]
    count = len(above_S)
    if count < 2:
        return math.nan, math.nan
    rng, at_once = np.random.default_rng(seed), max(1, DRAWS_AT_ONCE // count)
    ratios = []
    for start in range(0, RESAMPLES, at_once):
        drawn_XS = rng.integers(count, size=(min(at_once, RESAMPLES - start), count))
        ratios.append(above_S[drawn_XS].sum(axis=1) / below_S[drawn_XS].sum(axis=1))
    tail = widened_tail(count, (1 - level) / 2)
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return float(low), float(high)


@cache
def widened_tail(count: int, tail: float) -> float:
    """The share of resampled means to leave out at each end, so that few samples are covered as Student's t would."""
    return NORMAL.cdf(math.sqrt(count / (count - 1)) * student_quantile(tail, count - 1))


def student_quantile(tail: float, freedom: int) -> float:
    """Where Student's t with so many degrees of freedom leaves `tail` < 1/2 below it: by halving, to 1e-12."""
    if freedom > 1000:  # a thousandth from the normal's, and the sum grows long
        return NORMAL.inv_cdf(tail)
    low, high = -1.0, 0.0
    while student_below(low, freedom) > tail:
        low *= 2
    while high - low > 1e-12 * max(1.0, -low):
        middle = (low + high) / 2
        low, high = (low, middle) if student_below(middle, freedom) > tail else (middle, high)
    return high


def student_below(t: float, freedom: int) -> float:
    """The share of Student's t below `t`; for whole degrees of freedom a finite sum (Abramowitz and Stegun, 26.7)."""
    angle = math.atan(t / math.sqrt(freedom))
    square, odd = math.cos(angle) ** 2, freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for step in range(freedom // 2):
        total += term
        term *= square * ((2 * step + 2) / (2 * step + 3) if odd else (2 * step + 1) / (2 * step + 2))
    within = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + within) / 2
