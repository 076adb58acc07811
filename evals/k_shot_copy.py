"""Copying by example: how many copied blocks a model must see before it copies the next one."""

from typing import Annotated

import numpy as np
from pydantic import Field
from torch import nn

from data.order import counted, derive
from data.positions import LONGEST
from data.synthetic.copying import check_copy, copy_by_example
from evals.alphabet import alphabet, written_in
from evals.answers import answer_rows
from evals.copying import COMMON, SHORTEST
from evals.lengths import DISTINCT, Samples
from evals.scoring import Cell, Materials
from settings import Section


class KShotCopySettings(Section):
    shots: Annotated[tuple[Annotated[int, Field(ge=0, le=100_000)], ...], DISTINCT] = Field(
        default=(0, 1, 2, 4, 8), min_length=1
    )
    """Copied blocks before the one that is asked."""
    block: int = Field(default=8, ge=SHORTEST, le=LONGEST)
    """Tokens in a block."""
    vocabulary: int | None = Field(default=None, ge=4, le=LONGEST)
    """Different tokens, two of them marks; left out, the 64 most frequent, or as many as there are."""
    samples: Samples = 50
    """Rows of each number of shots."""


def check(settings: KShotCopySettings, materials: Materials) -> None:
    """Refuse blocks too short to copy, and a vocabulary that the tokenizer does not give."""
    check_copy(settings.block, len(_alphabet(settings, materials)))


def run(model: nn.Module, settings: KShotCopySettings, materials: Materials, seed: int) -> list[Cell]:
    """One cell a number of shots: score is the share of rows whose last copy, its end included, is right throughout.

    Extra: `shots`.
    """
    check(settings, materials)
    ids_V, cells = _alphabet(settings, materials), []
    for shots in settings.shots:
        keys_S = counted(derive(seed, "k_shot_copy", shots), np.arange(settings.samples))
        rows = written_in(ids_V, copy_by_example(keys_S, shots, settings.block, len(ids_V)))
        answers = answer_rows(model, materials, rows)
        cells.append(answers.cell("k_shot_copy", rows.tokens_BT.shape[1], extra={"shots": shots}))
    return cells


def _alphabet(settings: KShotCopySettings, materials: Materials) -> np.ndarray:
    return alphabet(materials, settings.vocabulary, "evals.k_shot_copy.vocabulary", at_most=COMMON)
