"""Needle in a haystack: a key and its value hidden in held-out text, asked for at the end, over lengths and depths.

Sources: gkamradt's LLMTest_NeedleInAHaystack for the grid; exact match on random keys in place of a judge.
"""

from typing import Annotated

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import nn

from data.recall import NeedleMaker, NeedleSample, needle_grid, needle_sample
from evals.answers import answer_rows
from evals.lengths import DISTINCT, Length, Samples, check_lengths
from evals.scoring import Cell, Materials, Rows, sources_of
from model.loss import IGNORED
from settings import Refusal, Section

DEPTH_PARTS = 1_000_000
"""Depths are told apart to a millionth when a sample's randomness is derived."""


class NeedleSettings(Section):
    lengths: Annotated[tuple[Length, ...], DISTINCT] = Field(min_length=1)
    """Tokens in a sample, question and answer included."""
    haystack: str
    """The source whose held-out text hides the needle."""
    depths: Annotated[tuple[float, ...], DISTINCT] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    """Share of the haystack that stands before the needle: 0 is the farthest from the question, 1 the nearest."""
    samples: Samples = 20
    """Samples in each cell."""
    needles: int = Field(default=1, ge=1, le=100_000)
    """Needles in each haystack; one of them is asked for."""
    one_haystack: bool = False
    """A sample is one haystack with a needle at every depth, asked for one after the other: a grid of many depths is
    read about once a length. Left out, each cell has haystacks of its own, with so many `needles` in each."""
    key_letters: int = Field(default=2, ge=1, le=8)
    value_digits: int = Field(default=4, ge=1, le=18)

    @field_validator("depths")
    @classmethod
    def check_depths(cls, depths: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= depth <= 1 for depth in depths):
            raise ValueError("a depth is a share between 0 (start) and 1 (end of the haystack)")
        return depths

    @model_validator(mode="after")
    def check_needles(self) -> "NeedleSettings":
        if self.one_haystack and self.needles != 1:
            raise ValueError(
                f"one_haystack=true hides a needle at each of the depths, not needles={self.needles}; leave one out"
            )
        return self


def check(settings: NeedleSettings, materials: Materials) -> None:
    """Refuse an unknown haystack and lengths that its held-out text or the question does not fit."""
    sources_of(materials, [settings.haystack], "evals.needle.haystack")
    available, longest = len(materials.held_out[settings.haystack]), max(settings.lengths)
    if available < longest:
        raise Refusal(
            f"evals.needle.lengths={longest} does not fit: source {settings.haystack!r} has {available} held-out "
            f"tokens; lower it to {available} or less, or choose a larger haystack"
        )
    needles = num_needles(settings)
    try:
        maker = NeedleMaker(materials.tokenizer, needles, settings.key_letters, settings.value_digits)
    except Refusal as refusal:
        raise Refusal(f"evals.needle: {refusal}") from None
    why = f"needles={needles}, a question and one token of haystack take {maker.shortest} tokens"
    check_lengths("evals.needle.lengths", settings.lengths, maker.shortest, why)


def num_needles(settings: NeedleSettings) -> int:
    """Needles in each haystack."""
    return len(settings.depths) if settings.one_haystack else settings.needles


def make_samples(settings: NeedleSettings, materials: Materials, seed: int, length: int) -> list[list[NeedleSample]]:
    """The samples of one length, a list for each depth."""
    numbers = range(settings.samples)
    if not settings.one_haystack:
        return [
            [make_sample(settings, materials, seed, length=length, depth=depth, number=number) for number in numbers]
            for depth in settings.depths
        ]
    grids = [make_grid(settings, materials, seed, length=length, number=number) for number in numbers]
    return [list(column) for column in zip(*grids, strict=True)]


def make_sample(
    settings: NeedleSettings, materials: Materials, seed: int, *, length: int, depth: float, number: int
) -> NeedleSample:
    """Sample `number` of a cell: a pure function of its arguments, so that every model is asked the same questions."""
    rng = np.random.default_rng([seed, length, round(depth * DEPTH_PARTS), number])
    sample = needle_sample(
        rng,
        materials.tokenizer,
        materials.held_out[settings.haystack],
        length,
        depth=depth,
        needles=settings.needles,
        key_letters=settings.key_letters,
        value_digits=settings.value_digits,
    )
    check_whole(sample, length)
    return sample


def make_grid(
    settings: NeedleSettings, materials: Materials, seed: int, *, length: int, number: int
) -> list[NeedleSample]:
    """Haystack `number` of a length, asked for the needle at each depth; a pure function like `make_sample`."""
    samples = needle_grid(
        np.random.default_rng([seed, length, number]),
        materials.tokenizer,
        materials.held_out[settings.haystack],
        length,
        settings.depths,
        key_letters=settings.key_letters,
        value_digits=settings.value_digits,
    )
    for sample in samples:
        check_whole(sample, length)
    return samples


def check_whole(sample: NeedleSample, length: int) -> None:
    """A sample cut short would be scored 0 and read as a finding about the model."""
    assert len(sample.tokens) == length and 0 < sample.answer.start < sample.answer.stop <= length, "truncated sample"


def to_rows(samples: list[NeedleSample]) -> Rows:
    """Samples of one length as rows in which only the answers are asked."""
    tokens_BT = np.stack([sample.tokens for sample in samples]).astype(np.int64)
    labels_BT = np.full_like(tokens_BT, IGNORED)
    for row, sample in enumerate(samples):
        answer = sample.answer
        labels_BT[row, answer.start - 1 : answer.stop - 1] = tokens_BT[row, answer]
    return Rows(tokens_BT, labels_BT)


def run(model: nn.Module, settings: NeedleSettings, materials: Materials, seed: int) -> list[Cell]:
    """One cell for each length and depth: score is the share of samples whose whole answer is the model's first choice.

    Teacher-forced: right at every answer token is the same as right when generated greedily, in one forward pass.
    Extra: `answer_logprob` (mean nats of an answer token) and `token_accuracy` move before exact match does; `low` and
    `high` bound the score.
    """
    check(settings, materials)
    needles = {"needles": num_needles(settings)}
    cells = []
    for length in settings.lengths:
        rows = to_rows([sample for of_depth in make_samples(settings, materials, seed, length) for sample in of_depth])
        answers = answer_rows(model, materials, rows)
        for index, depth in enumerate(settings.depths):
            part = slice(index * settings.samples, (index + 1) * settings.samples)
            cells.append(answers.cell("needle", length, depth, rows=part, extra=needles))
    return cells
