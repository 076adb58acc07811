"""Which blocks of keys a block of queries meets, and the reverse: tables made once on the host, read by the kernels.

Rows: the R = H / G query heads that read one key head stand together, R rows a token, row = token * R + head. A block
of rows then reaches over few tokens, and little of what it multiplies is thrown away by the mask.

Of its segment's keys a block of rows meets [0, head) and [low, high); of these every row sees all of [inner, outer),
which needs no mask. The same holds for a block of keys and the rows it meets, which have no head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from attention.mask import Mask

Ints = np.ndarray
COLUMNS = ("first", "count", "start", "answer", "shift", "other", "prefix", "head", "low", "inner", "outer", "high")
"""Of a table, (12, blocks) int32.

first, count: the block itself, from the start of all rows (all keys); start: the same from its segment's start.
answer: how far behind the block itself what is computed for it is written. other: start of the segment's keys (rows).
shift: a row, counted from the start of all, stands at the key (row + shift) // R of its segment. The rest: as above, in
keys (rows) from the segment's start; inner and outer are moved so that whole blocks of keys (rows) fit from low to
inner and from there to outer.
"""


@dataclass(frozen=True)
class Segments:
    """Queries and keys that belong together: one value for each segment in each column."""

    query: Ints
    """Its first query, counted from the start of all queries."""
    num_queries: Ints
    key: Ints
    """Its first key, counted from the start of all keys."""
    num_keys: Ints
    offset: Ints
    """The first query stands at this key of the segment, which may be before its first or after its last."""
    prefix: Ints
    query_answer: Ints
    """Where in the answers those of its first query stand."""
    key_answer: Ints


@dataclass(frozen=True)
class Rows:
    """Work that is a mask over rows of queries and keys: answers stand where questions stand."""

    mask: Mask
    shape: tuple[int, int, int]
    """(B, T, S)"""

    def segments(self) -> Segments:
        return segments_of(self.mask, *self.shape)


@dataclass(frozen=True)
class Spans:
    """Work that is a list of parts, which may share queries and keys: answers stand one part after another."""

    mask: Mask
    """What all parts have in common; its offset does not count."""
    parts: tuple[tuple[int, int, int, int, int], ...]
    """(first query, queries, first key, keys, key at which the first query stands) of each."""

    def segments(self) -> Segments:
        query, queries, key, keys, offset = np.array(self.parts, dtype=np.int64).T
        prefix = np.full_like(key, self.mask.prefixes[0])
        return Segments(query, queries, key, keys, offset, prefix, np.cumsum(queries) - queries, np.cumsum(keys) - keys)


Work = Rows | Spans


def segments_of(mask: Mask, num_rows: int, num_queries: int, num_keys: int) -> Segments:
    """One segment for each document, or for each row where a row is one."""
    mask.check(num_rows, num_queries, num_keys)
    if mask.documents is None:
        queries = np.full(num_rows, num_queries, dtype=np.int64)
        keys = np.full(num_rows, num_keys, dtype=np.int64)
    else:
        queries = np.asarray(mask.documents.lengths, dtype=np.int64)
        keys = queries if mask.key_documents is None else np.asarray(mask.key_documents.lengths, dtype=np.int64)
    offset = keys - queries if mask.offset is None else np.full_like(keys, mask.offset)
    prefix = np.broadcast_to(np.asarray(mask.prefix, dtype=np.int64), keys.shape)
    query, key = np.cumsum(queries) - queries, np.cumsum(keys) - keys
    return Segments(query, queries, key, keys, offset, prefix, query, key)


def query_blocks(segments: Segments, mask: Mask, heads: int, rows: int, keys: int) -> Ints:
    """The table of blocks of at most `rows` rows, `heads` a token, that walk over `keys` keys at a time."""
    segment, start = _cut(segments.num_queries * heads, rows)
    query, key, num_keys, offset, prefix = (
        column[segment]
        for column in (segments.query, segments.key, segments.num_keys, segments.offset, segments.prefix)
    )
    count = np.minimum(rows, segments.num_queries[segment] * heads - start)
    # The keys at which the first and the last row stand.
    place, last = start // heads + offset, (start + count - 1) // heads + offset

    def within(index: Ints) -> Ints:
        return np.clip(index, 0, num_keys)

    none = np.zeros_like(start)
    head, low, inner, outer, high = none, none, none, num_keys, num_keys
    if mask.is_causal:
        outer, high, prefix = within(place + 1), within(last + 1), within(prefix)
        head, seen_by_all = prefix, prefix
        if mask.window is not None:
            low, inner = within(place - mask.window + 1), within(last - mask.window + 1)
            head = np.maximum(prefix, np.minimum(mask.first_tokens, high))
            seen_by_all = np.maximum(prefix, np.minimum(mask.first_tokens, outer))
        # A head that reaches the rest is no head of its own, and what all rows see may start with it.
        joins, fills = head >= low, seen_by_all >= inner
        low, high = np.where(joins, 0, low), np.maximum(high, prefix)
        inner, outer = np.where(fills, 0, inner), np.where(fills, np.maximum(outer, seen_by_all), outer)
        head = np.where(joins, 0, head)
    spans = _spans(keys, head, low, inner, outer, high)
    answer = (segments.query_answer[segment] - query) * heads
    own = (query * heads + start, count, start, answer, (offset - query) * heads)
    return _heaviest_first((*own, key, prefix, *spans), keys)


def key_blocks(segments: Segments, mask: Mask, heads: int, rows: int, keys: int) -> Ints:
    """The table of blocks of at most `keys` keys that walk over `rows` rows, `heads` a token, at a time."""
    segment, start = _cut(segments.num_keys, keys)
    query, key, num_queries, offset, prefix = (
        column[segment]
        for column in (segments.query, segments.key, segments.num_queries, segments.offset, segments.prefix)
    )
    count = np.minimum(keys, segments.num_keys[segment] - start)
    last = start + count - 1

    def within(index: Ints) -> Ints:
        return np.clip(index, 0, num_queries)

    none = np.zeros_like(start)
    low, inner, outer, high = none, none, num_queries, num_queries
    if mask.is_causal:
        low, inner = within(start - offset), within(last - offset)
        if mask.window is not None:
            outer, high = within(start + mask.window - offset), within(last + mask.window - offset)
        high = np.where((start < mask.first_tokens) | (start < prefix), num_queries, high)
        outer = np.where((last < mask.first_tokens) | (last < prefix), num_queries, outer)
        low, inner = np.where(start < prefix, 0, low), np.where(last < prefix, 0, inner)
    spans = _spans(rows, none, *(column * heads for column in (low, inner, outer, high)))
    own = (key + start, count, start, segments.key_answer[segment] - key, (offset - query) * heads)
    return _heaviest_first((*own, query * heads, prefix, *spans), rows)


def _cut(lengths: Ints, size: int) -> tuple[Ints, Ints]:
    """(segment, start within it) of every block of at most `size`."""
    blocks = -(-lengths // size)
    segment = np.repeat(np.arange(len(lengths)), blocks)
    return segment, (np.arange(len(segment)) - (np.cumsum(blocks) - blocks)[segment]) * size


def _spans(step: int, head: Ints, low: Ints, inner: Ints, outer: Ints, high: Ints) -> tuple[Ints, ...]:  # noqa: PLR0917
    """(head, low, inner, outer, high) with steps of `step` from low to inner, and from there to outer."""
    high = np.maximum(high, low)
    inner = low + -(-np.maximum(np.minimum(inner, high) - low, 0) // step) * step
    outer = inner + np.maximum(outer - inner, 0) // step * step
    return head, low, inner, outer, high


def _heaviest_first(columns: Iterable[Ints], step: int) -> Ints:
    """The table, sorted so that what starts last is short: no processor is left alone with a long block."""
    table = np.stack(tuple(columns))
    head, low, high = (table[COLUMNS.index(name)] for name in ("head", "low", "high"))
    steps = -(-head // step) - (low - high) // step
    return np.ascontiguousarray(table[:, np.argsort(-steps, kind="stable")], dtype=np.int32)


@lru_cache(maxsize=64)
def table_of(work: Work, side: str, heads: int, cut: tuple[int, int], device: torch.device) -> Tensor:
    """The table of `side` "query" or "key" on a device, cut into (rows, keys): made when first asked for, and sent
    without waiting."""
    build = {"query": query_blocks, "key": key_blocks}[side]
    table = torch.from_numpy(build(work.segments(), work.mask, heads, *cut))
    if device.type != "cuda":
        return table
    return table.pin_memory().to(device, non_blocking=True)
