"""Which blocks of a mask hold anything: strips of queries, the blocks of keys each sees, and which are seen whole.

Arithmetic on lengths alone, on the host; kept, since every layer of a model asks the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from attention.mask import Mask


@dataclass(frozen=True)
class Block:
    """Keys that some query of a strip sees."""

    keys: slice
    is_full: bool
    """Every query of the strip sees all of them: nothing has to be masked."""


@dataclass(frozen=True)
class Strip:
    """Queries, and the blocks of keys they see: in no two blocks the same key, ascending, at least one."""

    queries: slice
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Segment:
    """Neighbouring documents (or a row that is one) in flat tokens."""

    queries: slice
    keys: slice
    is_single: bool
    """One document."""
    prefixes: tuple[int, ...]
    """One that counts for all, or one for each document or row."""


@lru_cache(maxsize=64)
def strips(T: int, S: int, mask: Mask, edge: int) -> tuple[Strip, ...]:
    """The strips of T queries over S keys, of one row or of rows alike; with documents, of the whole flat batch.

    edge: queries of a strip, and keys of a block, at most. Queries that see nothing are in no strip.
    """
    if mask.documents is None:
        return tuple(_of_document(Segment(slice(0, T), slice(0, S), True, mask.prefixes), mask, edge))
    found: list[Strip] = []
    for segment in _segments(mask, edge):
        if segment.is_single:
            found += _of_document(segment, mask, edge)
        else:
            found.append(Strip(segment.queries, (Block(segment.keys, is_full=False),)))
    return tuple(found)


def _segments(mask: Mask, edge: int) -> Iterator[Segment]:
    """The documents in order; neighbours that fit into one block together are one segment: fewer, larger products."""
    assert mask.documents is not None
    key_documents = mask.key_documents or mask.documents
    query_starts = [0, *accumulate(mask.documents.lengths)]
    key_starts = [0, *accumulate(key_documents.lengths)]
    prefixes = mask.prefixes if isinstance(mask.prefix, tuple) else mask.prefixes * len(mask.documents.lengths)
    first, count = 0, len(prefixes)
    while first < count:
        stop = first + 1
        while (
            stop < count
            and query_starts[stop + 1] - query_starts[first] <= edge
            and key_starts[stop + 1] - key_starts[first] <= edge
        ):
            stop += 1
        queries, keys = (slice(starts[first], starts[stop]) for starts in (query_starts, key_starts))
        yield Segment(queries, keys, stop == first + 1, prefixes[first:stop])
        first = stop


def _of_document(segment: Segment, mask: Mask, edge: int) -> Iterator[Strip]:
    T, S = (part.stop - part.start for part in (segment.queries, segment.keys))
    offset = S - T if mask.offset is None else mask.offset
    # Strips much longer than the window would mostly compute what it hides.
    height = edge if mask.window is None else min(edge, max(64, mask.window))
    for start in range(0, T, height):
        stop = min(start + height, T)
        view = View(mask, min(segment.prefixes), max(segment.prefixes), start + offset, stop - 1 + offset)
        blocks = tuple(
            Block(slice(segment.keys.start + first, segment.keys.start + last), view.sees_all(first, last - 1))
            for first, last in view.pieces(S, edge)
        )
        if blocks:
            yield Strip(slice(segment.queries.start + start, segment.queries.start + stop), blocks)


@dataclass(frozen=True)
class View:
    """What the queries that stand at the keys `first` to `last` of one document see of its keys."""

    mask: Mask
    shortest_prefix: int
    longest_prefix: int
    first: int
    last: int

    def pieces(self, S: int, edge: int) -> Iterator[tuple[int, int]]:
        """The keys [start, stop) that are seen by any of them, cut to at most `edge` and where all begin to see."""
        for start, stop in self.intervals(S):
            # From `first` on a causal mask cuts a corner, and up to where the last query's window begins.
            turns = (self.first, self.last - self.mask.window + 1) if self.mask.window else (self.first,)
            cuts = sorted({start, stop, *(turn for turn in turns if start < turn < stop and self.mask.is_causal)})
            for low, high in pairwise(cuts):
                parts = -(-(high - low) // edge)
                ends = [low + (high - low) * part // parts for part in range(parts + 1)]
                yield from pairwise(ends)

    def intervals(self, S: int) -> list[tuple[int, int]]:
        """The ranges of keys that any of them sees: what stays in view from the start, and what is near."""
        if not self.mask.is_causal:
            return [(0, S)] if S else []
        stop = max(0, min(S, self.last + 1))
        start = 0 if self.mask.window is None else max(0, self.first - self.mask.window + 1)
        kept = min(S, max(self.longest_prefix, min(self.mask.first_tokens if self.mask.window else 0, stop)))
        if kept >= start:
            return [(0, max(kept, stop))] if max(kept, stop) else []
        return [(low, high) for low, high in ((0, kept), (start, stop)) if low < high]

    def sees_all(self, low: int, high: int) -> bool:
        """Whether every query sees every key from `low` to `high`; False where that takes a closer look."""
        if not self.mask.is_causal or high < self.shortest_prefix:
            return True
        is_near = self.mask.window is None or low > self.last - self.mask.window
        return high <= self.first and (is_near or high < self.mask.first_tokens)
