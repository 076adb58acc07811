"""Multi-query associative recall by length and number of pairs (Zoology, arXiv 2312.04927)."""

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveFloat
from torch import nn

from data.order import counted, derive
from data.synthetic.mqar import POWER, check_mqar, mqar_samples
from evals.alphabet import alphabet, written_in
from evals.answers import answer_rows
from evals.lengths import DISTINCT, Length, Samples, check_lengths
from evals.scoring import Cell, Materials
from settings import Refusal, Section

PUBLISHED_VOCABULARY = 8192
USUAL_PAIRS = (4, 16, 64, 256)


class MqarSettings(Section):
    lengths: Annotated[tuple[Length, ...], DISTINCT] = Field(min_length=1)
    """Tokens in a row; an even number."""
    pairs: Annotated[tuple[Length, ...], DISTINCT] | None = Field(default=None, min_length=1)
    """Pairs of key and value in a row, asked at every length that has 4 tokens for each; left out, those of 4, 16, 64
    and 256 that length and vocabulary have room for."""
    vocabulary: Length | None = None
    """Different tokens, half of them keys; left out, 8192 as published, or all that the held-out text has."""
    samples: Samples = 50
    """Rows of each length and number of pairs."""
    power: PositiveFloat = POWER
    """The chance that n pairs of tokens lie between what is told and what is asked goes as n ** (power - 1)."""


def check(settings: MqarSettings, materials: Materials) -> None:
    """Refuse lengths that are odd or without room for pairs, and pairs that no length or vocabulary has room for."""
    ids_V = _alphabet(settings, materials)
    for length in settings.lengths:
        if length % 2:
            raise Refusal(f"evals.mqar.lengths={length} is odd, but a key and its value take two; use {length + 1}")
    fewest = min(settings.pairs or USUAL_PAIRS)
    why = f"pairs={fewest} take {4 * fewest} tokens, to be told and asked"
    check_lengths("evals.mqar.lengths", settings.lengths, 4 * fewest, why)
    for pairs in settings.pairs or USUAL_PAIRS[:1]:
        try:
            check_mqar(max(settings.lengths), pairs, len(ids_V))
        except Refusal as refusal:
            raise Refusal(f"evals.mqar.pairs={pairs} does not fit: {refusal}") from None


def run(model: nn.Module, settings: MqarSettings, materials: Materials, seed: int) -> list[Cell]:
    """One cell for each length and number of pairs: score is the share of keys that are answered, `exact` of rows.

    Extra: `pairs`.
    """
    check(settings, materials)
    ids_V, cells = _alphabet(settings, materials), []
    for length, pairs in asked(settings, len(ids_V)):
        keys_S = counted(derive(seed, "mqar", length, pairs), np.arange(settings.samples))
        rows = written_in(ids_V, mqar_samples(keys_S, length, pairs, len(ids_V), settings.power))
        answers = answer_rows(model, materials, rows)
        cells.append(answers.cell("mqar", length, by="accuracy", extra={"pairs": pairs}))
    return cells


def asked(settings: MqarSettings, vocab_size: int) -> Iterator[tuple[int, int]]:
    """(length, pairs) of each cell."""
    most = vocab_size // 2 - 1
    wanted = settings.pairs or tuple(pairs for pairs in USUAL_PAIRS if pairs <= most)
    return ((length, pairs) for length in settings.lengths for pairs in wanted if 4 * pairs <= length)


def _alphabet(settings: MqarSettings, materials: Materials) -> np.ndarray:
    return alphabet(materials, settings.vocabulary, "evals.mqar.vocabulary", at_most=PUBLISHED_VOCABULARY)
