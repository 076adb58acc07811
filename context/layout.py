"""Which rank of a group works on which tokens of packed rows: a row is cut into chunks and every chunk given a rank."""

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from settings import Refusal, nearest

GOOD_BALANCE = 1.05
"""Most work of a rank over the mean that is not worth a finer cut."""


@dataclass(frozen=True)
class Piece:
    """Tokens that lie side by side on one rank: [start, stop) of the flattened batch, from `local_start` on there."""

    start: int
    stop: int
    local_start: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """B rows of T tokens over W ranks, each row cut into chunks of equal length, each rank with as many of each row.

    Tokens are counted in the flattened batch, row * T + place. A rank keeps its tokens in ascending order, so its
    share of a (B, T, ...) tensor has the shape (B, T / W, ...). A layout is a pure function of what every rank knows:
    nothing is exchanged to agree on it.
    """

    num_rows: int
    row_length: int
    num_ranks: int
    owners: tuple[int, ...]
    """The rank of each chunk, row by row."""

    def __post_init__(self) -> None:
        chunks, left = divmod(len(self.owners), self.num_rows)
        if left or not chunks or self.row_length % chunks:
            raise Refusal(
                f"a row of {self.row_length} tokens cannot be cut into {len(self.owners)} / {self.num_rows} equal"
                f" chunks; pad rows to `padded_length`"
            )
        per_row = np.sort(np.array(self.owners).reshape(self.num_rows, chunks), axis=1)
        if chunks % self.num_ranks or (per_row != np.repeat(np.arange(self.num_ranks), chunks // self.num_ranks)).any():
            raise Refusal(
                f"each of {self.num_ranks} ranks must own equally many chunks of each row; `Layout.make` sees to it"
            )

    @staticmethod
    def make(
        kind: str,
        num_rows: int,
        row_length: int,
        num_ranks: int,
        document_lengths: Sequence[int],
        *,
        chunks_per_rank: int = 8,
        window: int | None = None,
    ) -> "Layout":
        """The layout of a kind in KINDS for rows that these documents fill; the same on every rank that asks.

        chunks_per_rank: of each row at most, for the kind `balanced`; the others know theirs. window: what the layers
        look back whose work is balanced. Raises Refusal for an unknown kind and for rows that do not divide
        (`padded_length` does).
        """
        chunks = num_ranks * chunks_of(kind, chunks_per_rank)
        if row_length % chunks:
            padded = padded_length(row_length, kind, num_ranks, chunks_per_rank)
            raise Refusal(
                f"rows of {row_length} tokens cannot be cut into {chunks} equal chunks ({kind} over {num_ranks} ranks);"
                f" pad them to {padded} tokens"
            )
        borders = np.arange(0, num_rows * row_length + 1, row_length // chunks)
        work = np.diff(work_before(document_lengths, borders, window))
        owners = KINDS[kind].assign(work.reshape(num_rows, chunks), num_ranks)
        return Layout(num_rows, row_length, num_ranks, tuple(owners))

    @property
    def num_tokens(self) -> int:
        """Of all ranks together."""
        return self.num_rows * self.row_length

    @property
    def num_local_tokens(self) -> int:
        """Of one rank."""
        return self.num_tokens // self.num_ranks

    @property
    def chunk_length(self) -> int:
        return self.num_tokens // len(self.owners)

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """A rank's tokens as the fewest runs, ascending; chunks side by side are one piece, also across a row's end."""
        return self._pieces[rank]

    @cached_property
    def all_pieces(self) -> tuple[tuple[int, Piece], ...]:
        """(rank, piece) of all ranks, ascending: together the whole batch."""
        return tuple(sorted(((rank, p) for rank in range(self.num_ranks) for p in self._pieces[rank]), key=_by_start))

    def local(self, rank: int, token: int) -> int:
        """Where a rank keeps a token of the flattened batch; the token has to be one of its own."""
        pieces = self._pieces[rank]
        piece = pieces[bisect_right(pieces, token, key=lambda piece: piece.start) - 1]
        assert piece.start <= token < piece.stop, f"token {token} is not on rank {rank}"
        return piece.local_start + token - piece.start

    def token_index(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """The flattened-batch index of each of a rank's tokens, int64 (B, T / W): its rows, places and true positions
        all follow from it."""
        starts = self._chunks(rank, device) * self.chunk_length
        tokens = starts[:, None] + torch.arange(self.chunk_length, device=device)
        return tokens.view(self.num_rows, -1)

    def shard(self, x_BT: Tensor, rank: int) -> Tensor:
        """A rank's share (B, T / W, ...) of a tensor (B, T, ...) that every rank has; differentiable."""
        self._check(x_BT, self.row_length, "a whole tensor")
        chunks = x_BT.reshape(-1, self.chunk_length, *x_BT.shape[2:])[self._chunks(rank, x_BT.device)]
        return chunks.reshape(self.num_rows, -1, *x_BT.shape[2:])

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole (B, T, ...) from all ranks' shares, in order of rank: undoes `shard`; differentiable."""
        for shard in shards:
            self._check(shard, self.row_length // self.num_ranks, "a share")
        rest = shards[0].shape[2:]
        chunks = torch.cat([shard.reshape(-1, self.chunk_length, *rest) for shard in shards])
        order = torch.cat([self._chunks(rank, chunks.device) for rank in range(self.num_ranks)]).argsort()
        return chunks[order].reshape(self.num_rows, self.row_length, *rest)

    def first_rows(self, num_rows: int) -> "Layout":
        """The layout of the first rows alone, every token where it was."""
        owners = self.owners[: len(self.owners) // self.num_rows * num_rows]
        return replace(self, num_rows=num_rows, owners=owners)

    def joined(self, size_inside: int) -> "Layout":
        """The layout whose rank is a group of `size_inside` neighbours of this one (usp: Ulysses inside the group)."""
        if self.num_ranks % size_inside:
            raise Refusal(f"{self.num_ranks} ranks cannot be joined in groups of {size_inside}; use a divisor")
        owners = tuple(owner // size_inside for owner in self.owners)
        return Layout(self.num_rows, self.row_length, self.num_ranks // size_inside, owners)

    def joined_order(self, ranks: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """The permutation that sorts these ranks' flattened shares, laid end to end, into ascending tokens.

        `torch.cat(shares)[order]` are the tokens as a rank of `joined` keeps them; the inverse is `order.argsort()`.
        """
        return torch.cat([self.token_index(rank, device).flatten() for rank in ranks]).argsort()

    def _check(self, x_BT: Tensor, length: int, what: str) -> None:
        if x_BT.shape[:2] != (self.num_rows, length):
            raise Refusal(f"{what} of this layout starts with ({self.num_rows}, {length}), not {tuple(x_BT.shape)}")

    def _chunks(self, rank: int, device: torch.device | str) -> Tensor:
        """A rank's chunks, ascending, int64."""
        return torch.from_numpy(np.flatnonzero(np.array(self.owners) == rank)).to(device)

    @cached_property
    def _pieces(self) -> tuple[tuple[Piece, ...], ...]:
        pieces: list[list[Piece]] = [[] for _ in range(self.num_ranks)]
        lengths = [0] * self.num_ranks
        for chunk, owner in enumerate(self.owners):
            start, stop, local_start = chunk * self.chunk_length, (chunk + 1) * self.chunk_length, lengths[owner]
            if pieces[owner] and pieces[owner][-1].stop == start:
                last = pieces[owner].pop()
                start, local_start = last.start, last.local_start
            pieces[owner].append(Piece(start, stop, local_start))
            lengths[owner] += self.chunk_length
        return tuple(map(tuple, pieces))


def _by_start(entry: tuple[int, Piece]) -> int:
    return entry[1].start


def padded_length(row_length: int, kind: str, num_ranks: int, chunks_per_rank: int = 8) -> int:
    """The least length, at least `row_length`, that a layout of this kind can cut; padding is a document of its own."""
    chunks = num_ranks * chunks_of(kind, chunks_per_rank)
    return -(-row_length // chunks) * chunks


def chunks_of(kind: str, chunks_per_rank: int) -> int:
    """How many chunks of a row a rank gets."""
    if kind not in KINDS:
        raise Refusal(f"unknown layout {kind!r}{nearest(kind, list(KINDS))}")
    if chunks_per_rank < 1:
        raise Refusal(f"chunks_per_rank={chunks_per_rank} must be at least 1; 8 balances packed documents")
    return KINDS[kind].chunks_per_rank or chunks_per_rank


def work_before(document_lengths: Sequence[int], places: np.ndarray, window: int | None) -> np.ndarray:
    """How many (query, key) pairs the queries before each place of the flattened batch see, int64.

    Documents are causal and look back `window` tokens. A closed form: documents are counted, not tokens.
    """
    lengths = np.asarray(document_lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    if places[-1] != ends[-1]:
        raise Refusal(f"documents hold {ends[-1]} tokens, the batch {places[-1]}; they must be equal")
    before = np.cumsum(_pairs(lengths, window)) - _pairs(lengths, window)
    document = np.searchsorted(ends, places)  # the one that holds the token before the place
    return before[document] + _pairs(places - (ends - lengths)[document], window)


def _pairs(length: np.ndarray, window: int | None) -> np.ndarray:
    """The pairs of a document's first `length` queries."""
    growing = length if window is None else np.minimum(length, window)
    return growing * (growing + 1) // 2 + (length - growing) * growing


@dataclass(frozen=True)
class Kind:
    """A way to give chunks to ranks."""

    chunks_per_rank: int | None
    """Of a row; None: as many as are asked for."""
    assign: Callable[[np.ndarray, int], list[int]]
    """From the work of each chunk (rows, chunks of a row) and the number of ranks to the owner of each, row by row."""
    description: str


def contiguous(work_BN: np.ndarray, num_ranks: int) -> list[int]:
    """Rank r holds the r-th part of each row."""
    return list(range(num_ranks)) * len(work_BN)


def zigzag(work_BN: np.ndarray, num_ranks: int) -> list[int]:
    """Rank r holds the r-th chunk from the front and the r-th from the back: balanced for rows of one document."""
    return [*range(num_ranks), *reversed(range(num_ranks))] * len(work_BN)


def balanced(work_BN: np.ndarray, num_ranks: int) -> list[int]:
    """The coarsest cut that shares the work well enough, up to the one asked for; if none does, the best of them.

    Coarse cuts have longer pieces: fewer and larger tiles, and fewer keys that travel.
    """
    finest = work_BN.shape[1] // num_ranks
    enough = GOOD_BALANCE * int(work_BN.sum()) / num_ranks
    best: tuple[int, np.ndarray] | None = None
    for chunks_per_rank in (m for m in range(1, finest + 1) if finest % m == 0):
        coarse_BN = work_BN.reshape(len(work_BN), num_ranks * chunks_per_rank, -1).sum(axis=-1)
        owners = swap_chunks(coarse_BN, lightest_rank_first(coarse_BN, num_ranks), num_ranks, enough)
        most = int(_loads(coarse_BN, owners, num_ranks).max())
        if best is None or most < best[0]:
            best = most, owners
        if most <= enough:
            break
    assert best is not None
    return best[1].tolist()


def lightest_rank_first(work_BN: np.ndarray, num_ranks: int) -> np.ndarray:
    """Owners (B * N,): heaviest chunk first, each to the rank with the least work (Graham 1969) that may still take one
    of its row. Ties go to the lower number: all ranks decide alike."""
    num_rows, chunks = work_BN.shape
    work = work_BN.ravel()
    room = [[chunks // num_ranks] * num_ranks for _ in range(num_rows)]
    owners = np.empty(len(work), dtype=np.int64)
    lightest = [(0, rank) for rank in range(num_ranks)]
    for chunk in np.argsort(-work, kind="stable").tolist():
        row, full = room[chunk // chunks], []
        while not row[lightest[0][1]]:
            full.append(heapq.heappop(lightest))
        load, rank = lightest[0]
        heapq.heapreplace(lightest, (load + int(work[chunk]), rank))
        for entry in full:
            heapq.heappush(lightest, entry)
        row[rank] -= 1
        owners[chunk] = rank
    return owners


def swap_chunks(work_BN: np.ndarray, owners: np.ndarray, num_ranks: int, enough: float) -> np.ndarray:
    """Owners after swaps of two chunks of a row, each the one that helps the busiest rank most, down to `enough` work.

    Equal numbers of chunks leave the lightest-rank rule a few percent short, as its last chunks have no choice.
    """
    owners, work = owners.copy(), work_BN.ravel()
    row = np.arange(len(work)) // work_BN.shape[1]
    loads = _loads(work_BN, owners, num_ranks)
    while loads.max() > enough:
        busiest = int(loads.argmax())
        own, other = np.flatnonzero(owners == busiest), np.flatnonzero(owners != busiest)
        moved = work[own, None] - work[other]
        after = np.maximum(loads[busiest] - moved, loads[owners[other]] + moved)
        after[row[own, None] != row[other]] = loads[busiest]
        if after.size == 0 or after.min() >= loads[busiest]:
            break
        i, j = np.unravel_index(after.argmin(), after.shape)
        here, there = own[i], other[j]
        loads[busiest] -= moved[i, j]
        loads[owners[there]] += moved[i, j]
        owners[[here, there]] = owners[[there, here]]
    return owners


def _loads(work_BN: np.ndarray, owners: np.ndarray, num_ranks: int) -> np.ndarray:
    loads = np.zeros(num_ranks, dtype=np.int64)
    np.add.at(loads, owners, work_BN.ravel())
    return loads


KINDS: dict[str, Kind] = {
    "contiguous": Kind(1, contiguous, "one run of tokens each; the last rank works most"),
    "zigzag": Kind(2, zigzag, "one chunk from the front, one from the back; balanced for a single document"),
    "balanced": Kind(None, balanced, "chunks by their true causal work; balanced for packed documents"),
}
