"""Valleys of losses over sizes, repeated tokens, and the powers through the bottoms."""

import numpy as np
import pytest

from scaling.isoflop import exponents, valley
from scaling.repeats import worth
from scaling.sets import SETS
from settings import Refusal


def curve(
    flops: float, sizes: np.ndarray, noise: float = 0.0, seeds: int = 1, draw: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the law along one budget."""
    size_R = np.repeat(sizes, seeds)
    loss = np.array([SETS["epoch"].loss(size, flops / 6 / size) for size in size_R])
    return size_R, loss + noise * np.random.default_rng(draw).standard_normal(len(size_R))


def test_the_bottom_is_where_the_law_has_it() -> None:
    best = SETS["epoch"].best_size(1e20)
    sizes = best * np.exp(np.linspace(-0.7, 0.7, 7))
    found = valley(1e20, *curve(1e20, sizes))
    assert found.size == pytest.approx(best, rel=0.01) and found.is_inside and found.curvature > 0
    assert found.loss == pytest.approx(SETS["epoch"].loss(best, 1e20 / 6 / best), rel=1e-4)


def test_intervals_hold_the_bottom_about_as_often_as_they_say() -> None:
    best = SETS["epoch"].best_size(1e20)
    sizes = best * np.exp(np.linspace(-0.6, 0.6, 7))
    held, widths = [], []
    for seeds in (1, 4):
        ranges = [
            valley(1e20, *curve(1e20, sizes, noise=0.002, seeds=seeds, draw=draw), rounds=100).size_interval
            for draw in range(80)
        ]
        held.append(sum(low < best < high for low, high in ranges) / len(ranges))
        widths.append(np.median([high / low for low, high in ranges]))
    assert all(0.85 <= share <= 0.99 for share in held), held
    assert widths[1] < widths[0]


def test_bottoms_grow_with_the_power_of_the_law() -> None:
    valleys = []
    for flops in (1e19, 1e20, 1e21):
        sizes = SETS["epoch"].best_size(flops) * np.exp(np.linspace(-0.5, 0.5, 5))
        valleys.append(valley(flops, *curve(flops, sizes), rounds=20))
    assert exponents(valleys)[0] == pytest.approx(SETS["epoch"].exponent, abs=0.003)


def test_what_is_no_valley_is_refused() -> None:
    with pytest.raises(Refusal, match="2 sizes make no parabola"):
        valley(1e20, np.array([1e8, 2e8]), np.array([3.0, 2.9]))
    with pytest.raises(Refusal, match="no lowest point over the 3 sizes; add smaller or larger"):
        valley(1e20, np.array([1e8, 2e8, 4e8]), np.array([3.0, 3.2, 3.1]))
    outside = valley(1e20, np.array([1e8, 2e8, 4e8]), np.array([3.0, 2.8, 2.7]), rounds=20)
    assert not outside.is_inside and outside.size > 4e8
    with pytest.raises(Refusal, match="one budget has no slope"):
        exponents([outside])


@pytest.mark.parametrize(("epochs", "passes"), [(2, 1.968), (4, 3.726), (8, 6.624), (16, 10.58), (40, 15.17)])
def test_repeated_tokens_are_worth_less_each_time(epochs: float, passes: float) -> None:
    """By hand from the formula of Muennighoff et al. with R* = 15.39."""
    assert worth(1e9, epochs) / 1e9 == pytest.approx(passes, abs=0.006)
    assert worth(1e9, 0.5) == 5e8 and worth(1e9, 1) == 1e9
