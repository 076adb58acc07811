"""Induction heads by length: what followed the only other mark of a row of random tokens (Mamba, table 11)."""

from typing import Annotated

import numpy as np
from pydantic import Field
from torch import nn

from data.order import counted, derive
from data.positions import LONGEST
from data.synthetic.induction import SHORTEST, induction_samples
from evals.alphabet import alphabet, written_in
from evals.answers import answer_rows
from evals.lengths import DISTINCT, Length, Samples, check_lengths
from evals.scoring import Cell, Materials
from settings import Section


class InductionSettings(Section):
    lengths: Annotated[tuple[Length, ...], DISTINCT] = Field(min_length=1)
    """Tokens in a row, both marks included."""
    vocabulary: int = Field(default=16, ge=SHORTEST, le=LONGEST)
    """Different tokens, the mark among them."""
    samples: Samples = 100
    """Rows of each length."""


def check(settings: InductionSettings, materials: Materials) -> None:
    """Refuse a row without room, and a vocabulary that the tokenizer does not give."""
    alphabet(materials, settings.vocabulary, "evals.induction.vocabulary")
    why = "the mark stands twice, and what follows it once"
    check_lengths("evals.induction.lengths", settings.lengths, SHORTEST, why)


def run(model: nn.Module, settings: InductionSettings, materials: Materials, seed: int) -> list[Cell]:
    """One cell a length: score is the share of rows whose answer is the model's first choice; guessing: 1 / 15."""
    check(settings, materials)
    ids_V, cells = alphabet(materials, settings.vocabulary, "evals.induction.vocabulary"), []
    for length in settings.lengths:
        keys_S = counted(derive(seed, "induction", length), np.arange(settings.samples))
        rows = written_in(ids_V, induction_samples(keys_S, length, settings.vocabulary))
        cells.append(answer_rows(model, materials, rows).cell("induction", length))
    return cells
