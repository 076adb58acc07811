"""Loss by position: later tokens of a long document are predicted better than early ones, if context is used."""

from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import PositiveInt, model_validator
from torch import nn

from evals.lengths import DISTINCT, Length
from evals.long_documents import long_windows, sources_with_long_documents
from evals.scoring import Cell, Materials, score_rows
from evals.windows import sum_up
from settings import Section


class PositionsSettings(Section):
    length: Length
    """Tokens in a window; only documents longer than this are read."""
    buckets: Length = 8
    """The window is cut into so many stretches of equal length, one cell each."""
    sources: Annotated[tuple[str, ...], DISTINCT] = ()
    """Which sources are read; left out, all that hold a document long enough."""
    tokens: PositiveInt = 32_768
    """At most so many tokens are read of each source."""

    @model_validator(mode="after")
    def check_buckets(self) -> "PositionsSettings":
        if self.buckets > self.length:
            raise ValueError(f"buckets={self.buckets} is more than length={self.length}; use {self.length} or fewer")
        return self


def check(settings: PositionsSettings, materials: Materials) -> None:
    """Refuse a length that no document of the sources reaches."""
    sources_with_long_documents(materials, settings.sources, settings.length, "positions")


def run(model: nn.Module, settings: PositionsSettings, materials: Materials, seed: int) -> list[Cell]:
    """One cell for each source and bucket: score is bits per byte; extra `start`, `stop` (positions) and `loss` (nats).

    Each window lies inside one document, so that every bucket holds the same documents and position alone differs.
    """
    edges = np.linspace(0, settings.length, settings.buckets + 1).round().astype(int).tolist()
    cells = []
    for name in sources_with_long_documents(materials, settings.sources, settings.length, "positions"):
        rows = long_windows(materials, name, settings.length, settings.tokens, seed)
        _, logprob_BT = score_rows(model, materials, rows)
        for start, stop in pairwise(edges):
            loss = sum_up(rows.labels_BT[:, start:stop], logprob_BT[:, start:stop], materials.tokenizer)
            extra = {"start": start, "stop": stop, "loss": loss.per_token, **loss.bounds(seed)}
            cells.append(Cell(f"positions/{name}", settings.length, None, loss.bits_per_byte, loss.tokens, extra))
    return cells
