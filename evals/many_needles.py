"""Many needles in one haystack, in the needle task's format and exact lengths: one of them is asked for, or all.

The three forms are RULER's (Hsieh et al. 2024, section 3.1) at the level of tokens:
multi_key    ` [AB=1234] ` ... ` [CD=5678] `, `?CD=5678`: the others distract;
multi_query  the same, every key asked for in turn: `?CD=5678` `?AB=1234`;
multi_value  one key with many values, asked for in the order in which they stand: `?AB=1234` `?AB=5678`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import nn

from data.order import derive
from data.recall import NeedleMaker, needle_grid
from evals.intervals import bounds
from evals.lengths import DISTINCT, Length, Samples, check_lengths
from evals.scoring import Cell, Materials, Rows, score_rows, sources_of
from model.loss import IGNORED
from settings import Refusal, Section

Form = Literal["multi_key", "multi_query", "multi_value"]


class ManyNeedlesSettings(Section):
    lengths: Annotated[tuple[Length, ...], DISTINCT] = Field(min_length=1)
    """Tokens in a sample, questions and answers included."""
    haystack: str
    """The source whose held-out text hides the needles."""
    forms: Annotated[tuple[Form, ...], DISTINCT] = Field(
        default=("multi_key", "multi_query", "multi_value"), min_length=1
    )
    needles: int = Field(default=4, ge=2, le=100_000)
    """Needles in each haystack, at depths drawn at random."""
    samples: Samples = 20
    """Samples of each form and length."""
    key_letters: int = Field(default=2, ge=1, le=8)
    value_digits: int = Field(default=4, ge=1, le=18)


@dataclass(frozen=True)
class ManySample:
    """Tokens (T,) with a question at the end for each of M values; the digits of a value begin at one of `starts_M`."""

    tokens: np.ndarray
    starts_M: np.ndarray


def check(settings: ManyNeedlesSettings, materials: Materials) -> None:
    """Refuse an unknown haystack and lengths that its held-out text or the questions do not fit."""
    sources_of(materials, [settings.haystack], "evals.many_needles.haystack")
    longest, asks_all = max(settings.lengths), any(form != "multi_key" for form in settings.forms)
    try:
        maker = NeedleMaker(materials.tokenizer, settings.needles, settings.key_letters, settings.value_digits)
    except Refusal as refusal:
        raise Refusal(f"evals.many_needles: {refusal}") from None
    least = maker.shortest + (settings.needles - 1) * maker.question_length * asks_all
    questions = "as many questions" if asks_all else "a question"
    why = f"needles={settings.needles}, {questions} and one token of haystack take {least} tokens"
    check_lengths("evals.many_needles.lengths", settings.lengths, least, why)
    try:
        for form in settings.forms:  # the more questions, the less haystack
            make_sample(settings, materials, 0, form=form, length=longest, number=0)
    except Refusal as refusal:
        raise Refusal(f"evals.many_needles.lengths={longest} does not fit: {refusal}") from None


def run(model: nn.Module, settings: ManyNeedlesSettings, materials: Materials, seed: int) -> list[Cell]:
    """A cell `many_needles/FORM` for each form and length: score is the share of values whose every digit is the first
    choice, given the values before; extra `exact`, the share of samples with all of them right, and `needles`."""
    check(settings, materials)
    cells = []
    for length in settings.lengths:
        for form in settings.forms:
            numbers = range(settings.samples)
            samples = [
                make_sample(settings, materials, seed, form=form, length=length, number=number) for number in numbers
            ]
            score, extra = ask(model, settings, materials, samples, seed)
            cells.append(Cell(f"many_needles/{form}", length, None, score, len(samples), extra))
    return cells


def ask(
    model: nn.Module, settings: ManyNeedlesSettings, materials: Materials, samples: list[ManySample], seed: int
) -> tuple[float, dict[str, float]]:
    """The score of samples of one form and length, and what stands beside it."""
    tokens_BT = np.stack([sample.tokens for sample in samples])
    # The token before predicts: labels stand one place earlier.
    place_BMX = np.stack([sample.starts_M for sample in samples])[..., None] + np.arange(settings.value_digits) - 1
    asked = np.arange(len(samples))[:, None, None], place_BMX
    labels_BT = np.full_like(tokens_BT, IGNORED)
    labels_BT[asked] = tokens_BT[asked[0], place_BMX + 1]
    greedy_BT, logprob_BT = score_rows(model, materials, Rows(tokens_BT, labels_BT))
    is_right_BMX = greedy_BT[asked] == labels_BT[asked]
    is_found_BM = is_right_BMX.all(axis=2)
    score_B = is_found_BM.mean(axis=1)
    extra = {
        "answer_logprob": float(logprob_BT[asked].mean()),
        "token_accuracy": float(is_right_BMX.mean()),
        "exact": float(is_found_BM.all(axis=1).mean()),
        "needles": settings.needles,
        **bounds(score_B, seed),
    }
    return float(score_B.mean()), extra


def make_sample(
    settings: ManyNeedlesSettings, materials: Materials, seed: int, *, form: Form, length: int, number: int
) -> ManySample:
    """Sample `number` of a form and length, a pure function of its arguments.

    A grid of needles is one haystack with each question in turn; here its questions stand behind each other.
    """
    rng = np.random.default_rng([seed, derive(form) % 2**32, length, number])
    depths, asked = np.sort(rng.random(settings.needles)).tolist(), rng.permutation(settings.needles)
    if form == "multi_key":
        asked = asked[:1]
    elif form == "multi_value":
        asked = np.sort(asked)  # the depths are sorted: as the values stand in the haystack
    maker = NeedleMaker(materials.tokenizer, settings.needles, settings.key_letters, settings.value_digits)
    grid = needle_grid(
        rng,
        materials.tokenizer,
        materials.held_out[settings.haystack],
        length - (len(asked) - 1) * maker.question_length,
        depths,
        key_letters=settings.key_letters,
        value_digits=settings.value_digits,
    )
    questions = [grid[index].tokens[-maker.question_length :] for index in asked[1:]]
    tokens = np.concatenate([grid[asked[0]].tokens, *questions])
    assert len(tokens) == length, "truncated sample"
    starts_M = grid[0].answer.start + maker.question_length * np.arange(len(asked))
    if form == "multi_value":
        equals = len(materials.tokenizer.encode("="))
        merge_keys(
            tokens, starts_M - equals - settings.key_letters, settings.key_letters, equals + settings.value_digits
        )
    return ManySample(tokens, starts_M)


def merge_keys(tokens: np.ndarray, keys_M: np.ndarray, letters: int, rest: int) -> None:
    """Give every needle the first one's key, in place. keys_M: where the questions write the keys; `rest` tokens behind
    a key tell its needle from all others."""
    first = tokens[keys_M[0] : keys_M[0] + letters].copy()
    needles = [tokens[start : start + letters + rest].copy() for start in keys_M]
    for needle in needles:
        windows = np.lib.stride_tricks.sliding_window_view(tokens, letters + rest)
        for start in np.flatnonzero((windows == needle).all(axis=1)):
            tokens[start : start + letters] = first
