"""A plan computes every visible pair once, asks for the keys it reads and no others, and balances what it hands out."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from attention.mask import Documents, Mask
from context.layout import Layout, work_before
from context.plan import Plan, SplitMask, Tile, plan
from settings import Refusal
from tests.context.packed import cut_rows, for_packed_layouts


def dense(layout: Layout, documents: Documents, window: int | None) -> Tensor:
    """The mask over the flattened batch, drawn in full: (N, N)."""
    return Mask(documents=documents, window=window).dense(1, layout.num_tokens, layout.num_tokens, "cpu")[0]


def drawn(tile: Tile) -> Tensor:
    T, S = tile.query.stop - tile.query.start, tile.key.stop - tile.key.start
    return tile.mask.dense(1, T, S, "cpu")[0]


def cover(made: Plan, rank: int, tiles: tuple[Tile, ...]) -> Tensor:
    """How often the diagonal and these tiles of a rank compute each pair of the flattened batch, (N, N)."""
    count_NN = torch.zeros(made.layout.num_tokens, made.layout.num_tokens, dtype=torch.int64)
    own = made.layout.token_index(rank).flatten()
    count_NN[own[:, None], own] += made.diagonal(rank).dense(1, len(own), len(own), "cpu")[0]
    for tile in tiles:
        count_NN[tile.query, tile.key] += drawn(tile)
    return count_NN


@for_packed_layouts()
def test_every_visible_pair_is_computed_once_and_by_the_rank_that_has_the_query(case) -> None:
    layout, documents, window = case
    made, seen_NN = plan(layout, documents, window), dense(layout, documents, window)
    for rank in range(layout.num_ranks):
        own_NN = torch.zeros_like(seen_NN)
        own_NN[layout.token_index(rank).flatten()] = True
        assert torch.equal(cover(made, rank, made.tiles(rank)), (seen_NN & own_NN).long())
        assert torch.equal(cover(made, rank, made.joined_tiles(rank)), (seen_NN & own_NN).long())
        assert made.work[rank] == (seen_NN & own_NN).sum()


@for_packed_layouts()
def test_a_tile_has_no_idle_query_and_its_first_query_sees_every_key(case) -> None:
    layout, documents, window = case
    made = plan(layout, documents, window)
    for rank in range(layout.num_ranks):
        for tile in made.tiles(rank) + made.joined_tiles(rank):
            assert drawn(tile).any(dim=1).all()
            assert drawn(tile)[0].all()
            assert (tile.mask == Mask(is_causal=False)) == drawn(tile).all()


@for_packed_layouts()
def test_the_diagonal_has_a_window_only_where_it_hides_something(case) -> None:
    layout, documents, window = case
    for rank in range(layout.num_ranks):
        diagonal = plan(layout, documents, window).diagonal(rank)
        hides = window is not None and any(length > window for length in diagonal.documents.lengths)
        assert diagonal.window == (window if hides else None)


@for_packed_layouts()
def test_there_is_at_most_one_tile_for_two_pieces_and_it_stays_inside_them(case) -> None:
    layout, documents, window = case
    made = plan(layout, documents, window)
    for rank in range(layout.num_ranks):
        pairs = []
        for tile in made.tiles(rank):
            (query,) = [p for p in layout.pieces(rank) if p.start <= tile.query.start and tile.query.stop <= p.stop]
            (key,) = [p for p in layout.pieces(tile.key_rank) if p.start <= tile.key.start and tile.key.stop <= p.stop]
            assert key.stop <= query.start
            pairs.append((query.start, key.start))
        assert pairs == sorted(set(pairs))
        starts = [tile.query.start for tile in made.joined_tiles(rank)]
        assert starts == sorted(set(starts))


@for_packed_layouts()
def test_local_slices_are_where_the_ranks_keep_those_tokens(case) -> None:
    layout, documents, window = case
    made, everyone = plan(layout, documents, window), torch.arange(layout.num_tokens)
    index = [layout.token_index(rank).flatten() for rank in range(layout.num_ranks)]
    for rank in range(layout.num_ranks):
        for tile in made.tiles(rank):
            assert torch.equal(index[rank][tile.local_query], everyone[tile.query])
            assert torch.equal(index[tile.key_rank][tile.local_key], everyone[tile.key])
        for tile in made.joined_tiles(rank):
            assert torch.equal(index[rank][tile.local_query], everyone[tile.query])
            assert tile.local_key == tile.key
            assert tile.key_rank is None


@for_packed_layouts()
def test_keys_needed_are_exactly_those_that_tiles_read(case) -> None:
    layout, documents, window = case
    made = plan(layout, documents, window)
    hops = set()
    for rank, owner in itertools.product(range(layout.num_ranks), repeat=2):
        read = {k for tile in made.tiles(rank) if tile.key_rank == owner for k in range(tile.key.start, tile.key.stop)}
        ranges = made.keys_needed(rank, owner)
        assert [k for keys in ranges for k in range(keys.start, keys.stop)] == sorted(read)
        assert all(one.stop < other.start for one, other in itertools.pairwise(ranges)), "ranges that touch are one"
        hops |= {(rank - owner) % layout.num_ranks} if read and rank != owner else set()
    assert made.hops == tuple(sorted(hops))
    for rank in range(layout.num_ranks):
        others = [owner for owner in range(layout.num_ranks) if owner != rank]
        lengths = [keys.stop - keys.start for owner in others for keys in made.keys_needed(rank, owner)]
        assert made.keys_received(rank) == sum(lengths)


NUM_RANKS, LOCAL_TOKENS = 32, 8192


def lognormal(mean: float, sigma: float, seed: int) -> Documents:
    """A row of documents for 32 ranks with 8K tokens each."""
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, size=4096)
    return cut_rows([max(1, int(n)) for n in draws], NUM_RANKS * LOCAL_TOKENS, 1)


def on_32_ranks(kind: str, documents: Documents, chunks_per_rank: int = 8) -> Plan:
    total = NUM_RANKS * LOCAL_TOKENS
    return plan(
        Layout.make(kind, 1, total, NUM_RANKS, documents.lengths, chunks_per_rank=chunks_per_rank), documents, None
    )


def share_of_ring(made: Plan) -> float:
    """Keys that travel, over those of a ring that passes every key to every rank."""
    received = sum(made.keys_received(rank) for rank in range(NUM_RANKS))
    return received / (NUM_RANKS * (NUM_RANKS - 1) * LOCAL_TOKENS)


def least_possible(made: Plan, documents: Documents, chunks_per_rank: int) -> float:
    """A bound on the balance of any layout with so many chunks: the heaviest chunk beside the lightest ones."""
    total = NUM_RANKS * LOCAL_TOKENS
    borders = np.arange(0, total + 1, LOCAL_TOKENS // chunks_per_rank)
    work = np.sort(np.diff(work_before(documents.lengths, borders, None)))
    return max(1.0, (work[-1] + work[: chunks_per_rank - 1].sum()) * NUM_RANKS / work.sum())


def test_packed_documents_are_balanced_and_few_keys_travel() -> None:
    """32 ranks, 8K tokens a rank, lognormal documents whose median is 2K, 8 chunks a rank."""
    plans = [on_32_ranks("balanced", lognormal(2048 * np.exp(0.5), 1.0, seed)) for seed in range(20)]
    assert max(made.balance for made in plans) <= 1.05
    shares = [share_of_ring(made) for made in plans]
    assert np.mean(shares) <= 0.12
    assert np.quantile(shares, 0.9) <= 0.20


def test_a_layout_of_eight_chunks_is_as_even_as_its_heaviest_chunk_allows() -> None:
    """With a mean of 2K, one chunk of 1K tokens in a long document may by itself be more than a rank's share."""
    uneven = 0
    for seed in range(20):
        documents = lognormal(2048, 1.0, seed)
        made = on_32_ranks("balanced", documents)
        assert made.balance <= 1.05 * least_possible(made, documents, 8)
        assert share_of_ring(made) <= 0.20
        uneven += made.balance > 1.05
        assert on_32_ranks("balanced", documents, 16).balance <= 1.05, "finer chunks always do"
    assert uneven <= 4


def test_other_layouts_are_what_they_are() -> None:
    """Contiguous and zigzag over packed documents are far from even; zigzag is even over one document."""
    documents = lognormal(2048, 1.0, 0)
    assert on_32_ranks("contiguous", documents).balance > 2
    assert on_32_ranks("zigzag", documents).balance > 1.5
    one = Documents((NUM_RANKS * LOCAL_TOKENS,))
    assert on_32_ranks("zigzag", one).balance < 1.001
    assert on_32_ranks("balanced", one).balance < 1.001
    assert 1.9 < on_32_ranks("contiguous", one).balance < 2
    assert share_of_ring(on_32_ranks("zigzag", one)) == pytest.approx(0.75)
    assert share_of_ring(on_32_ranks("balanced", one)) == pytest.approx(0.75), "no more than zigzag"
    assert share_of_ring(on_32_ranks("contiguous", one)) == pytest.approx(0.5)


def test_a_window_bounds_what_travels() -> None:
    documents, window = Documents((NUM_RANKS * LOCAL_TOKENS,)), 512
    layout = Layout.make("contiguous", 1, NUM_RANKS * LOCAL_TOKENS, NUM_RANKS, documents.lengths, window=window)
    made = plan(layout, documents, window)
    assert made.hops == (1,)
    assert [made.keys_received(rank) for rank in range(NUM_RANKS)] == [0] + [window - 1] * (NUM_RANKS - 1)
    assert made.balance < 1.001


def test_a_plan_is_made_once_for_what_is_equal_and_a_window_that_hides_nothing_is_none() -> None:
    layout = Layout.make("zigzag", 1, 16, 2, [9, 7])
    again = Layout.make("zigzag", 1, 16, 2, [9, 7])
    assert plan(layout, Documents((9, 7)), 4) is plan(again, Documents((9, 7)), 4)
    assert plan(layout, Documents((9, 7)), 4).tiles(0) is plan(layout, Documents((9, 7)), 4).tiles(0)
    assert plan(layout, Documents((9, 7)), 4) != plan(layout, Documents((9, 7)), 5)
    assert plan(layout, Documents((9, 7)), 9).window is None
    assert plan(layout, Documents((9, 7)), 8).window == 8
    assert plan(layout, Documents((9, 7)), 9).diagonal(0).window is None
    with pytest.raises(Refusal, match="documents hold 12 tokens"):
        plan(layout, Documents((12,)))


def test_a_million_tokens_make_no_more_tiles_than_their_cut_needs() -> None:
    """What planning costs is the number of pieces and tiles, never of tokens or of pairs of pieces."""
    row = cut_rows([2000] * 600, 2**20, 1)
    made = plan(Layout.make("balanced", 1, 2**20, 32, row.lengths), row)
    tiles = sum(len(made.tiles(rank)) for rank in range(32))
    pieces = sum(len(made.layout.pieces(rank)) for rank in range(32))
    assert tiles <= 2 * pieces
    one = Documents((2**20,))
    assert len(plan(Layout.make("balanced", 1, 2**20, 32, one.lengths), one).tiles(31)) <= 62


LAYOUT = Layout.make("zigzag", 2, 8, 2, [8, 3, 5])


def test_a_split_mask_keeps_its_layout_within_a_window() -> None:
    mask = SplitMask(documents=Documents((8, 3, 5)), layout=LAYOUT)
    windowed = mask.within(3)
    assert isinstance(windowed, SplitMask)
    assert (windowed.window, windowed.layout, windowed.documents) == (3, LAYOUT, mask.documents)
    assert windowed.within(5) is windowed
    assert mask.plan is plan(LAYOUT, Documents((8, 3, 5)), None)
    assert windowed.plan is plan(LAYOUT, Documents((8, 3, 5)), 3)
    whole = Mask(documents=mask.documents, window=3)
    assert torch.equal(windowed.dense(2, 8, 8, "cpu"), whole.dense(2, 8, 8, "cpu")), "the mask of the whole batch"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix": 2}, "prefix=2 is not supported when a sequence lies on several ranks"),
        ({"prefix": (0, 1, 0)}, r"prefix=\(0, 1, 0\)"),
        ({"first_tokens": 4}, "first_tokens=4"),
        ({"key_documents": Documents((8, 3, 5))}, "key_documents="),
        ({"offset": 0}, "offset=0 is for rows that are one document"),
        ({"is_causal": False}, "is_causal=False"),
        ({"documents": None}, "documents=None"),
        ({"documents": Documents((8, 3, 4))}, "documents hold 15 tokens, the batch 2 x 8"),
        ({"documents": Documents((7, 4, 5))}, "a document crosses the end of row 0"),
    ],
)
def test_masks_that_cannot_be_split_are_refused_by_name(change: dict, message: str) -> None:
    mask = SplitMask(documents=Documents((8, 3, 5)), layout=LAYOUT)
    with pytest.raises(Refusal, match=message):
        replace(mask, **change)
