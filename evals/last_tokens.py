"""What the beginning of a document is worth: the loss of the same last tokens, seen with less and with more before."""

import math
from fractions import Fraction
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt, field_validator, model_validator
from torch import nn

from evals.lengths import DISTINCT, Length
from evals.long_documents import long_windows, sources_with_long_documents
from evals.scoring import Cell, Materials, Rows, score_rows
from evals.windows import Loss, sum_up
from model.loss import IGNORED
from settings import Section


class LastTokensSettings(Section):
    length: Length
    """Tokens in the whole window; only documents longer than this are read."""
    last: Length | None = None
    """So many tokens at the window's end are predicted; left out, an eighth of it."""
    shares: tuple[float, ...] = Field(default=(0.25, 0.5, 1.0), min_length=1)
    """Of the window, its end: so much of it is seen, a cell each."""
    sources: Annotated[tuple[str, ...], DISTINCT] = ()
    """Which sources are read; left out, all that hold a document long enough."""
    tokens: PositiveInt = 65_536
    """At most so many tokens are read of each source in whole windows."""

    @field_validator("shares")
    @classmethod
    def check_shares(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not all(1e-6 <= share <= 1 for share in shares) or len(set(shares)) < len(shares):
            raise ValueError("each entry is a share of the window, 1e-6 or more and at most 1; give each once")
        return shares

    @model_validator(mode="after")
    def check_last(self) -> "LastTokensSettings":
        seen = [num_seen(share, self.length) for share in sorted(self.shares)]
        shortest = seen[0]
        if shortest < 1:
            raise ValueError(
                f"length={self.length} does not fit: the shortest window, {min(self.shares)} of it, holds no token; "
                f"use {math.ceil(1 / as_written(min(self.shares)))} or more"
            )
        if len(set(seen)) < len(seen):
            raise ValueError(
                f"shares={list(self.shares)} of length={self.length} are {seen} tokens: the same would be asked twice; "
                "move them apart, or drop one"
            )
        if num_last(self) > shortest:
            raise ValueError(
                f"last={num_last(self)} tokens do not fit the shortest window, {min(self.shares)} of "
                f"length={self.length}; use {shortest} or fewer"
            )
        return self


def as_written(share: float) -> Fraction:
    """0.3 is three tenths here, and not the binary number next to it, of which 1000 tokens have 299."""
    return Fraction(str(share))


def num_seen(share: float, length: int) -> int:
    """How many tokens of a window its share is."""
    return int(as_written(share) * length)


def num_last(settings: LastTokensSettings) -> int:
    """How many tokens are predicted."""
    return settings.last if settings.last is not None else max(1, settings.length // 8)


def check(settings: LastTokensSettings, materials: Materials) -> None:
    """Refuse a length that no document of the sources reaches."""
    sources_with_long_documents(materials, settings.sources, settings.length, "last_tokens")


def run(model: nn.Module, settings: LastTokensSettings, materials: Materials, seed: int) -> list[Cell]:
    """One cell for each source and share of the window: score is bits per byte of the last tokens, the same in all.

    The cell's length is what is seen. Extra: `loss` (nats), `window`, and, against the least that was seen, `gain` in
    bits per byte with its interval `gain_low`, `gain_high`.
    """
    cells = []
    for name in sources_with_long_documents(materials, settings.sources, settings.length, "last_tokens"):
        whole = long_windows(materials, name, settings.length, settings.tokens, seed)
        first: Loss | None = None
        for share in sorted(settings.shares):
            rows = seen_through(whole, num_seen(share, settings.length), num_last(settings))
            loss = sum_up(rows.labels_BT, score_rows(model, materials, rows)[1], materials.tokenizer)
            first = first or loss
            extra = {"loss": loss.per_token, "window": settings.length, **loss.bounds(seed)}
            gain = {} if loss is first else loss.gain_over(first, seed)
            length = rows.tokens_BT.shape[1]
            cells.append(Cell(f"last_tokens/{name}", length, None, loss.bits_per_byte, loss.tokens, {**extra, **gain}))
    return cells


def seen_through(whole: Rows, length: int, last: int) -> Rows:
    """The ends of windows, so many tokens of each, with only the last ones asked for."""
    labels_BT: np.ndarray = whole.labels_BT[:, -length:].copy()
    labels_BT[:, : length - last] = IGNORED
    return Rows(whole.tokens_BT[:, -length:], labels_BT, whole.end_of_text)
