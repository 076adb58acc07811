"""Growth inside a stage: every step's length, and that no sample of a length is used twice or left out."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from context.growth import (
    Growth,
    LinearGrowth,
    PowerOfTwoGrowth,
    WindowGrowth,
    ladder,
    lengths_of,
    one_cycle,
    window_of,
)
from context.lengths import Lengths, divisors, one_length
from context.rotary import DefaultRotary
from context.stages import Stages, StageSettings
from settings import Refusal

plain = DefaultRotary(base=1e4)
# A busy machine is no failure.
patient = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def stage(steps: int, length: int, growth: Growth | None, step: int = 4096, **more) -> StageSettings:
    return StageSettings(until_tokens=steps * step, sequence_length=length, rotary=plain, growth=growth, **more)


def plan_of(steps: int, length: int, growth: Growth | None, step: int = 4096) -> list[int]:
    (placed,) = Stages([stage(steps, length, growth, step)], step)
    return [placed.step(number).sequence_length for number in range(placed.num_steps)]


@st.composite
def growing(draw: Callable) -> tuple[Growth | None, int, int, int]:
    """(growth, the stage's length, tokens a step, steps) that go together."""
    length, rows = 2 ** draw(st.integers(3, 8)), draw(st.sampled_from([1, 2, 3, 6]))
    tokens_per_step = length * rows
    halvings = draw(st.integers(0, 3))
    cycles = draw(st.integers(1, 4))
    start = draw(st.sampled_from(divisors(tokens_per_step)))
    growth = draw(
        st.sampled_from(
            [
                None,
                LinearGrowth(start=start, granularity=draw(st.sampled_from(divisors(start)))),
                PowerOfTwoGrowth(
                    shortest=length >> halvings, cycles=cycles, odds=draw(st.sampled_from([0.5, 1, 2, 100]))
                ),
                WindowGrowth(start=draw(st.integers(1, length - 1)), rate=draw(st.sampled_from([0.125, 1.0, 7.3]))),
            ]
        )
    )
    return growth, length, tokens_per_step, draw(st.integers((halvings + 1) * cycles, 60))


@patient
@given(st.lists(growing(), min_size=1, max_size=3))
def test_no_sample_is_used_twice_and_none_is_left_out(plans: list) -> None:
    """Over the whole run, walked step by step as the loop walks it."""
    stages, until = [], 0
    for growth, length, step, steps in plans:
        until += steps * step
        more = StageSettings(until_tokens=until, sequence_length=length, rotary=plain, growth=growth)
        stages.append(more.model_copy(update={"tokens_per_step": step}))
    placed, used, tokens = Stages(stages, 1), Counter(), 0
    while tokens < placed.total_tokens:
        step = placed.step(tokens)
        assert step.start_tokens == tokens and step.num_samples * step.sequence_length == step.num_tokens
        where = (step.stage.index, step.sequence_length)
        assert step.first_sample == used[where], "neither a gap nor a sample again"
        used[where] += step.num_samples
        assert placed.last_step(step.end_tokens) == step
        tokens = step.end_tokens
    assert tokens == until
    firsts = {(s.stage.index, s.sequence_length): s for s in placed.first_steps()}
    assert firsts.keys() == used.keys() and all(step.first_sample == 0 for step in firsts.values())


@patient
@given(growing(), st.data())
def test_a_step_is_the_same_however_one_came_to_it(plan: tuple, data: st.DataObject) -> None:
    """A resume makes its stages anew, and asks for its own step first."""
    growth, length, step, steps = plan
    walked = [
        Stages([stage(steps, length, growth, step)], step).step(tokens) for tokens in range(0, steps * step, step)
    ]
    number = data.draw(st.integers(0, steps - 1))
    lengths_of.cache_clear()
    fresh = Stages([stage(steps, length, growth, step)], step)
    assert fresh.step(number * step) == walked[number]
    for wrong in {number * step + 1, number * step - 1} - set(range(0, steps * step + 1, step)):
        with pytest.raises(Refusal, match="not at a step boundary"):
            fresh.step(wrong)


@patient
@given(st.lists(st.sampled_from([64, 128, 256]), min_size=1, max_size=20))
def test_lengths_count_like_a_plain_walk(cycle: list[int]) -> None:
    lengths, seen = Lengths(np.array(cycle)), Counter()
    for number in range(3 * len(cycle)):
        length = cycle[number % len(cycle)]
        assert lengths.at(number) == (length, seen[length])
        seen[length] += 1
    assert [cycle[step] for step in lengths.first_steps()] == list(dict.fromkeys(cycle))
    assert lengths.distinct.tolist() == sorted(set(cycle))


def test_linear_growth_climbs_the_lengths_that_a_step_can_hold() -> None:
    assert plan_of(8, 512, LinearGrowth(start=64)) == [64, 128, 128, 256, 256, 256, 256, 512]
    # 12,288 is three times a power of two: half-way lengths come in between.
    assert sorted(set(plan_of(40, 512, LinearGrowth(start=128), 12_288))) == [128, 192, 256, 384, 512]
    assert sorted(set(plan_of(40, 512, LinearGrowth(start=128, granularity=128), 12_288))) == [128, 256, 384, 512]
    assert ladder(LinearGrowth(start=128, granularity=128), 448, 12_288) == [128, 256, 384, 448]
    assert plan_of(5, 64, LinearGrowth(start=512)) == [512, 256, 256, 128, 64], "rows may become shorter"
    assert plan_of(1, 512, LinearGrowth(start=64)) == [512] and plan_of(2, 512, LinearGrowth(start=64)) == [64, 512]


@patient
@given(growing())
def test_linear_growth_never_turns_back_and_ends_at_the_stages_length(plan: tuple) -> None:
    growth, length, step, steps = plan
    if isinstance(growth, LinearGrowth):
        lengths = plan_of(steps, length, growth, step)
        assert lengths == sorted(lengths, reverse=growth.start > length) and lengths[-1] == length
        assert lengths[0] == (growth.start if steps > 1 else length)
        last = steps - 1
        line = [growth.start + (length - growth.start) * number / last for number in range(steps)] if last else [length]
        rungs = ladder(growth, length, step)
        assert all(
            got <= want and not any(got < r <= want - 1 for r in rungs) for got, want in zip(lengths, line, strict=True)
        )


def test_grow_p2_is_the_published_curriculum() -> None:
    """Odds 32:16:8:4:2:1: of the first half of a cycle's steps nearly all are short, and all lengths come as often."""
    lengths = 2 ** np.arange(8, 14)
    cycle = one_cycle(lengths, 2.0, 6 * 64)
    assert Counter(cycle.tolist()) == {int(length): 64 for length in lengths}
    # Until the shortest run out, steps come as the odds say.
    head = Counter(cycle[:126].tolist())
    assert [head[int(length)] for length in lengths] == [64, 32, 16, 8, 4, 2]
    # The next longer ones then run out one after the other, and the longest are last.
    ends = [int(np.flatnonzero(cycle == length).max()) for length in lengths]
    assert ends == sorted(ends) and set(cycle[-30:].tolist()) == {8192}
    assert one_cycle(lengths[:2], 1.0, 6).tolist() == [256, 512] * 3
    assert one_cycle(lengths[:2], 0.25, 6).tolist() == [512, 512, 256, 512, 256, 256]
    assert one_cycle(lengths[:3], 2.0, 5).tolist().count(256) == 1, "what does not share out goes to the longest"


@patient
@given(growing())
def test_power_of_two_growth_gives_each_length_as_many_steps_and_begins_with_the_longest(plan: tuple) -> None:
    growth, length, step, steps = plan
    if isinstance(growth, PowerOfTwoGrowth):
        lengths = plan_of(steps, length, growth, step)
        counts = Counter(lengths)
        assert lengths[0] == max(lengths) == length and min(lengths) == growth.shortest
        assert max(counts.values()) - min(counts.values()) <= growth.cycles
        assert counts[length] == max(counts.values())


def test_cycles_are_gone_through_again() -> None:
    lengths = plan_of(64, 512, PowerOfTwoGrowth(shortest=64, cycles=2))
    assert lengths[0] == 512, "the first long step stands at the front"
    assert lengths[32:] == one_cycle(np.array([64, 128, 256, 512]), 2.0, 32).tolist()
    assert sorted(lengths[:32]) == sorted(lengths[32:])


def test_the_window_widens_by_the_published_rule() -> None:
    """w(t) = min(w_end, w_start + floor(alpha t))."""
    ladder = WindowGrowth(start=32, rate=0.125)
    assert [window_of(ladder, 128, step) for step in (0, 7, 8, 15, 767, 768, 10**6)] == [
        32,
        32,
        33,
        33,
        127,
        None,
        None,
    ]
    assert [window_of(WindowGrowth(start=8, rate=3.0, end=20), 64, step) for step in range(6)] == [
        8,
        11,
        14,
        17,
        20,
        20,
    ]
    assert window_of(WindowGrowth(start=8, rate=3.0, end=100), 64, 99) is None, "wider than a row is no window"
    assert window_of(None, 128, 0) is None and window_of(LinearGrowth(start=8), 128, 0) is None
    (placed,) = Stages([stage(4, 64, WindowGrowth(start=8, rate=16.0))], 4096)
    steps = [placed.step(number) for number in range(4)]
    assert [step.window for step in steps] == [8, 24, 40, 56]
    assert [step.sequence_length for step in steps] == [64] * 4 and [s.first_sample for s in steps] == [0, 64, 128, 192]


@pytest.mark.parametrize(
    ("growth", "steps", "words"),
    [
        (
            LinearGrowth(start=96),
            8,
            r"stages\.0\.growth\.start=96 must divide tokens_per_step=4096; try start 64 or 128",
        ),
        (PowerOfTwoGrowth(shortest=100), 80, r"growth\.shortest=100 must be sequence_length=512 halved.*; try 128$"),
        (PowerOfTwoGrowth(shortest=1024), 80, r"growth\.shortest=1024 must be sequence_length=512 halved.*; try 512$"),
        (PowerOfTwoGrowth(shortest=64), 31, "8 cycles of 4 lengths need as many steps at least, but the stage has 31"),
        (WindowGrowth(start=512), 8, r"growth\.start=512 must be below sequence_length=512.*; try 64"),
        (
            WindowGrowth(start=8, end=513),
            8,
            r"stages\.0\.growth\.end=513 is above sequence_length=512, .*; leave it out",
        ),
    ],
)
def test_growths_that_cannot_be_are_refused_with_a_way_out(growth: Growth, steps: int, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        Stages([stage(steps, 512, growth)], 4096)


def test_a_stage_of_more_steps_than_memory_is_refused_before_it_is_laid_out() -> None:
    with pytest.raises(Refusal, match="more than 10000000; raise tokens_per_step"):
        Stages([stage(10_000_001, 64, LinearGrowth(start=8), 64)], 64)
    assert Stages([stage(10**12, 64, None, 64)], 64)[0].step(10**11).first_sample == 10**11
    assert one_length(64).at(10**15) == (64, 10**15)


@pytest.mark.parametrize("rate", [1e308, 5e-324])
def test_any_rate_gives_a_window_of_a_row_at_most(rate: float) -> None:
    growth = WindowGrowth(start=8, rate=rate)
    assert [window_of(growth, 64, step) for step in (0, 10)] == [8, None if rate > 1 else 8]
    assert window_of(WindowGrowth(start=8, rate=rate, end=32), 64, 10) == (32 if rate > 1 else 8)


def test_a_start_is_one_of_the_lengths() -> None:
    with pytest.raises(ValidationError, match="start=96 must be a multiple of granularity=128; try granularity=96"):
        LinearGrowth(start=96, granularity=128)


def test_a_window_that_narrows_is_refused() -> None:
    with pytest.raises(ValidationError, match="end=16 must not be below start=32"):
        WindowGrowth(end=16)
