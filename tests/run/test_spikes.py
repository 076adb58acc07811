"""What is a spike: the pure judgement over a window of numbers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from run.spikes import History, SpikeSettings, mean_and_deviation
from settings import Refusal, validate

NUMBERS = st.floats(min_value=2**-10, max_value=2**20)
WINDOWS = st.lists(NUMBERS, min_size=2, max_size=40)


def history(numbers: list[float], window: int | None = None, deviations: float = 6.0) -> History:
    """Of the loss alone, with so many numbers in it."""
    settings = SpikeSettings(window=window or len(numbers), deviations=deviations, of=("loss",))
    made = History(settings)
    for number in numbers:
        made.add({"loss": number, "gradient_norm": 0.0})
    return made


def is_spike(made: History, number: float) -> bool:
    return made.spike({"loss": number, "gradient_norm": 1e30}) is not None


@settings(deadline=None)
@given(WINDOWS, st.floats(0.5, 20))
def test_a_spike_is_what_is_so_many_deviations_above_the_mean(numbers: list[float], deviations: float) -> None:
    made = history(numbers, deviations=deviations)
    mean, deviation = mean_and_deviation(numbers)
    assert is_spike(made, (mean + deviations * deviation) * (1 + 1e-6) + 1e-9)
    assert not is_spike(made, (mean + deviations * deviation) * (1 - 1e-6))
    assert not is_spike(made, mean) and not is_spike(made, 0.0), "what is low is none"


@settings(deadline=None)
@given(NUMBERS, st.integers(2, 200))
def test_a_number_that_stays_the_same_is_none(number: float, count: int) -> None:
    assert not is_spike(history([number] * count), number)


@settings(deadline=None)
@given(WINDOWS, st.randoms(), NUMBERS)
def test_the_order_of_the_window_is_no_matter(numbers: list[float], random: object, number: float) -> None:
    shuffled = list(numbers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert is_spike(history(numbers), number) == is_spike(history(shuffled), number)


@settings(deadline=None)
@given(WINDOWS, st.lists(NUMBERS, max_size=30), NUMBERS)
def test_only_the_window_counts(numbers: list[float], earlier: list[float], number: float) -> None:
    window = len(numbers)
    assert is_spike(history(earlier + numbers, window), number) == is_spike(history(numbers, window), number)


@settings(deadline=None)
@given(WINDOWS, st.integers(2, 80), NUMBERS)
def test_nothing_is_judged_before_half_a_window(numbers: list[float], window: int, number: float) -> None:
    if len(numbers) < max(2, window // 2):
        assert not is_spike(history(numbers, window), 1e30)
    else:
        assert is_spike(history(numbers, window), 1e30)


@settings(deadline=None)
@given(WINDOWS, st.lists(NUMBERS, max_size=10), NUMBERS)
def test_it_comes_back_from_json_with_the_same_judgement(
    numbers: list[float], later: list[float], number: float
) -> None:
    made, window = history(numbers), len(numbers)
    restored = history([1.0] * 3, window)
    restored.restore(json.loads(json.dumps(made.state())))
    for each in later:
        for one in (made, restored):
            one.add({"loss": each, "gradient_norm": 0.0})
    assert restored.state() == made.state()
    said = [one.spike({"loss": number, "gradient_norm": 0.0}) for one in (made, restored)]
    assert said[0] == said[1]


def test_each_number_that_is_watched_is_judged_by_its_own_window() -> None:
    made = History(SpikeSettings(window=4))
    for step in range(4):
        made.add({"loss": 2.0 + step % 2, "gradient_norm": 100.0 + step % 2})
    assert made.spike({"loss": 3.0, "gradient_norm": 101.0}) is None
    assert made.spike({"loss": 50.0, "gradient_norm": 101.0}) == "the loss is 50 after a mean of 2.5 +- 0.58"
    assert "the gradient norm is 200" in (made.spike({"loss": 3.0, "gradient_norm": 200.0}) or "")
    made.forget()
    assert made.spike({"loss": 1e9, "gradient_norm": 1e9}) is None


def test_without_a_rule_nothing_is_kept_and_nothing_is_a_spike() -> None:
    made = History(None)
    for _ in range(1000):
        made.add({"loss": 1.0, "gradient_norm": 1.0})
    assert made.state() == {} and made.spike({"loss": 1e30, "gradient_norm": 1e30}) is None


@pytest.mark.parametrize("wrong", [{"window": 1}, {"of": []}, {"action": "stop"}, {"deviations": 0}])
def test_impossible_rules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(Refusal, match=next(iter(wrong))):
        validate(wrong, SpikeSettings, "spike")
