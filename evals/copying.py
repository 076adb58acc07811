"""Copying by lag: random tokens that come a second time are predicted as far back as the model can look."""

import numpy as np
from pydantic import Field, PositiveInt
from torch import nn

from data.order import counted, derive
from data.synthetic.copying import check_copy, repeated_blocks
from evals.alphabet import alphabet, written_in
from evals.answers import answer_rows
from evals.scoring import Cell, Materials
from settings import Section

COMMON = 64
"""Tokens that blocks are made of, unless said: enough that a few of them name a place in a block."""


class CopyingSettings(Section):
    lags: tuple[PositiveInt, ...] = Field(min_length=1)
    """Tokens in a block; a row is a block and, right behind it, its copy."""
    vocabulary: PositiveInt | None = None
    """Different tokens; left out, the 64 most frequent, or as many as there are."""
    samples: PositiveInt = 20
    """Rows of each lag."""


def check(settings: CopyingSettings, materials: Materials) -> None:
    """Refuse blocks too short to copy, and a vocabulary that the tokenizer does not give."""
    check_copy(min(settings.lags), len(_alphabet(settings, materials)))


def run(model: nn.Module, settings: CopyingSettings, materials: Materials, seed: int) -> list[Cell]:
    """One cell a lag: score is the share of the copy's tokens that are the model's first choice, the first left out.

    Extra: `lag`, and `loss` in nats a token; guessing costs the logarithm of the vocabulary.
    """
    check(settings, materials)
    ids_V, cells = _alphabet(settings, materials), []
    for lag in settings.lags:
        keys_S = counted(derive(seed, "copying", lag), np.arange(settings.samples))
        answers = answer_rows(model, materials, written_in(ids_V, repeated_blocks(keys_S, lag, len(ids_V))))
        extra = {"lag": lag, "loss": -float(answers.logprob_S.mean())}
        cells.append(answers.cell("copying", 2 * lag, by="accuracy", extra=extra))
    return cells


def _alphabet(settings: CopyingSettings, materials: Materials) -> np.ndarray:
    return alphabet(materials, settings.vocabulary, "evals.copying.vocabulary", at_most=COMMON)
