"""The size that fits where one more does not: found in few steps, and never searched for without end."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.ruler.fill import UNBOUNDED, fill
from settings import Refusal


class Counting:
    """Tokens of each size, and how often they were asked for."""

    def __init__(self, tokens_of):
        self.tokens_of, self.asked = tokens_of, []

    def __call__(self, size: int) -> int:
        self.asked.append(size)
        return self.tokens_of(size)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.integers(0, 9), min_size=1, max_size=300),
    room=st.integers(0, 1500),
    smallest=st.integers(1, 4),
    guess=st.integers(0, 400),
)
def test_one_more_does_not_fit(steps: list[int], room: int, smallest: int, guess: int) -> None:
    """Tokens that never fall: the answer is that of trying every size."""
    totals = list(itertools.accumulate([10, *steps]))
    largest = smallest + len(totals) - 1
    measure = Counting(lambda size: totals[size - smallest])
    fitting = [size for size in range(smallest, largest + 1) if measure.tokens_of(size) <= room]
    if not fitting:
        with pytest.raises(Refusal, match=f"takes 10 tokens where {room} are left"):
            fill(measure, room, smallest, largest, guess)
        assert measure.asked == [smallest]
    else:
        assert fill(measure, room, smallest, largest, guess) == max(fitting)
        assert len(measure.asked) <= 25 and len(set(measure.asked)) == len(measure.asked)


@settings(max_examples=100, deadline=None)
@given(noise=st.lists(st.integers(-6, 6), min_size=60, max_size=60), room=st.integers(40, 300))
def test_tokens_that_go_up_and_down_still_fit(noise: list[int], room: int) -> None:
    """Other draws for another size may take fewer tokens: what is found fits, and its neighbour does not."""
    measure = Counting(lambda size: 20 + 4 * size + noise[size % 60])
    size = fill(measure, room, 1, UNBOUNDED, guess=2)
    assert measure.tokens_of(size) <= room < measure.tokens_of(size + 1)


@pytest.mark.parametrize(("guess", "most"), [(2, 8), (25_000, 4), (30_000, 4)])
def test_a_good_guess_costs_few_prompts(guess: int, most: int) -> None:
    measure = Counting(lambda size: 321 + 4 * size + size // 7)
    for room in (104_000, 131_072):
        measure.asked.clear()
        size = fill(measure, room, 1, UNBOUNDED, guess)
        assert measure.tokens_of(size) <= room < measure.tokens_of(size + 1)
        assert len(measure.asked) <= most and max(measure.asked) <= 2 * size


def test_what_costs_nothing_is_taken_whole() -> None:
    assert fill(lambda size: 5, 10, 1, 1000, 3) == 1000


def test_a_cliff_is_found_by_halving() -> None:
    """Where interpolation promises anything and nothing by turns."""
    measure = Counting(lambda size: 10 if size < 5_000 else 10_000)
    assert fill(measure, 100, 1, 20_000, guess=3) == 4_999
    assert len(measure.asked) < 30


def test_the_smallest_may_fill_the_room() -> None:
    assert fill(lambda size: 10 * size, 10, 1, UNBOUNDED, guess=7) == 1
    with pytest.raises(Refusal, match="takes 10 tokens where 9 are left"):
        fill(lambda size: 10 * size, 9, 1, UNBOUNDED, guess=7)
