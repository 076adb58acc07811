"""The blend: Megatron-LM's sequence, near to the shares at every prefix, any range at once."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.mixture import CHUNK, Blend


def greedy(weights: list[str], count: int) -> list[int]:
    """The rule as published, in fractions; the first of equals."""
    shares, used, chosen = [Fraction(weight) for weight in weights], [0] * len(weights), []
    for number in range(count):
        lateness = [share * max(number, 1) - taken for share, taken in zip(shares, used, strict=True)]
        chosen.append(lateness.index(max(lateness)))
        used[chosen[-1]] += 1
    return chosen


def test_golden_sequence() -> None:
    source, number = Blend((0.5, 0.3, 0.2)).take(0, 20)
    assert source.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1, 2, 0, 1, 0, 2, 0, 1, 0]
    assert number.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 5, 3, 2, 6, 4, 7, 3, 8, 5, 9]


def test_equals_megatron() -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    for weights in ([0.5, 0.3, 0.2], [0.75, 0.25], [0.5, 0.25, 0.125, 0.125]):
        source, number = np.zeros(3000, dtype=np.int16), np.zeros(3000, dtype=np.int64)
        helpers.build_blending_indices(source, number, np.array(weights), len(weights), 3000, False)
        ours_source, ours_number = Blend(weights).take(0, 3000)
        # Where sources are equally late, their floats decide by rounding; counts stay within one sample.
        assert (ours_source == source).mean() > 0.9
        for which in range(len(weights)):
            assert np.abs(np.cumsum(ours_source == which) - np.cumsum(source == which)).max() <= 1
        if weights != [0.5, 0.3, 0.2]:
            assert np.array_equal(ours_source, source)
            assert np.array_equal(ours_number, number)


@pytest.mark.parametrize("weights", [["0.34", "0.66"], ["0.7", "0.2", "0.07", "0.03"], ["0.123457", "0.2", "0.676543"]])
def test_equals_the_plain_rule(weights: list[str]) -> None:
    source, _ = Blend([float(weight) for weight in weights]).take(0, CHUNK + 1000)
    assert source.tolist() == greedy(weights, CHUNK + 1000)


def test_chunks_join_across_a_period_longer_than_a_chunk() -> None:
    weights, period = ["0.1237", "0.2", "0.6763"], 10_000
    source, _ = Blend([float(weight) for weight in weights]).take(0, 2 * period)
    assert source.tolist() == greedy(weights, 2 * period)
    blend = Blend([float(weight) for weight in weights])
    assert np.array_equal(blend.take(period - 50, 100)[0], source[period - 50 : period + 50])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 30_000), st.integers(0, 3000))
def test_any_range_is_part_of_the_whole(weights: list[float], first: int, count: int) -> None:
    whole_source, whole_number = Blend(weights).take(0, first + count)
    source, number = Blend(weights).take(first, count)
    assert np.array_equal(source, whole_source[first:])
    assert np.array_equal(number, whole_number[first:])
    for which in range(len(weights)):
        assert np.array_equal(whole_number[whole_source == which], np.arange((whole_source == which).sum()))


@pytest.mark.parametrize(
    ("weights", "bound"),
    [((0.5, 0.3, 0.2), 0.7), ((0.34, 0.66), 0.7), ((0.6, 0.4), 0.5), ((0.7, 0.2, 0.07, 0.03), 1.35)],
)
def test_every_prefix_is_near_the_shares(weights: tuple[float, ...], bound: float) -> None:
    source, _ = Blend(weights).take(0, 100_000)
    for which, weight in enumerate(weights):
        assert np.abs(np.cumsum(source == which) - weight * np.arange(1, 100_001)).max() <= bound


def test_far_away_is_reached_without_walking() -> None:
    source, number = Blend((0.6, 0.4)).take(10**9, 10)
    assert source.sum() == 4
    assert number[source == 0].min() == 6 * 10**8


def test_a_source_of_weight_zero_gives_nothing() -> None:
    assert set(Blend((0.0, 1.0, 0.0)).take(0, 100)[0].tolist()) == {1}


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -0.5)])
def test_impossible_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="weights="):
        Blend(weights)
