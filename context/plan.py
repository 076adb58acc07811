"""What each rank has to compute and to receive, once packed documents are laid out over ranks. Host arithmetic only."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np

from attention.mask import Documents, Mask
from context.layout import Layout, Piece, work_before
from settings import Refusal

FULL = Mask(is_causal=False)


@dataclass(frozen=True, kw_only=True)
class SplitMask(Mask):
    """The mask of a micro-batch whose tokens lie on several ranks: its documents are those of the whole batch."""

    is_split: ClassVar[bool] = True

    layout: Layout

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, way_out in (
            ("prefix", "use a causal objective"),
            ("first_tokens", "use a learned sink"),
            ("key_documents", "attend to as many keys as queries"),
        ):
            value = getattr(self, key)
            if value is not None and np.any(value):
                raise Refusal(f"{key}={value} is not supported when a sequence lies on several ranks; {way_out}")
        if not self.is_causal:
            raise Refusal("is_causal=False is not supported when a sequence lies on several ranks; use a causal mask")
        if self.documents is None:
            raise Refusal("documents=None: a sequence on several ranks needs its documents, also where they are rows")
        self.documents.check_rows(self.layout.num_rows, self.layout.row_length)

    @property
    def plan(self) -> "Plan":
        assert self.documents is not None
        return plan(self.layout, self.documents, self.window)


@dataclass(frozen=True)
class Tile:
    """Queries of one rank's piece against keys of an earlier piece: a rectangle of the mask, and how it is filled.

    Every query of it sees a key, and its first query sees them all.
    """

    query: slice
    """Of the flattened batch."""
    key: slice
    """Of the flattened batch."""
    mask: Mask
    """Full, or a window with the offset of this rectangle."""
    local_query: slice
    """The queries among their rank's tokens."""
    local_key: slice
    """The keys among the tokens of `key_rank`; where that is None, `key`."""
    key_rank: int | None
    """The rank that has the keys; None: they come from several (`Plan.joined_tiles`)."""


@dataclass(frozen=True)
class _Reach:
    """How far the document that a piece begins in reaches: queries from the piece's start to `stop`, keys back to
    `first_key`, as far as the first of those queries sees. No other document can leave a piece backwards."""

    piece: Piece
    stop: int
    first_key: int


@dataclass(frozen=True)
class Plan:
    """The work of every rank, computed where it is asked for: a rank asks for its own tiles and all ranks' key ranges.

    `diagonal` and `tiles` of all ranks together hold every visible (query, key) pair exactly once.
    """

    layout: Layout
    documents: Documents
    window: int | None
    _tiles: dict[int, tuple[Tile, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def diagonal(self, rank: int) -> Mask:
        """The mask over a rank's own tokens (1, N) that holds all pairs within a piece: causal parts of documents."""
        parts: list[int] = []
        for piece in self.layout.pieces(rank):
            first, last = np.searchsorted(self._ends, (piece.start, piece.stop - 1), side="right")
            parts += np.diff([piece.start, *self._ends[first:last], piece.stop]).tolist()
        is_windowed = self.window is not None and self.window < max(parts)
        return Mask(documents=Documents(tuple(parts)), window=self.window if is_windowed else None)

    def tiles(self, rank: int) -> tuple[Tile, ...]:
        """At most one for each of a rank's pieces and each earlier piece, its own included; by query, then key."""
        if rank not in self._tiles:
            self._tiles[rank] = tuple(
                self._tile(reach, keys, owner)
                for reach in self._reaches[rank]
                for owner, keys in self._owned(reach.first_key, reach.piece.start)
            )
        return self._tiles[rank]

    def joined_tiles(self, rank: int) -> tuple[Tile, ...]:
        """At most one for each of a rank's pieces: all earlier keys at once, from a tensor in the batch's order."""
        return tuple(
            self._tile(reach, slice(reach.first_key, reach.piece.start), None)
            for reach in self._reaches[rank]
            if reach.first_key < reach.piece.start
        )

    def keys_needed(self, rank: int, from_rank: int) -> tuple[slice, ...]:
        """The ranges of the flattened batch, ascending, whose keys on `from_rank` the tiles of `rank` read."""
        return self._needed[rank].get(from_rank, ())

    @cached_property
    def hops(self) -> tuple[int, ...]:
        """The distances n, ascending, at which any rank r reads keys of rank (r - n) % W, 0 left out."""
        size = self.layout.num_ranks
        return tuple(sorted({(rank - owner) % size for rank in range(size) for owner in self._needed[rank]} - {0}))

    def keys_received(self, rank: int) -> int:
        """How many tokens' keys and values a rank needs from others."""
        return sum(
            keys.stop - keys.start for owner, ranges in self._needed[rank].items() for keys in ranges if owner != rank
        )

    @cached_property
    def work(self) -> tuple[int, ...]:
        """How many (query, key) pairs each rank computes."""
        borders = np.arange(0, self.layout.num_tokens + 1, self.layout.chunk_length)
        chunks = np.diff(work_before(self.documents.lengths, borders, self.window))
        return tuple(int(chunks[np.array(self.layout.owners) == rank].sum()) for rank in range(self.layout.num_ranks))

    @property
    def balance(self) -> float:
        """The most work of a rank over the mean; 1 is perfect."""
        return max(self.work) * self.layout.num_ranks / sum(self.work)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.documents.lengths)

    @cached_property
    def _reaches(self) -> tuple[tuple[_Reach, ...], ...]:
        return tuple(tuple(map(self._reach, self.layout.pieces(rank))) for rank in range(self.layout.num_ranks))

    def _reach(self, piece: Piece) -> _Reach:
        document = int(np.searchsorted(self._ends, piece.start, side="right"))
        start = int(self._ends[document - 1]) if document else 0
        first_key = start if self.window is None else max(start, piece.start - self.window + 1)
        return _Reach(piece, min(piece.stop, int(self._ends[document])), first_key)

    def _owned(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """[start, stop) of the flattened batch cut where its owner changes: (owner, range)."""
        pieces = self.layout.all_pieces
        place = bisect_right(pieces, start, key=lambda entry: entry[1].start) - 1
        while start < stop:
            owner, piece = pieces[place]
            yield owner, slice(start, min(stop, piece.stop))
            start, place = piece.stop, place + 1

    def _tile(self, reach: _Reach, keys: slice, owner: int | None) -> Tile:
        start, stop, mask = reach.piece.start, reach.stop, FULL
        if self.window is not None:
            stop = min(stop, keys.stop + self.window - 1)
            if stop - keys.start > self.window:
                mask = Mask(window=self.window, offset=start - keys.start)
        local_start = reach.piece.local_start
        local_key = keys.start if owner is None else self.layout.local(owner, keys.start)
        return Tile(
            query=slice(start, stop),
            key=keys,
            mask=mask,
            local_query=slice(local_start, local_start + stop - start),
            local_key=slice(local_key, local_key + keys.stop - keys.start),
            key_rank=owner,
        )

    @cached_property
    def _needed(self) -> tuple[dict[int, tuple[slice, ...]], ...]:
        """For each rank, by owner, the ranges of keys that its tiles read."""
        needed: list[dict[int, tuple[slice, ...]]] = []
        for reaches in self._reaches:
            ranges: dict[int, list[slice]] = {}
            done = 0  # pieces ascend and so do their ends: a range that overlaps the one before only goes on from it
            for reach in reaches:
                for owner, keys in self._owned(max(done, reach.first_key), reach.piece.start):
                    ranges.setdefault(owner, []).append(keys)
                done = reach.piece.start
            needed.append({owner: tuple(known) for owner, known in ranges.items()})
        return tuple(needed)


@lru_cache(maxsize=16)
def plan(layout: Layout, documents: Documents, window: int | None = None) -> Plan:
    """The plan for documents laid out so, kept for the layers and passes of a few micro-batches."""
    documents.check_rows(layout.num_rows, layout.row_length)
    if window is not None and window >= max(documents.lengths):
        window = None  # it hides nothing, and masks without one are faster
    return Plan(layout, documents, window)
