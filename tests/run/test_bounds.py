"""Whatever number a stage or a source is given, it is refused by name or a configuration comes of it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from context.frequencies import frequencies
from context.reach import FARTHEST, first_distance_disliked
from context.rotary import LongRotary, NtkRotary, YarnRotary
from data.batches import Batches
from data.positions import LONGEST
from run.config import MOST_TOKENS, load_config, rows_of_step, show
from run.demand import demand_of
from settings import Refusal

TINY = Path(__file__).parents[1] / "tiny.toml"
STAGE = "context.stages.0"
ODD = ("inf", "-inf", "nan", "1e308", "1e-308", str(2**62), str(2**63), str(2**40), "-1", "0", "1", "true")
YARN = "rotary={kind='yarn', base=1e4, factor=2.0, original_length=64, beta_fast=32.0, beta_slow=1.0}"
WINDOW = "growth={kind='window', start=8, rate=1.0, end=64}"
POSE = "positions={kind='pose', reach=512, chunks=3}"
KEYS = {
    "": ("until_tokens", "sequence_length", "tokens_per_step", "context", "mixture.words"),
    YARN: ("rotary.base", "rotary.factor", "rotary.original_length", "rotary.beta_fast", "rotary.beta_slow"),
    "growth={kind='linear', start=16, granularity=16}": ("growth.start", "growth.granularity"),
    "growth={kind='power_of_two', shortest=32, cycles=2}": ("growth.shortest", "growth.cycles", "growth.odds"),
    WINDOW: ("growth.start", "growth.rate", "growth.end"),
    POSE: ("positions.reach", "positions.chunks"),
    "learning_rate={kind='rewarm', peak=1e-3, warmup_tokens=64}": (
        "learning_rate.peak", "learning_rate.warmup_tokens", "learning_rate.final",
    ),
    "buckets={words=[{from_tokens=8, share=1.0}]}": ("buckets.words.0.from_tokens", "buckets.words.0.share"),
}  # fmt: skip


def stages_asked() -> Iterator[tuple[str, ...]]:
    for table, keys in KEYS.items():
        for key in keys:
            yield tuple(filter(None, (f"{STAGE}.{table}" if table else "", f"{STAGE}.{key}")))
    for key in ("weight", "answer_weight", "needles", "key_letters", "value_digits", "fractions.0"):
        yield (f"data.sources.needles.{key}",)


@pytest.mark.parametrize("asked", stages_asked(), ids=lambda asked: asked[-1])
@pytest.mark.parametrize("value", ODD)
def test_numbers_are_refused_or_taken(asked: tuple[str, ...], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    *before, key = asked
    try:
        config = load_config(TINY, [f"{STAGE}.mixture={{words = 1.0}}", *before, f"{key}={value}"])
    except Refusal as refusal:
        assert str(refusal).startswith(f"{TINY}: ")
        return
    show(config)
    for stage in config.stages:
        for number in (0, stage.num_steps - 1):
            step = stage.step(number)
            assert 1 <= step.sequence_length <= LONGEST and (step.window or 1) >= 1
            assert math.isfinite(stage.learning_rate(step.end_tokens) or 0.0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{STAGE}.tokens_per_step={2**41}"], rf"stages\.0\.tokens_per_step={2**41}: .*less than or equal to {2**40}"),
        ([f"{STAGE}.sequence_length={2**28}"], rf"sequence_length={2**28}: .*less than or equal to {LONGEST}"),
        ([f"{STAGE}.positions={{kind='pose', reach=4_000_000_000_000}}"], r"positions\.reach=4000000000000: .*less"),
        ([f"{STAGE}.context={2**20}"], r"context\.stages\.0\.context=1048576 is above 256, the most ranks"),
        ([f"parallel.context={2**20}"], r"parallel\.context=1048576 is above 256, the most ranks"),
        ([f"{STAGE}.buckets={{wurds=[{{from_tokens=8, share=1.0}}]}}"], r"buckets\.wurds: no source of that name; did"),
        (
            ["context.stages.1.mixture={needles=1.0}", "context.stages.1.buckets={words=[{from_tokens=8, share=1.0}]}"],
            r"context\.stages\.1\.buckets\.words: the stage takes nothing of this source; give it a share in",
        ),
        (
            ["data.sources.words.weight=0.0", f"{STAGE}.buckets={{words=[{{from_tokens=8, share=1.0}}]}}"],
            r"context\.stages\.0\.buckets\.words: the stage takes nothing",
        ),
    ],
)  # fmt: skip
def test_what_no_run_can_mean_is_refused_with_its_key(overrides: list[str], expected: str) -> None:
    with pytest.raises(Refusal, match=expected):
        load_config(TINY, overrides)


def test_a_step_that_no_rank_can_hold_is_refused() -> None:
    def ask(tokens: int, ranks: int) -> int:
        huge = ("tokens_per_microbatch=256", f"tokens_per_step={tokens}", f"total_tokens={2 * tokens}")
        ends = (f"{STAGE}.until_tokens={tokens}", f"context.stages.1.until_tokens={2 * tokens}")
        config = load_config(TINY, [*huge, *ends, "context.stages.1.learning_rate={kind='continue'}"])
        return rows_of_step(config, config.stages.step(0), ranks)

    with pytest.raises(
        Refusal, match=rf"tokens_per_step={2 * MOST_TOKENS} gives each of 1 ranks more than {MOST_TOKENS}"
    ):
        ask(2 * MOST_TOKENS, 1)
    assert ask(2 * MOST_TOKENS, 2) == ask(MOST_TOKENS, 1) == 4


@pytest.mark.parametrize(
    "spec",
    [
        NtkRotary(base=1e4, factor=1e308),
        YarnRotary(base=1e4, factor=2.0, original_length=64, beta_slow=1e-308),
        YarnRotary(base=1e4, factor=2.0, original_length=64, attention_factor=1e300),
    ],
)
def test_a_rotation_that_is_no_number_is_refused(spec: Any) -> None:
    with pytest.raises(Refusal, match=rf"rotary kind '{spec.kind}' cannot be computed with base=10000\.0, "):
        frequencies(spec, 8)


def test_one_token_is_no_length_to_stretch_from() -> None:
    with pytest.raises(ValueError, match="original_length"):
        LongRotary(base=1e4, factor=2.0, original_length=1, short=[1.0], long=[1.0], use="long")


def test_distances_are_looked_at_as_far_as_rows_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for one that is nowhere ends: a base of 1e300 never dislikes."""
    monkeypatch.setattr("context.reach.FARTHEST", 100)
    assert FARTHEST <= LONGEST
    speeds_P = frequencies(YarnRotary(base=1e300, factor=1.0, original_length=64), 8)[0] * 0
    assert first_distance_disliked(speeds_P, LONGEST) is None


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Where the data of the smallest run lies."""
    rng = np.random.default_rng(0)
    text = " ".join(map(str, rng.integers(0, 10**6, 2000)))
    (tmp_path / "words.txt").write_text(text)
    return [
        f"data.sources.words={{kind='text', path='{tmp_path}/words.txt', held_out=0.0}}",
        f"data.prepared={tmp_path}/prepared",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("mixture={words=1.0}|buckets={words=[{from_tokens=90_000, share=1.0}]}", r": data\.sources\.words: has no"),
        ("positions={kind='pose', reach=32}", r": positions\.reach=32 is below sequence_length=64"),
        ("buckets={needles=[{from_tokens=8, share=1.0}]}", r": buckets\.needles: this source makes its samples"),
        ("mixture={words=1.0}|pack=decompose|growth={kind='linear', start=1}", r"\.growth, rows of 1 tokens: .*no doc"),
        ("growth={kind='linear', start=16}", r"\.growth, rows of 16 tokens: data\.sources\.needles: fractions="),
        (
            "mixture={words=1.0, needles=1.0}|mixture_unit=documents|buckets={needles=[{from_tokens=8, share=1.0}]}",
            r": buckets\.needles: this source makes its samples",
        ),
    ],
)  # fmt: skip
def test_what_the_data_cannot_give_names_the_stage(words: list[str], overrides: str, expected: str) -> None:
    asked = [f"{STAGE}.{override}" for override in overrides.split("|")]
    config = load_config(TINY, [*words, "tokens_per_microbatch=512", *asked])
    batches = Batches(config.data, seed=0)
    with pytest.raises(Refusal, match=rf"^context\.stages\.0{expected}"):
        for step in config.stages.first_steps():
            batches.check(demand_of(step, batches))
