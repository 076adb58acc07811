"""Verdicts: known intervals, few false alarms where nothing differs, and what is large is found."""

import math

import numpy as np
import pytest

from comparison.difference import Difference, bootstrap, difference
from comparison.measures import Measure, Sample, mean_of, needle_sample, reach_sample, text_sample
from evals.scoring import Cell

BITS = Measure("held_out/a@128", "bits per byte of held-out a at length 128", ".3f")
NEEDLES = Measure("needle", "share of needle samples found (mean of 4 cells)", ".3f", "in the ", False, 3)


def text(bits_P: np.ndarray, name: str = "t") -> Sample:
    pieces = [[each * math.log(2) * 1000, 1000] for each in bits_P]
    return text_sample({"score": float(np.mean(bits_P)), "pieces": pieces, "text": name})


def plain(values: list[float]) -> list[tuple[int, Sample]]:
    return [(seed, Sample(value)) for seed, value in enumerate(values)]


def of(ours: list[float], theirs: list[float], measure: Measure = BITS) -> Difference:
    found = difference(measure, ("moe", "dense"), plain(ours), plain(theirs), 200)
    assert found is not None
    return found


def test_a_sentence_holds_the_hull_of_both_intervals() -> None:
    """Differences of -0.03 and twice 0.001 apart: Student's half is 4.3027 * 0.001 / sqrt(3)."""
    found = of([1.969, 1.970, 1.971], [2.0, 2.0, 2.0])
    assert found.student == pytest.approx((-0.03 - 0.002484, -0.03 + 0.002484), abs=1e-5)
    assert found.student[0] <= found.bootstrap[0] and found.bootstrap[1] <= found.student[1]
    assert str(found) == (
        "moe is below dense by 0.030 bits per byte of held-out a at length 128 [0.028, 0.032] (3 paired seeds): "
        "evidence"
    )
    above = of([2.031, 2.030, 2.029], [2.0, 2.0, 2.0])
    assert "moe is above dense by 0.030" in str(above) and "[0.028, 0.032]" in str(above) and above.is_evidence


def test_a_bootstrap_alone_is_not_believed() -> None:
    """Three seeds on one side: a bootstrap over them leaves out 0, Student's t does not."""
    found = of([2.03, 2.05, 2.12], [2.0, 2.0, 2.0])
    assert found.bootstrap[0] > 0 > found.student[0] and not found.is_evidence
    assert str(found).startswith(
        "no evidence that moe and dense differ in bits per byte"
    ) and "(3 paired seeds)" in str(found)


def test_student_alone_is_not_believed() -> None:
    """Seeds agree to the digit, and all of it hangs on one piece of the text."""
    hard = np.full(32, 2.0)
    odd = hard + np.where(np.arange(32) == 5, 1.0, 0.0)
    pairs = [(seed, text(odd + 1e-6 * seed)) for seed in range(3)], [(seed, text(hard)) for seed in range(3)]
    found = difference(BITS, ("moe", "dense"), *pairs)
    assert found is not None and found.student[0] > 0 >= found.bootstrap[0] - 1e-5 and not found.is_evidence


def test_one_seed_says_nothing_of_others() -> None:
    easy, hard = (text(np.linspace(1, 3, 32) + shift) for shift in (0.0, 0.5))
    found = difference(BITS, ("moe", "dense"), [(0, easy)], [(0, hard)])
    assert found is not None and not found.is_evidence and found.verdict == "one seed"
    # The text is as hard for both: piece by piece they differ by the same.
    assert found.interval == pytest.approx((-0.5, -0.5), abs=1e-9) and math.isnan(found.student[0])
    assert "an interval over the text alone; one seed: that says nothing of other seeds" in str(found)
    (bare,) = [difference(BITS, ("moe", "dense"), plain([1.0]), plain([2.0]))]
    assert bare is not None and "[" not in str(bare) and "says nothing of other seeds" in str(bare)


def test_runs_that_went_astray_have_no_verdict() -> None:
    found = of([1.0, math.nan, 1.01], [2.0, 2.0, 2.0])
    assert not found.is_evidence and found.verdict == "no verdict" and found.seeds == (0, 2)
    assert str(found).startswith("no verdict on bits per byte") and "moe (seed 1) went astray" in str(found)
    nothing = of([math.nan], [2.0])
    assert "dense" not in str(nothing) and nothing.seeds == () and math.isnan(nothing.mean)


def test_pairs_are_made_by_seed_alone() -> None:
    ours = [(0, Sample(1.0)), (1, Sample(1.1)), (5, Sample(9.0))]
    found = difference(BITS, ("moe", "dense"), ours, [(1, Sample(2.1)), (0, Sample(2.0)), (7, Sample(0.0))], 200)
    assert found is not None and found.seeds == (0, 1) and found.mean == pytest.approx(-1.0)
    apart = difference(BITS, ("moe", "dense"), ours[:2], [(5, Sample(2.0)), (6, Sample(2.1))], 200)
    assert apart is not None and apart.verdict == "no verdict" and "they have no seed in common" in str(apart)
    unknown = difference(BITS, ("moe", "dense"), [(None, Sample(1.0))], [(None, Sample(2.0))], 200)
    assert unknown is not None and "one run each, and no seed is known of both" in str(unknown)
    assert difference(BITS, ("moe", "dense"), [], ours) is None


def test_two_seeds_are_no_evidence_of_scores_that_jump() -> None:
    assert not of([1.0, 1.0], [0.0, 0.0], NEEDLES).is_evidence and "3 are needed" in str(of([1, 1], [0, 0], NEEDLES))
    assert of([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], NEEDLES).is_evidence


def test_the_mean_of_sources_counts_each_as_much() -> None:
    both = mean_of([text(np.full(32, 1.0), "a"), text(np.full(32, 3.0), "b")])
    assert both.value == 2.0
    assert bootstrap([(both, text(np.full(32, 1.5), "a"))], 50) == pytest.approx((0.5, 0.5))


def cells(share: float, rng: np.random.Generator) -> list[Cell]:
    drawn = [(length, depth, rng.binomial(8, share) / 8) for length in (64, 256) for depth in (0.0, 1.0)]
    return [Cell("needle", length, depth, score, 8) for length, depth, score in drawn]


def test_samples_of_needles_are_as_unsure_as_they_are_few() -> None:
    few, many = ([Cell("needle", 64, 0.0, 1.0, count)] * 2 for count in (4, 400))
    widths = [np.subtract(*bootstrap([(needle_sample(each), Sample(0.0))])) for each in (few, many)]
    assert widths[0] < 10 * widths[1] < 0, "four that are found do not say that all are"
    reach = reach_sample([Cell("needle", 64, 0.0, 1.0, 50), Cell("needle", 256, 0.0, 0.0, 50)])
    assert reach.value == 64 and bootstrap([(reach, Sample(0.0))]) == (64, 64)


def false_alarms(num_seeds: int, trials: int, gap: float, *, seed_noise: float, text_noise: float) -> float:
    """How often the verdict is evidence: seeds are noisy, and arms are better at some pieces of the text."""
    rng, found = np.random.default_rng(num_seeds), 0
    for _ in range(trials):
        hard_P, ours_P, theirs_P = rng.normal(0, 0.2, 32), *rng.normal(0, text_noise, (2, 32))
        sides: tuple[list, list] = ([], [])
        for seed in range(num_seeds):
            base = 2 + rng.normal(0, 0.03)
            for side, own_P, shift in ((sides[0], ours_P, gap), (sides[1], theirs_P, 0.0)):
                noise = rng.normal(0, seed_noise) + rng.normal(0, 0.005, 32)
                side.append((seed, text(base + hard_P + own_P + shift + noise)))
        told = difference(BITS, ("a", "b"), *sides, 100)
        found += told is not None and told.is_evidence
    return found / trials


@pytest.mark.parametrize("num_seeds", [2, 3, 4, 5])
def test_where_nothing_differs_evidence_is_rare(num_seeds: int) -> None:
    """5% of 400 is 20 with a standard deviation of 4.4: 0.085 is three of them above."""
    assert false_alarms(num_seeds, 400, 0.0, seed_noise=0.01, text_noise=1e-4) <= 0.085
    assert false_alarms(num_seeds, 400, 0.0, seed_noise=1e-6, text_noise=0.02) <= 0.085


def test_where_much_differs_it_is_found() -> None:
    assert false_alarms(3, 100, 0.1, seed_noise=0.01, text_noise=0.02) >= 0.95


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_needles_that_are_learnt_by_luck_are_rarely_evidence(num_seeds: int) -> None:
    """Each run learns all or nothing, as a coin falls; three seeds that fall alike are 2 of 64."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(300):
        sides = [
            [(seed, needle_sample(cells(rng.choice((0.05, 0.95)), rng))) for seed in range(num_seeds)] for _ in "ab"
        ]
        told = difference(NEEDLES, ("a", "b"), sides[0], sides[1], 100)
        found += told is not None and told.is_evidence
    assert found / 300 <= 0.085
