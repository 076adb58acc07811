"""LongPPL: perplexity of the tokens that a long context helps with, the model being its own judge.

Fang et al. 2024, arXiv 2410.23771, section 3: most tokens need no long context, and their loss hides those that do. A
token is key where the whole context makes it likelier than a truncated one does by more than `gain` nats, and likely at
all. The truncated context begins anew every `stride` tokens, as in the authors' code (PKU-ML/LongPPL, longppl.py), so
that it holds `short` tokens or up to `stride` - 1 more.
"""

import math
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import nn

from data.positions import LONGEST
from evals.intervals import fields, ratio_interval
from evals.lengths import DISTINCT, Length
from evals.long_documents import long_windows, sources_with_long_documents
from evals.scoring import Cell, Materials, Rows, score_rows
from model.loss import IGNORED
from settings import Section


class LongPplSettings(Section):
    length: Length
    """Tokens in a window; only documents longer than this are read."""
    short: Annotated[int, Field(ge=1, lt=LONGEST)] | None = None
    """Tokens of the truncated context (published: 4096, for 32K); left out, a quarter of the window."""
    stride: Length | None = None
    """So many tokens share a truncated context's beginning (published: 1024); left out, a quarter of `short`."""
    gain: PositiveFloat = 2.0
    """Nats by which the long context must raise the log-probability of a key token."""
    least_logprob: float = -2.0
    """What the log-probability of a key token must exceed with the long context."""
    sources: Annotated[tuple[str, ...], DISTINCT] = ()
    """Which sources are read; left out, all that hold a document long enough."""
    tokens: PositiveInt = 32_768
    """At most so many tokens are read of each source in whole windows; truncated ones cost about 4 times as much."""

    @model_validator(mode="after")
    def check_short(self) -> "LongPplSettings":
        if num_short(self) >= self.length:
            raise ValueError(
                f"short={num_short(self)} must be less than length={self.length}; use length={num_short(self) + 1}"
            )
        return self


def num_short(settings: LongPplSettings) -> int:
    """Tokens of the truncated context."""
    return settings.short if settings.short is not None else max(1, settings.length // 4)


def check(settings: LongPplSettings, materials: Materials) -> None:
    """Refuse a length that no document of the sources reaches."""
    sources_with_long_documents(materials, settings.sources, settings.length, "long_ppl")


def run(model: nn.Module, settings: LongPplSettings, materials: Materials, seed: int) -> list[Cell]:
    """One cell a source: score is the perplexity of its key tokens, `count` their number; NaN where there is none.

    Extra: `loss` (nats of a key token), `key_share` (of the tokens behind the first `short`), `perplexity` (of all of
    these), `short`. As each model chooses its own key tokens, compare `key_share` before the score.
    """
    cells, short = [], num_short(settings)
    for name in sources_with_long_documents(materials, settings.sources, settings.length, "long_ppl"):
        rows = long_windows(materials, name, settings.length, settings.tokens, seed)
        labels_BT = rows.labels_BT.copy()
        labels_BT[:, : short - 1] = IGNORED  # the truncated context is no shorter there
        rows = Rows(rows.tokens_BT, labels_BT, rows.end_of_text)
        long_BT = score_rows(model, materials, rows)[1]
        short_BT = truncated(model, materials, rows, short, settings.stride or max(1, short // 4))
        is_asked_BT = rows.is_asked_BT
        with np.errstate(invalid="ignore"):  # NaN where nothing is asked
            is_key_BT = is_asked_BT & (long_BT - short_BT > settings.gain) & (long_BT > settings.least_logprob)
        nats_B, keys_B = -np.where(is_key_BT, long_BT, 0).sum(axis=1, dtype=np.float64), is_key_BT.sum(axis=1)
        # The one object: cells of equal numbers are then equal, which no other NaN is.
        loss = float(nats_B.sum() / keys_B.sum()) if keys_B.any() else math.nan
        score = math.exp(loss) if keys_B.any() else math.nan
        extra = {
            "loss": loss,
            "key_share": float(is_key_BT.sum() / is_asked_BT.sum()),
            "perplexity": math.exp(-float(long_BT[is_asked_BT].mean(dtype=np.float64))),
            "short": short,
            **{end: math.exp(at) for end, at in fields(ratio_interval(nats_B, keys_B, seed)).items()},
        }
        cells.append(Cell(f"long_ppl/{name}", settings.length, None, score, int(keys_B.sum()), extra))
    return cells


def truncated(model: nn.Module, materials: Materials, rows: Rows, short: int, stride: int) -> np.ndarray:
    """Log-probability (B, T) of each asked token with `short` to `short + stride - 1` tokens before it, else NaN."""
    logprob_BT = np.full(rows.labels_BT.shape, np.nan, dtype=np.float32)
    length = rows.tokens_BT.shape[1]
    for start in range(0, length - short + 1, stride):
        stop = min(start + short + stride - 1, length)
        labels_BT = rows.labels_BT[:, start:stop].copy()
        labels_BT[:, : short - 1] = IGNORED
        part = Rows(rows.tokens_BT[:, start:stop], labels_BT, rows.end_of_text)
        asked = slice(start + short - 1, stop)
        logprob_BT[:, asked] = score_rows(model, materials, part)[1][:, short - 1 :]
    return logprob_BT
