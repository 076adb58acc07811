"""Loss by position: later tokens of a long document are predicted better than early ones, if context is used."""

from itertools import pairwise

import numpy as np
from pydantic import PositiveInt, model_validator
from torch import nn

from evals.harness import Cell, Materials, score_rows, sources_of
from evals.windows import documents_in, read, spread_inside, sum_up
from settings import Refusal, Section


class PositionsSettings(Section):
    length: PositiveInt
    """Tokens in a window; only documents longer than this are read."""
    buckets: PositiveInt = 8
    """The window is cut into so many stretches of equal length, one cell each."""
    sources: tuple[str, ...] = ()
    """Which sources are read; left out, all that hold a document long enough."""
    tokens: PositiveInt = 32_768
    """At most so many tokens are read of each source."""

    @model_validator(mode="after")
    def check_buckets(self) -> "PositionsSettings":
        if self.buckets > self.length:
            raise ValueError(f"buckets={self.buckets} is more than length={self.length}; use {self.length} or fewer")
        return self


def longest_document(materials: Materials, source: str) -> int:
    """Tokens in the longest held-out document of a source."""
    documents = documents_in(materials.held_out[source], materials.tokenizer.end_of_text)
    return max((document.stop - document.start for document in documents), default=0)


def sources_with_long_documents(settings: PositionsSettings, materials: Materials) -> list[str]:
    """The sources to read: those named, which must all be fit, or else every one that is."""
    names = sources_of(materials, settings.sources, "evals.positions.sources")
    longest = {name: longest_document(materials, name) for name in names}
    fit = [name for name in names if longest[name] > settings.length]
    unfit = [name for name in names if longest[name] <= settings.length]
    if (settings.sources and unfit) or not fit:
        name = max(unfit, key=lambda source: longest[source])
        raise Refusal(
            f"evals.positions.length={settings.length} does not fit: the longest held-out document of source {name!r} "
            f"has {longest[name]} tokens; lower it to {max(longest[name] - 1, 1)} or less, or name another source"
        )
    return fit


def check(settings: PositionsSettings, materials: Materials) -> None:
    """Refuse a length that no document of the sources reaches."""
    sources_with_long_documents(settings, materials)


def run(model: nn.Module, settings: PositionsSettings, materials: Materials, seed: int) -> list[Cell]:
    """One cell for each source and bucket: score is bits per byte; extra `start`, `stop` (positions) and `loss` (nats).

    Each window lies inside one document, so that every bucket holds the same documents and position alone differs.
    """
    end_of_text = materials.tokenizer.end_of_text
    edges = np.linspace(0, settings.length, settings.buckets + 1).round().astype(int).tolist()
    cells = []
    for name in sources_with_long_documents(settings, materials):
        tokens = materials.held_out[name]
        starts = spread_inside(documents_in(tokens, end_of_text), settings.length, settings.tokens, seed)
        rows = read(tokens, starts, settings.length, end_of_text)
        _, logprob_BT = score_rows(model, materials, rows)
        for start, stop in pairwise(edges):
            loss = sum_up(rows.labels_BT[:, start:stop], logprob_BT[:, start:stop], materials.tokenizer)
            extra = {"start": start, "stop": stop, "loss": loss.per_token}
            cells.append(Cell(f"positions/{name}", settings.length, None, loss.bits_per_byte, loss.tokens, extra))
    return cells
