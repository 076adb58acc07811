"""Intervals: they hold the truth as often as they say, and never call few samples certain."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.intervals import bounds, interval, ratio_interval, student_below, student_quantile, wilson

DRAWS = {
    "right or wrong": (lambda rng, n: (rng.random(n) < 0.9).astype(float), 0.9),
    "even": (lambda rng, n: rng.normal(2.0, 3.0, n), 2.0),
    "skewed": (lambda rng, n: rng.exponential(1.0, n), 1.0),
    "thirds": (lambda rng, n: rng.integers(0, 4, n) / 3, 0.5),
}


@pytest.mark.parametrize(("kind", "count", "least"), [
    ("right or wrong", 20, 0.93), ("right or wrong", 200, 0.93), ("even", 5, 0.90), ("even", 20, 0.93),
    ("thirds", 20, 0.93), ("skewed", 20, 0.89), ("skewed", 100, 0.91),
])  # fmt: skip
def test_intervals_hold_the_truth_as_often_as_they_say(kind, count, least):
    rng, (draw, truth) = np.random.default_rng(7), DRAWS[kind]
    held = [low <= truth <= high for low, high in (interval(draw(rng, count), seed=n) for n in range(500))]
    assert least <= np.mean(held) <= 0.99


def test_ratios_over_windows_hold_the_truth():
    """Windows of different sizes, the larger ones harder: the ratio of sums is estimated, not the mean of ratios."""
    rng, held = np.random.default_rng(0), []
    sizes_known = np.arange(20, 60)
    truth = (sizes_known * (1 + sizes_known / 40)).sum() / sizes_known.sum()
    for trial in range(400):
        sizes = rng.choice(sizes_known, size=100)
        low, high = ratio_interval(sizes * (1 + sizes / 40 + rng.normal(0, 0.1, size=100)), sizes, seed=trial)
        held.append(low <= truth <= high)
    assert 0.91 <= np.mean(held) <= 0.98


def test_worked_examples_of_wilson():
    """Newcombe, Statistics in Medicine 1998, 857-872, table I."""
    known = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (right, count), limits in known.items():
        assert wilson(right, count) == pytest.approx(limits, abs=1e-4)


def test_students_quantiles_are_those_of_the_tables():
    for freedom, quantile in [
        (1, 12.706),
        (2, 4.303),
        (4, 2.776),
        (19, 2.093),
        (30, 2.042),
        (120, 1.980),
        (5000, 1.960),
    ]:
        assert student_quantile(0.025, freedom) == pytest.approx(-quantile, abs=6e-4)
    assert student_quantile(0.005, 9) == pytest.approx(-3.250, abs=6e-4)
    assert student_below(0.0, 7) == 0.5 and student_below(3.0, 8) == pytest.approx(1 - student_below(-3.0, 8))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=40), st.integers(0, 5))
def test_an_interval_lies_in_the_range_and_is_the_same_each_time(values, seed):
    low, high = interval(values, seed)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9 or set(values) <= {0.0, 1.0}
    assert (low, high) == interval(values, seed)


@given(st.integers(1, 60), st.data())
def test_wilson_lies_within_shares_and_mirrors(count, data):
    right = data.draw(st.integers(0, count))
    low, high = wilson(right, count)
    assert 0 <= low <= right / count <= high <= 1 and low < high
    assert (1 - high, 1 - low) == pytest.approx(wilson(count - right, count))
    assert wilson(right, count, 0.99)[0] <= low


def test_more_samples_say_more():
    rng = np.random.default_rng(3)
    widths = [np.diff(interval(rng.normal(size=n)))[0] for n in (10, 100, 1000, 20_000)]
    assert all(wide > 2 * narrow for wide, narrow in pairwise(widths))


def test_nothing_is_said_where_nothing_can_be():
    assert bounds([]) == {} and bounds([0.3]) == {} and all(map(math.isnan, interval([0.3])))
    assert bounds([1.0])["low"] < 0.3  # one right answer says little, but something
    assert ratio_interval([1, 2, 5], [1, 1, 0]) == ratio_interval([1, 2], [1, 1])  # a window of which nothing is asked
    assert bounds([0.25, 0.5, 0.5]).keys() == {"low", "high"}
