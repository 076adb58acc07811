"""Samples made of random tokens: what is asked follows from what stands there, and keys alone decide."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import counted
from data.rows import NO_TARGET
from data.synthetic.copying import ARROW, STOP, copy_by_example, repeated_blocks
from data.synthetic.induction import MARK, induction_samples
from data.synthetic.mqar import draw_gaps, mqar_samples
from settings import Refusal

MAKERS = {
    "induction": lambda keys_S: induction_samples(keys_S, 20, 8),
    "mqar": lambda keys_S: mqar_samples(keys_S, 24, 4, 32),
    "repeated": lambda keys_S: repeated_blocks(keys_S, 10, 16),
    "by example": lambda keys_S: copy_by_example(keys_S, 2, 5, 16),
}


def keys(count: int, seed: int = 0) -> np.ndarray:
    return counted(seed + 1, np.arange(count))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_sample_is_a_function_of_its_key_alone(kind):
    many, one = MAKERS[kind](keys(50)), MAKERS[kind](keys(50)[[17]])
    np.testing.assert_array_equal(many.tokens_ST[17], one.tokens_ST[0])
    np.testing.assert_array_equal(many.labels_ST[17], one.labels_ST[0])
    assert len(np.unique(many.tokens_ST, axis=0)) == 50 and many.tokens_ST.dtype == many.labels_ST.dtype == np.int64


@given(length=st.integers(3, 60), vocab_size=st.integers(3, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_induction_asks_what_followed_the_only_other_mark(length, vocab_size, seed):
    samples = induction_samples(keys(20, seed), length, vocab_size)
    for tokens, labels in zip(samples.tokens_ST.tolist(), samples.labels_ST.tolist(), strict=True):
        assert len(tokens) == length and max(tokens) < vocab_size and tokens[-1] == MARK and tokens.count(MARK) == 2
        assert labels[:-1] == [NO_TARGET] * (length - 1)
        assert labels[-1] == tokens[tokens.index(MARK) + 1] != MARK


def test_induction_marks_any_place_and_any_token_alike():
    samples = induction_samples(keys(20_000), 12, 6)
    places = np.bincount(samples.tokens_ST.argmin(axis=1), minlength=12)
    answers = np.bincount(samples.labels_ST[:, -1], minlength=6)
    assert (places[10:] == 0).all() and places[:10] == pytest.approx(2000, rel=0.1)
    assert answers[MARK] == 0 and answers[1:] == pytest.approx(4000, rel=0.1)


@given(pairs=st.integers(1, 8), more=st.integers(0, 40), spare=st.integers(0, 30), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_mqar_asks_each_key_once_for_its_value(pairs, more, spare, seed):
    length, vocab_size = 4 * pairs + more, 2 * pairs + 2 + spare
    samples = mqar_samples(keys(10, seed), length, pairs, vocab_size)
    for tokens, labels in zip(samples.tokens_ST, samples.labels_ST, strict=True):
        told = dict(zip(tokens[0 : 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist(), strict=True))
        asked = np.flatnonzero(labels != NO_TARGET)
        assert len(tokens) == length and len(told) == len(set(told.values())) == len(asked) == pairs
        assert asked.min() >= 2 * pairs and (asked % 2 == 0).all() and asked.max() < length
        assert {int(tokens[place]): int(labels[place]) for place in asked} == told
        assert all(0 < key < vocab_size // 2 <= value < vocab_size for key, value in told.items())
        assert tokens.min() >= 0 and tokens.max() < vocab_size


def test_gaps_fall_as_the_power_says():
    """The first gap drawn is distributed exactly by weight; with power 1 all gaps are alike."""
    for power in (0.01, 1.0):
        weights = np.arange(1, 17.0) ** (power - 1)
        drawn = np.bincount(draw_gaps(keys(40_000), 16, 3, power)[:, 0], minlength=16) / 40_000
        np.testing.assert_allclose(drawn, weights / weights.sum(), atol=0.006)
    gaps = draw_gaps(keys(200), 9, 9)
    assert (np.sort(gaps, axis=1) == np.arange(9)).all()


@given(lag=st.integers(2, 40), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_second_copies_are_asked_where_they_can_be_known(lag, seed):
    samples = repeated_blocks(keys(4, seed), lag, 9)
    for tokens, labels in zip(samples.tokens_ST, samples.labels_ST, strict=True):
        np.testing.assert_array_equal(tokens[:lag], tokens[lag:])
        asked = np.flatnonzero(labels != NO_TARGET)
        np.testing.assert_array_equal(asked, np.arange(lag, 2 * lag - 1))
        np.testing.assert_array_equal(labels[asked], tokens[asked + 1 - lag])


@given(shots=st.integers(0, 5), block=st.integers(2, 12), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_examples_show_how_the_last_block_is_copied(shots, block, seed):
    samples = copy_by_example(keys(4, seed), shots, block, 12)
    for tokens, labels in zip(samples.tokens_ST.tolist(), samples.labels_ST.tolist(), strict=True):
        shown = [tokens[start : start + 2 * block + 2] for start in range(0, len(tokens), 2 * block + 2)]
        assert len(shown) == shots + 1
        for part in shown:
            assert part[:block] == part[block + 1 : -1] and part[block] == ARROW and part[-1] == STOP
            assert min(part[:block]) >= 2
        asked = [place for place, label in enumerate(labels) if label != NO_TARGET]
        assert [labels[place] for place in asked] == shown[-1][block + 1 :]
        assert all(labels[place] == tokens[place + 1] for place in asked)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: induction_samples(keys(1), 2, 16), "length=2"),
        (lambda: induction_samples(keys(1), 9, 2), "vocabulary=2"),
        (lambda: mqar_samples(keys(1), 15, 4, 99), "pairs=4 need 16 tokens.*length is 15"),
        (lambda: mqar_samples(keys(1), 64, 8, 17), "need a vocabulary of 18.*has 17"),
        (lambda: repeated_blocks(keys(1), 1, 9), "blocks of 2"),
        (lambda: copy_by_example(keys(1), 2, 5, 3), "vocabulary=3"),
    ],
)
def test_what_has_no_room_is_refused(make, message):
    with pytest.raises(Refusal, match=message):
        make()
