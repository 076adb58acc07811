"""Documents into rows of one length: every target exactly once, few documents cut, little padding."""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data.order import permute

Pack = Literal["best_fit", "concat", "decompose"]

# Best fit sorts by length inside a group; groups are drawn at random so that a row's companions are not all alike.
# A group has at least so many pieces and gives at least so many rows, as its last row is seldom full.
GROUP = 16_384
GROUP_ROWS = 512


@dataclass(frozen=True)
class Packing:
    """Rows of at most `sequence_length` tokens; row r holds the pieces row_offsets[r]..row_offsets[r+1]-1.

    A piece is tokens starts[p]..starts[p]+lengths[p]-1 of document documents[p]; all arrays are int64.
    """

    sequence_length: int
    row_offsets: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def padding(self) -> float:
        """Share of all places in the rows that hold no token."""
        return 1 - int(self.lengths.sum()) / max(1, self.num_rows * self.sequence_length)

    def row(self, number: int) -> list[tuple[int, int, int]]:
        """The (document, start, length) pieces of one row."""
        places = slice(self.row_offsets[number], self.row_offsets[number + 1])
        columns = (self.documents[places], self.starts[places], self.lengths[places])
        return list(zip(*(column.tolist() for column in columns), strict=True))


def pieces(
    lengths: np.ndarray, sequence_length: int, pack: Pack = "best_fit", key: int = 0, *, is_longest: bool = True
) -> Packing:
    """Cut and pack documents of these lengths into rows; the same arguments always give the same rows.

    Every token stands in one row, save a document's last where it would be a piece alone: it predicts nothing, and the
    piece before has it as label. So each piece, and each row, has a target. `decompose` gives the rows of this length
    alone; is_longest: whether the stage has no longer ones.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if pack == "decompose":
        return decompose(lengths, sequence_length, is_longest=is_longest)
    return PACKINGS[pack](lengths, sequence_length, key)


def best_fit(lengths: np.ndarray, sequence_length: int, key: int) -> Packing:
    """Full rows from long documents, then each rest into the row it fills best (Ding et al., arXiv 2404.10830)."""
    lone_D = (lengths > 0) & (lengths % sequence_length == 1 % sequence_length)
    full_D, rest_D = np.divmod(lengths - lone_D, sequence_length)
    full_documents = np.repeat(np.arange(len(lengths)), full_D)
    full_starts = ragged_ranges(np.zeros_like(full_D), full_D) * sequence_length
    rest_documents = np.flatnonzero(rest_D)
    rest_documents = rest_documents[permute(np.arange(len(rest_documents)), max(1, len(rest_documents)), key)]
    rest_rows, num_rows = np.zeros(len(rest_documents), dtype=np.int64), 0
    mean = max(1.0, float(rest_D[rest_documents].mean())) if len(rest_documents) else 1.0
    group_size = max(GROUP, int(GROUP_ROWS * sequence_length / mean))
    for start in range(0, len(rest_documents), group_size):
        group = slice(start, start + group_size)
        rows, used = _fill(rest_D[rest_documents[group]], sequence_length)
        rest_rows[group] = num_rows + rows
        num_rows += used
    by_row = np.argsort(rest_rows, kind="stable")
    rest_documents, rest_rows = rest_documents[by_row], rest_rows[by_row]
    counts = np.concatenate([np.ones(len(full_starts), dtype=np.int64), np.bincount(rest_rows, minlength=num_rows)])
    return Packing(
        sequence_length,
        row_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        documents=np.concatenate([full_documents, rest_documents]),
        starts=np.concatenate([full_starts, full_D[rest_documents] * sequence_length]),
        lengths=np.concatenate([np.full(len(full_starts), sequence_length), rest_D[rest_documents]]),
    )


def concat(lengths: np.ndarray, sequence_length: int, key: int) -> Packing:
    """All documents in random order as one stream, cut every `sequence_length` tokens; a lone end leaves its place."""
    order = permute(np.arange(len(lengths)), max(1, len(lengths)), key)
    order = order[lengths[order] > 1]
    ends = np.cumsum(lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.unique(np.concatenate([[0], ends, np.arange(0, total, sequence_length)]))
    begins, stops = cuts[:-1], cuts[1:]
    place = np.searchsorted(ends, begins, side="right")
    is_kept = (stops - begins > 1) | (stops < ends[place])
    begins, stops, place = begins[is_kept], stops[is_kept], place[is_kept]
    _, row_begins = np.unique(begins // sequence_length, return_index=True)
    return Packing(
        sequence_length,
        row_offsets=np.append(row_begins, len(begins)).astype(np.int64),
        documents=order[place],
        starts=begins - (ends[place] - lengths[order[place]]),
        lengths=stops - begins,
    )


def decompose(lengths: np.ndarray, sequence_length: int, *, is_longest: bool = True) -> Packing:
    """Documents cut into powers of two, longest first, one piece a row (Pouransari et al. 2024, arXiv 2405.13226).

    A document of 11 tokens is a piece of 8, one of 2 and one of 1. These are the pieces of `sequence_length`, a power
    of two: where it is the longest allowed, as many as a document holds, else one where the length's binary form has
    it. Every piece lies inside one document, and no place is padding.
    """
    counts_D = lengths // sequence_length
    if not is_longest:
        counts_D = counts_D % 2
    documents = np.repeat(np.arange(len(lengths)), counts_D)
    firsts_D = np.zeros_like(lengths) if is_longest else lengths // (2 * sequence_length) * 2
    starts = ragged_ranges(firsts_D, counts_D) * sequence_length
    return Packing(
        sequence_length,
        row_offsets=np.arange(len(documents) + 1),
        documents=documents,
        starts=starts,
        lengths=np.full(len(documents), sequence_length, dtype=np.int64),
    )


PACKINGS: dict[Pack, Callable[[np.ndarray, int, int], Packing]] = {"best_fit": best_fit, "concat": concat}


def ragged_ranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """firsts[0], firsts[0]+1, ... (counts[0] of them), firsts[1], ...: one flat int64 array."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(firsts - (ends - counts), counts)


def _fill(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: the row of each piece, and the number of rows."""
    row_of = np.zeros(len(lengths), dtype=np.int64)
    rooms: list[int] = []  # the distinct numbers of free places, ascending
    rows_with: dict[int, list[int]] = {}
    num_rows = 0
    by_length = np.argsort(-lengths, kind="stable")
    for piece, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = num_rows, sequence_length
            num_rows += 1
        else:
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[place]
        row_of[piece] = row
        left = room - length
        if left:
            rows = rows_with.setdefault(left, [])
            if not rows:
                insort(rooms, left)
            rows.append(row)
    return row_of, num_rows
