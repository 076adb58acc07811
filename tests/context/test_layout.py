"""Layouts hand out every token once, in ascending order, the same on all ranks; balanced ones share the work."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.mask import Mask
from context.layout import (
    GOOD_BALANCE,
    KINDS,
    Layout,
    Piece,
    balanced,
    chunks_of,
    lightest_rank_first,
    padded_length,
    swap_chunks,
    work_before,
)
from settings import Refusal
from tests.context.packed import for_packed_layouts


@for_packed_layouts(st.integers(0, 2))
def test_shards_are_the_tokens_of_the_index_and_come_together_again(case, num_more: int) -> None:
    layout, _, _ = case
    x_BT = torch.arange(layout.num_tokens * 2**num_more, dtype=torch.float64)
    x_BT = x_BT.view(layout.num_rows, layout.row_length, *[2] * num_more)
    shards = [layout.shard(x_BT, rank) for rank in range(layout.num_ranks)]
    for rank, shard in enumerate(shards):
        index_BT = layout.token_index(rank)
        assert shard.shape == (layout.num_rows, layout.row_length // layout.num_ranks, *[2] * num_more)
        assert torch.equal(shard, x_BT.flatten(0, 1)[index_BT])
        assert torch.equal(index_BT // layout.row_length, torch.arange(layout.num_rows)[:, None].expand_as(index_BT))
        assert index_BT.flatten().diff().gt(0).all()
    assert torch.equal(layout.unshard(shards), x_BT)


@for_packed_layouts()
def test_pieces_are_the_fewest_runs_of_a_ranks_tokens(case) -> None:
    layout, _, _ = case
    for rank in range(layout.num_ranks):
        index = layout.token_index(rank).flatten().tolist()
        pieces = layout.pieces(rank)
        assert [t for piece in pieces for t in range(piece.start, piece.stop)] == index
        assert all(one.stop < other.start for one, other in itertools.pairwise(pieces))
        assert [piece.local_start for piece in pieces] == [index.index(piece.start) for piece in pieces]
        assert sum(piece.length for piece in pieces) == layout.num_local_tokens
        assert [layout.local(rank, token) for token in index] == list(range(len(index)))
        assert all((rank, piece) in layout.all_pieces for piece in pieces)
    tokens = [t for _, piece in layout.all_pieces for t in range(piece.start, piece.stop)]
    assert tokens == list(range(layout.num_tokens))


@for_packed_layouts(st.data())
def test_joined_neighbours_are_a_layout_whose_order_is_known(case, data: st.DataObject) -> None:
    layout, _, _ = case
    size = data.draw(st.sampled_from([s for s in range(1, layout.num_ranks + 1) if layout.num_ranks % s == 0]))
    joined = layout.joined(size)
    for rank in range(joined.num_ranks):
        members = range(rank * size, (rank + 1) * size)
        shares = torch.cat([layout.token_index(member).flatten() for member in members])
        order = layout.joined_order(members)
        assert torch.equal(shares[order], joined.token_index(rank).flatten())
        assert torch.equal(shares[order][order.argsort()], shares)


@for_packed_layouts()
def test_work_before_counts_the_pairs_of_the_dense_mask(case) -> None:
    layout, documents, window = case
    N = layout.num_tokens
    seen_NN = Mask(documents=documents, window=window).dense(1, N, N, "cpu")[0]
    places = np.arange(N + 1)
    assert work_before(documents.lengths, places, window).tolist() == [0, *seen_NN.sum(1).cumsum(0).tolist()]


def test_gradients_pass_through_shard_and_unshard() -> None:
    layout = Layout.make("balanced", 2, 24, 3, [5, 19, 24], chunks_per_rank=4)
    x_BT = torch.randn(2, 24, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layout.unshard([layout.shard(x, r) * (r + 1) for r in range(3)]), x_BT)


def test_zigzag_and_contiguous_as_drawn() -> None:
    assert Layout.make("contiguous", 1, 12, 3, [12]).owners == (0, 1, 2)
    zigzag = Layout.make("zigzag", 2, 12, 3, [12, 12])
    assert zigzag.owners == (0, 1, 2, 2, 1, 0) * 2
    assert zigzag.pieces(2) == (Piece(4, 8, 0), Piece(16, 20, 4))
    # Side by side across a row's end: one piece all the same.
    assert zigzag.pieces(0) == (Piece(0, 2, 0), Piece(10, 14, 2), Piece(22, 24, 6))


def test_balanced_finds_the_zigzag_of_a_single_document() -> None:
    layout = Layout.make("balanced", 1, 64, 4, [64], chunks_per_rank=8)
    assert len(layout.owners) == 8, "two chunks a rank are enough"
    assert layout.owners == layout.owners[::-1], "one from the front, one from the back"


def test_balanced_cuts_no_finer_than_needed() -> None:
    assert len(Layout.make("balanced", 1, 64, 4, [16] * 4, chunks_per_rank=8).owners) == 4
    assert len(Layout.make("balanced", 4, 64, 4, [64] * 4, chunks_per_rank=8).owners) == 16, "rows even each other out"


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=8, max_size=8), st.sampled_from([1, 2]), st.sampled_from([2, 4]))
def test_swaps_keep_the_numbers_of_chunks_and_never_make_it_worse(work: list[int], num_rows: int, ranks: int) -> None:
    work_BN = np.array(work).reshape(num_rows, -1)

    def most(owners: np.ndarray) -> int:
        return max(work_BN.ravel()[owners == rank].sum() for rank in range(ranks))

    first = lightest_rank_first(work_BN, ranks)
    swapped = swap_chunks(work_BN, first, ranks, enough=0.0)
    assert most(swapped) <= most(first)
    for owners in (first, swapped):
        for row in owners.reshape(num_rows, -1):
            assert np.bincount(row, minlength=ranks).tolist() == [work_BN.shape[1] // ranks] * ranks
    # No swap that is left would help the busiest rank.
    for i, j in itertools.combinations(range(8), 2):
        if i // work_BN.shape[1] == j // work_BN.shape[1]:
            other = swapped.copy()
            other[[i, j]] = swapped[[j, i]]
            busiest = [r for r in range(ranks) if work_BN.ravel()[swapped == r].sum() == most(swapped)]
            assert most(other) >= most(swapped) or len(busiest) > 1


def test_swaps_mend_what_the_lightest_rank_rule_leaves() -> None:
    work_BN = np.array([[10, 10, 10, 9, 3, 1]])  # the rule gives 10 + 9 + 3 and 10 + 10 + 1, or worse
    first = lightest_rank_first(work_BN, 2)
    loads = [work_BN[0][swap_chunks(work_BN, first, 2, 0.0) == rank].sum() for rank in range(2)]
    assert max(loads) == 22


def test_the_same_on_every_rank_on_every_machine() -> None:
    """Whole numbers and a rule for ties: what one rank computes, all do. A change here is a change of every run."""
    layout = Layout.make("balanced", 2, 32, 2, [7, 10, 1, 14, 32], chunks_per_rank=4)
    assert layout == Layout.make("balanced", 2, 32, 2, (7, 10, 1, 14, 32), chunks_per_rank=4)
    assert layout.owners == (1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0)
    even = np.full((2, 4), 5)
    assert lightest_rank_first(even, 2).tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


@settings(deadline=None)
@given(st.integers(1, 500), st.sampled_from(sorted(KINDS)), st.integers(1, 8), st.integers(1, 8))
def test_padded_length_is_the_next_that_can_be_cut(length: int, kind: str, ranks: int, chunks: int) -> None:
    padded = padded_length(length, kind, ranks, chunks)
    assert 0 <= padded - length < ranks * chunks_of(kind, chunks)
    Layout.make(kind, 1, padded, ranks, [padded], chunks_per_rank=chunks)
    if padded != length:
        with pytest.raises(Refusal, match=f"pad them to {padded} tokens"):
            Layout.make(kind, 1, length, ranks, [length], chunks_per_rank=chunks)


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(Refusal, match=r"unknown layout 'zigzga'; did you mean 'zigzag'\?"):
        Layout.make("zigzga", 1, 8, 2, [8])
    with pytest.raises(Refusal, match="chunks_per_rank=0"):
        Layout.make("balanced", 1, 8, 2, [8], chunks_per_rank=0)
    with pytest.raises(Refusal, match="documents hold 7 tokens, the batch 8"):
        Layout.make("zigzag", 1, 8, 2, [7])
    for rows, owners in ((1, (0, 0, 0, 1)), (1, (0, 1, 0)), (2, (0, 0, 1, 1)), (2, (0, 1, 1, 1)), (1, (0, 1, 2, 3))):
        with pytest.raises(Refusal, match="each of 2 ranks must own equally many chunks of each row"):
            Layout(rows, 12, 2, owners)
    with pytest.raises(Refusal, match="cannot be cut"):
        Layout(1, 9, 2, (0, 1))
    layout = Layout.make("zigzag", 2, 8, 2, [8, 8])
    with pytest.raises(Refusal, match=r"a whole tensor of this layout starts with \(2, 8\), not \(2, 4\)"):
        layout.shard(torch.zeros(2, 4), 0)
    with pytest.raises(Refusal, match=r"a share of this layout starts with \(2, 4\), not \(2, 8\)"):
        layout.unshard([torch.zeros(2, 8)] * 2)
    with pytest.raises(Refusal, match="cannot be joined in groups of 3"):
        layout.joined(3)
    with pytest.raises(AssertionError, match="token 2 is not on rank 0"):
        layout.local(0, 2)


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=16, max_size=16), st.sampled_from([1, 2]), st.sampled_from([2, 4]))
def test_balanced_takes_the_first_cut_that_is_even_enough_or_else_the_best(
    work: list[int], rows: int, ranks: int
) -> None:
    work_BN = np.array(work).reshape(rows, -1)
    enough = GOOD_BALANCE * sum(work) / ranks

    def most(owners: np.ndarray) -> int:
        return max(work_BN.reshape(len(owners), -1).sum(1)[owners == rank].sum() for rank in range(ranks))

    cuts = [2**n for n in range(5) if rows * ranks * 2**n <= 16]
    coarse = [work_BN.reshape(rows, ranks * m, -1).sum(-1) for m in cuts]
    reached = [most(swap_chunks(part, lightest_rank_first(part, ranks), ranks, enough)) for part in coarse]
    expected = next((n for n, load in enumerate(reached) if load <= enough), int(np.argmin(reached)))
    owners = np.array(balanced(work_BN, ranks))
    assert len(owners) == rows * ranks * cuts[expected]
    assert most(owners) == reached[expected]
