"""Packing: every token once, no row too long, as few rows and cuts as possible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import GROUP, PACKINGS, Pack, Packing, pieces, ragged_ranges

lengths_of_documents = st.lists(st.integers(0, 300), max_size=60)


def rows_of(packing: Packing) -> list[list[tuple[int, int, int]]]:
    return [packing.row(number) for number in range(packing.num_rows)]


@pytest.mark.parametrize("pack", PACKINGS)
@settings(max_examples=50, deadline=None)
@given(lengths=lengths_of_documents, sequence_length=st.integers(1, 128), key=st.integers(0, 2**64 - 1))
def test_every_target_exactly_once(pack: Pack, lengths: list[int], sequence_length: int, key: int) -> None:
    packing = pieces(np.array(lengths, dtype=np.int64), sequence_length, pack, key)
    rows = rows_of(packing)
    found = [
        (document, token) for row in rows for document, start, length in row for token in range(start, start + length)
    ]
    assert len(found) == len(set(found))
    every = {(document, token) for document, length in enumerate(lengths) for token in range(length)}
    ends = {(document, length - 1) for document, length in enumerate(lengths)}
    assert set(found) <= every
    assert every - set(found) <= ends
    # The label of each place is the document's next token.
    targets = [(document, token + 1) for document, token in found if token + 1 < lengths[document]]
    assert set(targets) == {(document, token) for document, token in every if token}
    assert all(0 < sum(length for _, _, length in row) <= sequence_length for row in rows)
    assert all(row for row in rows)
    assert all(length > 1 or start + length < lengths[document] for row in rows for document, start, length in row)


@settings(max_examples=50, deadline=None)
@given(lengths=lengths_of_documents, sequence_length=st.integers(1, 128))
def test_best_fit_cuts_only_what_is_too_long(lengths: list[int], sequence_length: int) -> None:
    packing = pieces(np.array(lengths, dtype=np.int64), sequence_length)
    for document, length in enumerate(lengths):
        targets = max(0, length - 1)
        assert (packing.documents == document).sum() == -(-targets // sequence_length)


@settings(max_examples=50, deadline=None)
@given(lengths=lengths_of_documents, sequence_length=st.integers(1, 128))
def test_best_fit_is_near_the_fewest_rows(lengths: list[int], sequence_length: int) -> None:
    rows = pieces(np.array(lengths, dtype=np.int64), sequence_length).num_rows
    lengths = [length - (length > 0 and length % sequence_length == 1 % sequence_length) for length in lengths]
    fewest = -(-sum(lengths) // sequence_length)
    assert fewest <= rows
    # Best-fit decreasing needs at most 11/9 of the best plus 6/9 (Dosa); the best of full rows is themselves.
    full = sum(length // sequence_length for length in lengths)
    rest = sorted((length % sequence_length for length in lengths if length % sequence_length), reverse=True)
    more_than_half = sum(length > sequence_length / 2 for length in rest)
    lower = max(-(-sum(rest) // sequence_length), more_than_half)
    assert rows - full <= max(lower * 1.5 + 1, lower)


def test_example_of_the_paper() -> None:
    """Ding et al., arXiv 2404.10830, Figure 1."""
    packing = pieces(np.array([14, 7, 5, 2, 3]), 8)
    assert sorted(sorted(length for _, _, length in row) for row in rows_of(packing)) == [[2, 6], [3, 5], [7], [8]]
    together = pieces(np.array([14, 7, 5, 2, 3]), 8, "concat")
    assert together.num_rows == 4
    assert together.padding == pytest.approx(1 / 32)


@settings(max_examples=50, deadline=None)
@given(lengths=lengths_of_documents, sequence_length=st.integers(1, 128), key=st.integers(0, 99))
def test_concat_pads_only_the_last_row_and_lone_ends(lengths: list[int], sequence_length: int, key: int) -> None:
    packing = pieces(np.array(lengths, dtype=np.int64), sequence_length, "concat", key)
    filled = [sum(length for _, _, length in row) for row in rows_of(packing)]
    assert all(count >= sequence_length - 1 for count in filled[:-1])


def test_many_short_documents_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 900, size=3 * GROUP)
    packing = pieces(lengths, 1024, key=3)
    assert packing.padding < 0.01
    assert packing.lengths.sum() == lengths.sum() - (lengths == 1).sum()
    assert not np.array_equal(packing.documents, pieces(lengths, 1024, key=4).documents)


def test_ragged_ranges() -> None:
    assert ragged_ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
