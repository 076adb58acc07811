"""Copying by lag: random tokens that come a second time are predicted as far back as the model can look."""

from typing import Annotated

import numpy as np
from pydantic import Field
from torch import nn

from data.order import counted, derive
from data.positions import LONGEST
from data.synthetic.copying import check_copy, repeated_blocks
from evals.alphabet import alphabet, written_in
from evals.answers import answer_rows
from evals.lengths import DISTINCT, Length, Samples, check_lengths
from evals.scoring import Cell, Materials
from settings import Section

COMMON = 64
"""Tokens that blocks are made of, unless said: enough that a few of them name a place in a block."""
SHORTEST = 2
"""Tokens in a block."""


class CopyingSettings(Section):
    lags: Annotated[tuple[Length, ...], DISTINCT] = Field(min_length=1)
    """Tokens in a block; a row is a block and, right behind it, its copy."""
    vocabulary: int | None = Field(default=None, ge=4, le=LONGEST)
    """Different tokens; left out, the 64 most frequent, or as many as there are."""
    samples: Samples = 20
    """Rows of each lag."""


def check(settings: CopyingSettings, materials: Materials) -> None:
    """Refuse blocks too short to copy, and a vocabulary that the tokenizer does not give."""
    why = "a copy's first token is not asked, so that a row, which is two blocks, has 4 tokens at least"
    check_lengths("evals.copying.lags", settings.lags, SHORTEST, why)
    check_copy(SHORTEST, len(_alphabet(settings, materials)))


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
