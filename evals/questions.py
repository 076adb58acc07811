"""Questions with one right continuation: asked by teacher forcing, and by letting the model write."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import nn

from data.tokenizer import Tokenizer
from evals.answers import RowAnswers, answer_rows
from evals.continuing import continue_greedily, staggered
from evals.intervals import bounds
from evals.scoring import Cell, Materials, Rows
from model.loss import IGNORED
from settings import Refusal

PADDED_AT_MOST = 1 / 8
"""Rows are read together whose lengths differ by at most this share; the shorter ones are padded."""


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that stands right behind it. Refused where the two do not fit: a prompt cut short would
    be scored 0 and read as a finding about the model."""

    prompt: np.ndarray
    """(P,) token ids, at least one."""
    answer: np.ndarray
    """(A,) token ids, at least one."""
    references: tuple[str, ...] = ()
    """Texts that what the model writes is searched for."""
    max_new_tokens: int = 0
    """Tokens reserved for what the model writes; fewer than the answer has mean as many as it has."""
    length: int | None = None
    """What prompt and reserved tokens may take together; left out: anything."""
    name: str = "question"
    """What a refusal calls it."""

    def __post_init__(self) -> None:
        if not len(self.prompt) or not len(self.answer):
            raise Refusal(f"{self.name}: has {len(self.prompt)} prompt and {len(self.answer)} answer tokens; give both")
        if self.length is not None and self.size > self.length:
            raise Refusal(
                f"{self.name}: {len(self.prompt)} prompt tokens and {self.reserved} reserved for the answer do not fit "
                f"length={self.length}; use {self.size} or more"
            )

    @classmethod
    def of_text(cls, tokenizer: Tokenizer, prompt: str, answer: str, **rest: object) -> "Question":
        """The question of two texts. They are encoded apart, as a model that writes gets the prompt alone."""
        return cls(np.array(tokenizer.encode(prompt)), np.array(tokenizer.encode(answer)), **rest)  # type: ignore[arg-type]

    @property
    def reserved(self) -> int:
        return max(len(self.answer), self.max_new_tokens)

    @property
    def size(self) -> int:
        """Tokens of the prompt and of the reserve."""
        return len(self.prompt) + self.reserved


@dataclass(frozen=True)
class Answers:
    """What a model made of S questions, in their order."""

    questions: tuple[Question, ...]
    tokenizer: Tokenizer
    led: RowAnswers
    """Teacher-forced: given the right answer tokens before."""
    written: tuple[np.ndarray, ...] | None
    """Tokens that the model wrote by itself; None: it was not asked to."""

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """What the model wrote."""
        assert self.written is not None, "ask(..., writes=True)"
        return tuple(self.tokenizer.decode(tokens) for tokens in self.written)

    @cached_property
    def is_written_S(self) -> np.ndarray:
        """Whether what the model wrote begins with the answer."""
        assert self.written is not None, "ask(..., writes=True)"
        pairs = zip(self.questions, self.written, strict=True)
        return np.array([np.array_equal(tokens[: len(asked.answer)], asked.answer) for asked, tokens in pairs])

    def cell(
        self, task: str, length: int, depth: float | None = None, score_S: np.ndarray | None = None, seed: int = 0
    ) -> Cell:
        """All questions as one cell: score is the mean of `score_S`; left out, the share exact when led.

        Extra: `answer_logprob`, `token_accuracy`, the interval, `exact` where it is not the score, and `generated`, the
        share of right answers among those written, where the model wrote.
        """
        led = self.led.cell(task, length, depth, seed=seed)
        written = {} if self.written is None else {"generated": float(self.is_written_S.mean())}
        if score_S is None:
            return replace(led, extra=led.extra | written)
        extra = {key: led.extra[key] for key in ("answer_logprob", "token_accuracy")}
        extra |= {"exact": led.score, **written, **bounds(score_S, seed)}
        return replace(led, score=float(score_S.mean()), extra=extra)


def ask(model: nn.Module, materials: Materials, questions: Sequence[Question], *, writes: bool = False) -> Answers:
    """Ask every question by teacher forcing and, with `writes`, let the model write after every prompt, greedily.

    `led.is_exact_S` and `is_written_S` differ where two tokens tie, and nowhere else.
    """
    led, written = _lead(model, materials, questions), None
    if writes:
        prompts, reserved = [asked.prompt for asked in questions], [asked.reserved for asked in questions]
        written = tuple(continue_greedily(model, materials, prompts, reserved))
    return Answers(tuple(questions), materials.tokenizer, led, written)


def _lead(model: nn.Module, materials: Materials, questions: Sequence[Question]) -> RowAnswers:
    count = len(questions)
    led = RowAnswers(np.zeros(count, dtype=bool), np.zeros(count), np.zeros(count))
    for part in alike(questions):
        rows = to_rows([questions[index] for index in part], materials.tokenizer.end_of_text)
        answered = answer_rows(model, materials, rows)
        led.is_exact_S[part], led.accuracy_S[part] = answered.is_exact_S, answered.accuracy_S
        led.logprob_S[part] = answered.logprob_S
    return led


def alike(questions: Sequence[Question]) -> Iterator[list[int]]:
    """Indices of questions that are read together: nearly as long as each other."""
    lengths = [len(asked.prompt) + len(asked.answer) - 1 for asked in questions]
    yield from staggered(lengths, lambda longest: longest * PADDED_AT_MOST)


def to_rows(questions: Sequence[Question], padding: int) -> Rows:
    """Questions as rows in which the answers alone are asked, padded at the end, where nothing before looks."""
    joined = [np.concatenate([asked.prompt, asked.answer]) for asked in questions]
    tokens_BT = np.full((len(joined), max(map(len, joined))), padding, dtype=np.int64)
    labels_BT = np.full_like(tokens_BT, IGNORED)
    for row, (asked, tokens) in enumerate(zip(questions, joined, strict=True)):
        tokens_BT[row, : len(tokens)] = tokens
        labels_BT[row, len(asked.prompt) - 1 : len(tokens) - 1] = asked.answer
    # The last token of the longest row predicts nothing.
    return Rows(tokens_BT[:, :-1], labels_BT[:, :-1])
