"""Passkey retrieval: one number in a text that repeats itself, asked for at the end, over lengths and depths.

Source: Mohtashami and Jaggi 2023 (epfml/landmark-attention, llama/run_test.py), as in jquesnelle/yarn, eval/passkey.py:
the same five lines. Mended: a key has five digits always; the filler is whole words, up to an exact number of tokens;
the depth is given and not drawn.
"""

import re
from functools import lru_cache
from itertools import accumulate
from random import Random
from typing import Annotated

import numpy as np
from pydantic import Field, field_validator
from torch import nn

from data.tokenizer import Tokenizer
from evals.lengths import DISTINCT, Length, Samples
from evals.questions import Answers, Question, ask
from evals.scoring import Cell, Materials
from settings import Refusal, Section

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
WRITTEN = 10
"""Tokens reserved for what a model writes."""


class PasskeySettings(Section):
    lengths: Annotated[tuple[Length, ...], DISTINCT] = Field(min_length=1)
    """Tokens of the prompt and of the ten reserved for the answer, together."""
    depths: Annotated[tuple[float, ...], DISTINCT] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    """Share of the filler that stands before the key."""
    samples: Samples = 20
    """Samples in each cell."""
    generate: bool = False
    """Let the model write too: right where the first number is the key."""

    @field_validator("depths")
    @classmethod
    def check_depths(cls, depths: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= depth <= 1 for depth in depths):
            raise ValueError("a depth is a share between 0 (start) and 1 (end of the filler)")
        return depths


def check(settings: PasskeySettings, materials: Materials) -> None:
    """Refuse lengths that the five lines do not fit."""
    key = longest_key(materials.tokenizer)  # type: ignore[arg-type]  # a protocol does not say that it is hashable
    make_question(materials.tokenizer, min(settings.lengths), 0.0, key)


def run(model: nn.Module, settings: PasskeySettings, materials: Materials, seed: int) -> list[Cell]:
    """A cell for each length and depth: score is the share of keys that are right teacher-forced, extra `generated`
    the share that is right when written."""
    check(settings, materials)
    cells = []
    for length in settings.lengths:
        for depth in settings.depths:
            questions = [
                make_question(materials.tokenizer, length, depth, draw_key(seed, length, depth, number))
                for number in range(settings.samples)
            ]
            answers = ask(model, materials, questions, writes=settings.generate)
            cell = answers.cell("passkey", length, depth, seed=seed)
            if settings.generate:
                cell.extra["generated"] = float(np.mean(is_found(answers)))
            cells.append(cell)
    return cells


@lru_cache(maxsize=1)  # under a second, but asked again at each evaluation
def longest_key(tokenizer: Tokenizer) -> int:
    """The key of most tokens: a tokenizer may have a token for some of them alone."""
    return max(range(10_000, 100_000), key=lambda key: len(tokenizer.encode(f" {key}")))


def draw_key(seed: int, length: int, depth: float, number: int) -> int:
    """Five digits, a pure function of its arguments."""
    return Random(f"{seed} passkey {length} {depth} {number}").randint(10_000, 99_999)


def make_question(tokenizer: Tokenizer, length: int, depth: float, key: int) -> Question:
    """A prompt of exactly `length` tokens less the reserve; what no whole word fills is line ends at the beginning."""
    key_text, answer = KEY.format(key=key), np.array(tokenizer.encode(f" {key}"))

    def encode(words: int, before: int) -> np.ndarray:
        lines = [TASK, filler(0, before), key_text, filler(before, words), QUESTION]
        return np.array(tokenizer.encode("\n".join(lines)))

    reserved = max(WRITTEN, len(answer))
    room = length - reserved
    words = most_words(tokenizer, room - len(encode(0, 0)))
    while words >= 0 and len(prompt := encode(words, round(depth * words))) > room:
        words -= 1
    if words < 0:
        raise Refusal(
            f"evals.passkey.lengths={length} does not fit: the lines without filler take {len(encode(0, 0))} tokens "
            f"and {reserved} are reserved for the answer; use {len(encode(0, 0)) + reserved} or more"
        )
    padding = np.array((tokenizer.encode("\n") * room)[: room - len(prompt)], dtype=prompt.dtype)
    return Question(np.concatenate([padding, prompt]), answer, (str(key),), WRITTEN, length, "evals.passkey")


def filler(start: int, stop: int) -> str:
    """Words `start` to `stop` of the sentences repeated for ever."""
    words = FILLER.split()
    return " ".join(words[index % len(words)] for index in range(start, stop))


def most_words(tokenizer: Tokenizer, room: int) -> int:
    """About how many words of filler take so many tokens; never too few."""
    ends = list(accumulate(len(tokenizer.encode(f" {word}")) for word in FILLER.split()))
    rounds, rest = divmod(max(0, room), ends[-1])
    return rounds * len(ends) + sum(end <= rest for end in ends) + 2


def is_found(answers: Answers) -> list[bool]:
    """Whether the first number that the model wrote is the key."""
    found = [re.search(r"\d+", text) for text in answers.texts]
    pairs = zip(found, answers.questions, strict=True)
    return [match is not None and match.group() == question.references[0] for match, question in pairs]
