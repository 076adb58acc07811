"""Windows of held-out text: which stretches are read, so that every length reads the same text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import numpy as np

from data.tokenizer import Tokenizer
from evals.intervals import fields, ratio_interval
from evals.scoring import Rows
from model.loss import IGNORED

PIECES = 32
"""Of a text, for whose differences between runs an interval is drawn: enough of them for it, and few in a row."""


def spread(num_tokens: int, length: int, max_tokens: int, seed: int) -> np.ndarray:
    """Starts of disjoint windows of `length`, evenly spread over the text, their common shift drawn from the seed.

    At most `max_tokens` tokens together but at least one window. One token stays free at the end: the last label.
    """
    assert num_tokens > length, f"{num_tokens} tokens hold no window of {length} and the label after it"
    count = max(1, min(max_tokens // length, (num_tokens - 1) // length))
    stride = (num_tokens - 1) // count
    shift = np.random.default_rng(seed).integers(num_tokens - 1 - stride * (count - 1) - length + 1)
    return int(shift) + stride * np.arange(count)


def tile(starts: np.ndarray, block: int, length: int) -> np.ndarray:
    """Starts of the windows of `length` that fill windows of `block`: the same text, read in shorter pieces."""
    return (starts[:, None] + length * np.arange(block // length)).ravel()


def spread_inside(documents: Sequence[slice], length: int, max_tokens: int, seed: int) -> np.ndarray:
    """Like `spread`, over windows that lie inside one document together with the label after them."""
    fitting = [np.arange(d.start, d.stop - length, length) for d in documents if d.stop - d.start > length]
    starts = np.concatenate(fitting)
    chosen = spread(len(starts) + 1, 1, max(1, max_tokens // length), seed)
    return starts[chosen]


def documents_in(tokens: np.ndarray, end_of_text: int) -> list[slice]:
    """Where each document of the joined text lies, without its end of text."""
    ends = np.append(np.flatnonzero(tokens == end_of_text), len(tokens))
    starts = np.append(0, ends[:-1] + 1)
    return [slice(int(start), int(stop)) for start, stop in zip(starts, ends, strict=True) if stop > start]


def read(tokens: np.ndarray, starts: np.ndarray, length: int, end_of_text: int) -> Rows:
    """The windows as rows. Every token of text is asked once, but what follows a document's end: nothing tells it."""
    window_BS = np.asarray(tokens)[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    tokens_BT, labels_BT = window_BS[:, :-1], window_BS[:, 1:].copy()
    # The end of a document stands for no byte of text: leaving it out keeps bits per byte a statement about text.
    labels_BT[(tokens_BT == end_of_text) | (labels_BT == end_of_text)] = IGNORED
    return Rows(tokens_BT, labels_BT, end_of_text)


def digest(rows: Rows) -> str:
    """Eight letters that are the same for the same windows."""
    shape = repr(rows.labels_BT.shape).encode()  # the same text in shorter windows is read with less in sight
    return f"{crc32(np.ascontiguousarray(rows.labels_BT, dtype=np.int64).tobytes(), crc32(shape)):08x}"


@dataclass(frozen=True)
class Loss:
    """Losses of asked tokens, summed up in each of B windows."""

    nats_B: np.ndarray
    tokens_B: np.ndarray
    bytes_B: np.ndarray

    @cached_property
    def nats(self) -> float:
        return float(self.nats_B.sum())

    @cached_property
    def tokens(self) -> int:
        return int(self.tokens_B.sum())

    @cached_property
    def num_bytes(self) -> int:
        return int(self.bytes_B.sum())

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    @property
    def per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    def pieces(self) -> list[list[float]]:
        """(nats, bytes) of up to `PIECES` stretches of neighbouring windows."""
        parts = np.array_split(np.arange(len(self.nats_B)), min(PIECES, len(self.nats_B)))
        return [[round(float(self.nats_B[part].sum()), 3), int(self.bytes_B[part].sum())] for part in parts]

    def bounds(self, seed: int = 0) -> dict[str, float]:
        """95% interval of the bits per byte, windows drawn anew: `low`, `high`; neither where one window was read."""
        return fields(ratio_interval(self.nats_B / math.log(2), self.bytes_B, seed))

    def gain_over(self, other: "Loss", seed: int = 0) -> dict[str, float]:
        """Bits per byte less than `other`'s on the same labels: `gain`, and its 95% interval `gain_low`, `gain_high`.

        Windows are drawn in pairs: what makes one of them hard is hard for both.
        """
        saved_B = (other.nats_B - self.nats_B) / math.log(2)
        interval = fields(ratio_interval(saved_B, self.bytes_B, seed))
        return {"gain": other.bits_per_byte - self.bits_per_byte, **{f"gain_{end}": at for end, at in interval.items()}}


def sum_up(labels_BT: np.ndarray, logprob_BT: np.ndarray, tokenizer: Tokenizer) -> Loss:
    """The loss over all asked positions of these (slices of) rows."""
    is_asked_BT = labels_BT != IGNORED
    nats_B = -np.where(is_asked_BT, logprob_BT, 0).sum(axis=1, dtype=np.float64)
    bytes_B = np.array([tokenizer.num_bytes(labels_T[labels_T != IGNORED]) for labels_T in labels_BT])
    return Loss(nats_B, is_asked_BT.sum(axis=1), bytes_B)
