"""Packed batches and layouts for tests over sequences on several ranks: drawn by hypothesis, or as real ones look."""

import itertools
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from attention.mask import Documents
from context.layout import KINDS, Layout, chunks_of


def cut_rows(lengths: list[int], row_length: int, num_rows: int) -> Documents:
    """Documents of these lengths one after another, cut at row ends, the last one filled up."""
    total, borders = num_rows * row_length, {0}
    for length in lengths:
        borders.add(min(max(borders) + length, total))
    cuts = sorted(borders | set(range(0, total + 1, row_length)))
    return Documents(tuple(end - start for start, end in itertools.pairwise(cuts)))


@st.composite
def packed_layouts(draw: st.DrawFn) -> tuple[Layout, Documents, int | None]:
    """(layout, documents, window): any kind, one to three rows, documents of one token to a whole row."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    num_ranks, chunks_per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    chunk_length, num_rows = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    row_length = chunk_length * num_ranks * chunks_of(kind, chunks_per_rank)
    sizes = st.one_of(st.just(1), st.just(chunk_length), st.integers(1, row_length))
    documents = cut_rows(draw(st.lists(sizes, max_size=12)), row_length, num_rows)
    window = draw(st.none() | st.integers(1, row_length + 1))
    layout = Layout.make(
        kind, num_rows, row_length, num_ranks, documents.lengths, chunks_per_rank=chunks_per_rank, window=window
    )
    return layout, documents, window


def for_packed_layouts(*more: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on a hundred of them, and on what else it asks for; however busy the machine is."""
    return lambda test: settings(deadline=None)(given(packed_layouts(), *more)(test))
