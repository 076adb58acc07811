"""Rows ready for a model: tokens, labels, loss weights, and the documents that each row is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.packing import Packing, ragged_ranges
from data.shards import Shard

NO_TARGET = -100


@dataclass(frozen=True)
class Rows:
    """R rows of T tokens.

    tokens_RT and labels_RT are int64 (NO_TARGET where nothing is to be predicted), weights_RT is float32;
    document_lengths is flat, row by row, and counts_R says how many of them each row has.
    """

    tokens_RT: np.ndarray
    labels_RT: np.ndarray
    weights_RT: np.ndarray
    document_lengths: np.ndarray
    counts_R: np.ndarray
    padding_R: np.ndarray
    """How many places at each row's end hold no token, int64."""


def packed_rows(packing: Packing, numbers_R: np.ndarray, shard: Shard, end_of_text: int) -> Rows:
    """Read the packed rows with these numbers; places that hold no token become a document of `end_of_text`.

    The label of a piece's last token is the token that follows in its document, where there is one.
    """
    length = packing.sequence_length
    first_R = packing.row_offsets[numbers_R]
    counts_R = packing.row_offsets[numbers_R + 1] - first_R
    piece = ragged_ranges(first_R, counts_R)
    lengths = packing.lengths[piece]
    documents = packing.documents[piece]
    begins = shard.offsets[documents] + packing.starts[piece]
    is_at_end = begins + lengths == shard.offsets[documents + 1]
    used_R = np.add.reduceat(lengths, np.cumsum(counts_R) - counts_R)
    is_short_R = used_R < length
    padding_at = np.cumsum(counts_R)[is_short_R]
    lengths = np.insert(lengths, padding_at, length - used_R[is_short_R])
    begins = np.insert(begins, padding_at, 0)
    is_at_end = np.insert(is_at_end, padding_at, True)
    padding_at = padding_at + np.arange(len(padding_at))

    stops = np.cumsum(lengths)
    where = np.repeat(begins - (stops - lengths), lengths) + np.arange(int(stops[-1]))
    tokens = shard.tokens[where].astype(np.int64)
    labels = shard.tokens.take(where + 1, mode="clip").astype(np.int64)
    labels[stops[is_at_end] - 1] = NO_TARGET
    padding = ragged_ranges((stops - lengths)[padding_at], lengths[padding_at])
    tokens[padding] = end_of_text
    labels[padding] = NO_TARGET
    shape = (len(numbers_R), length)
    weights = (labels != NO_TARGET).astype(np.float32)
    tokens_RT, labels_RT, weights_RT = (array.reshape(shape) for array in (tokens, labels, weights))
    return Rows(tokens_RT, labels_RT, weights_RT, lengths, counts_R + is_short_R, length - used_R)


def joined(rows: Rows) -> Rows:
    """Rows as one stream each: the last token of a document has the first of what stands next as its label.

    So the field trains where it does not mask documents (Megatron-LM's default, nanoGPT, Hugging Face's `run_clm`): the
    end of a text is a token like others, and what follows it is to be predicted. Padding is never a label. A document
    that was cut ends with its row, and its own next token stays the label.
    """
    length = rows.tokens_RT.shape[1]
    last = np.cumsum(rows.document_lengths) - 1
    row, place = np.divmod(last, length)
    labels_RT, weights_RT = rows.labels_RT.copy(), rows.weights_RT.copy()
    is_open = place + 1 < length - rows.padding_R[row]
    row, place = row[is_open], place[is_open]
    labels_RT[row, place] = rows.tokens_RT[row, place + 1]
    weights_RT[row, place] = 1.0
    return replace(rows, labels_RT=labels_RT, weights_RT=weights_RT)


def interleave(parts: Sequence[tuple[np.ndarray, Rows]], num_rows: int, sequence_length: int) -> Rows:
    """Put rows of several sources in their places; each part says which rows of the whole its rows are."""
    shape = (num_rows, sequence_length)
    tokens_RT, labels_RT = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
    weights_RT = np.empty(shape, dtype=np.float32)
    counts_R, padding_R = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.int64)
    for places, rows in parts:
        tokens_RT[places], labels_RT[places] = rows.tokens_RT, rows.labels_RT
        weights_RT[places] = rows.weights_RT
        counts_R[places], padding_R[places] = rows.counts_R, rows.padding_R
    row_of = np.concatenate([np.repeat(places, rows.counts_R) for places, rows in parts])
    lengths = np.concatenate([rows.document_lengths for _, rows in parts])
    return Rows(tokens_RT, labels_RT, weights_RT, lengths[np.argsort(row_of, kind="stable")], counts_R, padding_R)
