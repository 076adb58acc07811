"""The permutation is one, at every size and key, and its vectorised form is the plain one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import GOLDEN, MASK, ROUNDS, counted, derive, permute, scramble


def plain_scramble(number: int) -> int:
    number = (number + GOLDEN) & MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)


def plain_permute(index: int, count: int, key: int) -> int:
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(ROUNDS):
            round_key = plain_scramble((key + number) & MASK)
            left, right = right, left ^ (plain_scramble(right ^ round_key) & mask)
        index = (left << half) | right
        if index < count:
            return index


keys = st.integers(0, MASK)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 3000), key=keys)
def test_permutation_hits_every_number_once(count: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(count), count, key)), np.arange(count))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 2**40), key=keys, data=st.data())
def test_vectorised_equals_plain(count: int, key: int, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20))
    assert permute(np.array(index), count, key).tolist() == [plain_permute(i, count, key) for i in index]


def test_one_key_for_each_index_equals_one_key_at_a_time() -> None:
    index, some_keys = np.arange(50), counted(7, np.arange(50))
    together = permute(index, 50, some_keys)
    assert together.tolist() == [int(permute(i, 50, int(key))) for i, key in zip(index, some_keys, strict=True)]
    assert permute(np.zeros((1, 1), dtype=int), 576, np.array([[3]], dtype=np.uint64)).shape == (1, 1)
    assert permute(np.zeros(0, dtype=int), 1, 3).shape == (0,)


def test_known_numbers_of_splitmix64() -> None:
    # The first outputs of SplitMix64 from state 0 (Steele, Lea and Flood 2014; also Java's SplittableRandom).
    assert scramble(np.array([0, GOLDEN], dtype=np.uint64)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_permutation_has_no_visible_pattern() -> None:
    places = permute(np.arange(10_000), 10_000, 5)
    assert abs(np.corrcoef(np.arange(10_000), places)[0, 1]) < 0.03
    assert (np.abs(np.diff(places)) == 1).mean() < 0.002
    assert not np.array_equal(places, permute(np.arange(10_000), 10_000, 6))


def test_index_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="index 5 lies outside a permutation of 5"):
        permute(np.array([5]), 5, 0)


def test_derived_keys_tell_names_and_numbers_apart() -> None:
    assert len({derive(1, "a"), derive("1", "a"), derive(1, "b"), derive(2, "a"), derive("1a"), derive("a", 1)}) == 6
    assert derive(1, "a") == derive(1, "a")
