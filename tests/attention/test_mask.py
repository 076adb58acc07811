"""Documents and masks: the drawing, the groups, and what is refused."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.mask import Documents, Mask, round_up
from docs.draw_masks import as_text
from settings import Refusal
from tests.attention.cases import Case, cases

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple)


def sees(mask: Mask, row: tuple[int, ...], keys: tuple[int, ...], prefixes: tuple[int, ...], pair: np.ndarray) -> bool:
    """The definition, one pair at a time, for a row of documents of these lengths, of queries and of keys."""
    t, s = pair
    query_ends, key_ends = np.cumsum(row), np.cumsum(keys)
    document = int(np.searchsorted(query_ends, t, side="right"))
    if document != np.searchsorted(key_ends, s, side="right"):
        return False
    place = s - (key_ends[document] - keys[document])
    offset = keys[document] - row[document] if mask.offset is None else mask.offset
    stands = t - (query_ends[document] - row[document]) + offset
    if not mask.is_causal or place < prefixes[document]:
        return True
    is_near = mask.window is None or place > stands - mask.window or place < mask.first_tokens
    return bool(place <= stands and is_near)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_dense_is_the_definition(case: Case) -> None:
    """Every mask there is, pair by pair."""
    mask, drawn = case.mask, case.mask.dense(case.B, case.T, case.S, "cpu")
    assert drawn.shape == (case.B, case.T, case.S) and drawn.dtype == torch.bool
    sides = [mask.documents, mask.key_documents or mask.documents]
    rows, keys = (
        split_rows(side.lengths, length, case.B) if side else [(length,)] * case.B
        for side, length in zip(sides, (case.T, case.S), strict=True)
    )
    prefixes = iter(mask.prefixes if isinstance(mask.prefix, tuple) else mask.prefixes * 200)
    for b in range(case.B):
        of_row = tuple(next(prefixes) for _ in rows[b])
        for pair in np.random.default_rng(b).integers(0, (case.T, case.S), (30, 2)):
            assert drawn[b, *pair] == sees(mask, rows[b], keys[b], of_row, pair)


def split_rows(lengths: tuple[int, ...], row_length: int, num_rows: int) -> list[tuple[int, ...]]:
    """The lengths of each row's documents."""
    rows: list[tuple[int, ...]] = [()]
    for length in lengths:
        if sum(rows[-1]) == row_length:
            rows.append(())
        rows[-1] += (length,)
    assert len(rows) == num_rows
    return rows


@pytest.mark.parametrize(
    ("mask", "T", "S", "drawing"),
    [
        (Mask(), 3, 3, "x.. xx. xxx"),
        (Mask(is_causal=False), 2, 3, "xxx xxx"),
        (Mask(), 2, 4, "xxx. xxxx"),
        (Mask(), 4, 2, ".. .. x. xx"),
        (Mask(window=2), 4, 4, "x... xx.. .xx. ..xx"),
        (Mask(window=1, first_tokens=1), 4, 4, "x... xx.. x.x. x..x"),
        (Mask(prefix=2), 4, 4, "xx.. xx.. xxx. xxxx"),
        (Mask(window=1, prefix=2), 4, 4, "xx.. xx.. xxx. xx.x"),
        (Mask(offset=1), 3, 3, "xx. xxx xxx"),
        (Mask(offset=-1), 3, 3, "... x.. xx."),
        (Mask(window=2, offset=2), 3, 3, ".xx ..x ..."),
        (Mask(documents=Documents((1, 3))), 4, 4, "x... .x.. .xx. .xxx"),
        (Mask(documents=Documents((2, 2)), prefix=(0, 2)), 4, 4, "x... xx.. ..xx ..xx"),
        (Mask(documents=Documents((2, 1)), key_documents=Documents((3, 2))), 3, 5, "xx... xxx.. ...xx"),
        (Mask(documents=Documents((2, 1)), key_documents=Documents((1, 2))), 3, 3, "... x.. .xx"),
    ],
)  # fmt: skip
def test_drawn_by_hand(mask: Mask, T: int, S: int, drawing: str) -> None:
    assert as_text(mask, T, S).split() == drawing.split()


def test_rows_of_a_batch_are_apart_and_may_have_prefixes_of_their_own() -> None:
    assert as_text(Mask(prefix=(0, 2)), 2, 2, B=2).split() == ["x.", "xx", "xx", "xx"]
    assert as_text(Mask(documents=Documents((2, 1, 1))), 2, 2, B=2).split() == ["x.", "xx", "x.", ".x"]


@given(lengths)
def test_groups_hold_every_token_once_in_its_document(lengths: tuple[int, ...]) -> None:
    documents = Documents(lengths)
    ends = np.cumsum(lengths)
    groups = documents.groups("cpu")
    assert [length for length, _ in groups] == sorted(set(lengths))
    for length, index_DL in groups:
        starts = index_DL[:, 0].numpy()
        assert np.array_equal(index_DL.numpy(), starts[:, None] + np.arange(length))
        assert set(starts + length) <= set(ends)
    assert sorted(torch.cat([index.flatten() for _, index in groups]).tolist()) == list(range(sum(lengths)))
    assert documents.cu_seqlens("cpu").tolist() == [0, *ends] and documents.cu_seqlens("cpu").dtype == torch.int32


@given(lengths, st.booleans())
def test_grouping_there_and_back(lengths: tuple[int, ...], is_padded: bool) -> None:
    grouping = Documents(lengths).grouping("cpu", is_padded=is_padded)
    assert torch.equal(grouping.source_P[grouping.place_N], torch.arange(sum(lengths)))
    assert sum(group.count * group.length for group in grouping.groups) == len(grouping.source_P)
    assert sum(group.count for group in grouping.groups) == len(lengths)
    assert len(grouping.source_P) <= 1.25 * sum(lengths)
    if not is_padded:
        assert len(grouping.source_P) == sum(lengths)
    # Inside every gathered document the tokens ascend and belong to one document; copies only at the end.
    start = 0
    for group in grouping.groups:
        rows = grouping.source_P[start : start + group.count * group.length].view(group.count, group.length)
        start += rows.numel()
        assert ((rows[:, 1:] - rows[:, :-1] >= 0) & (rows[:, 1:] - rows[:, :-1] <= 1)).all()
        document = np.searchsorted(np.cumsum(lengths), rows.numpy(), side="right")
        assert (document == document[:, :1]).all()


def test_ladder_of_lengths_is_short_and_never_far() -> None:
    all_lengths = np.arange(1, 5000)
    rounded = round_up(all_lengths)
    assert (rounded >= all_lengths).all() and (rounded <= np.maximum(all_lengths * 1.25, all_lengths)).all()
    assert len(set(rounded)) < 50 and (np.diff(rounded) >= 0).all()
    assert [length for length in (32, 48, 64, 96, 128, 512) if length not in rounded] == []


def test_grouping_is_computed_once() -> None:
    documents = Documents((3, 5, 3))
    assert documents.grouping("cpu", is_padded=True) is documents.grouping("cpu", is_padded=True)
    assert documents == Documents((3, 5, 3)) and hash(documents) == hash(Documents((3, 5, 3)))


def test_cu_seqlens_leave_out_empty_documents() -> None:
    starts = [0, 0, 3, 3, 8, 8]
    for form in (starts, torch.tensor(starts, dtype=torch.int32)):
        assert Documents.from_cu_seqlens(form) == Documents((3, 5))
    documents = Documents((3, 1, 5))
    assert Documents.from_cu_seqlens(documents.cu_seqlens("cpu")) == documents


def test_places_count_from_each_documents_start() -> None:
    document_N, place_N = Documents((3, 1, 2)).places("cpu")
    assert document_N.tolist() == [0, 0, 0, 1, 2, 2] and place_N.tolist() == [0, 1, 2, 0, 0, 1]


def test_narrower_window_wins_and_the_rest_stays() -> None:
    mask = Mask(window=8, documents=Documents((3, 4)), prefix=(1, 2), first_tokens=2)
    assert mask.within(4) == Mask(window=4, documents=Documents((3, 4)), prefix=(1, 2), first_tokens=2)
    assert mask.within(9) is mask and mask.within(None) is mask
    assert Mask().within(8) == Mask(window=8)
    assert type(Special(window=3, extra=5).within(2)) is Special and Special(extra=5).within(2).extra == 5


@dataclass(frozen=True, kw_only=True)
class Special(Mask):
    """A mask that knows more."""

    extra: int


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Documents(()), "at least one token"),
        (lambda: Documents((3, 0)), "at least one token"),
        (lambda: Mask(window=0), "window=0"),
        (lambda: Mask(is_causal=False, window=3), "is_causal=True"),
        (lambda: Mask(documents=Documents((4, 4))).check(2, 5, 5), "8 tokens, the batch 2 x 5"),
        (lambda: Mask(documents=Documents((3, 5))).check(2, 4, 4), "crosses the end of row 0"),
        (lambda: Mask(documents=Documents((4,))).check(1, 4, 6), "T=4 and S=6"),
        (lambda: Mask(documents=Documents((4,)), offset=1), "leave out documents or offset"),
        (lambda: Mask(prefix=-1), "prefix=-1 counts tokens"),
        (lambda: Mask(prefix=(2, -1)), "counts tokens"),
        (lambda: Mask(is_causal=False, prefix=2), "is seen both ways already"),
        (lambda: Mask(first_tokens=-1), "first_tokens=-1"),
        (lambda: Mask(key_documents=Documents((4,))), "give the queries' documents too"),
        (lambda: Mask(documents=Documents((2, 2)), key_documents=Documents((4,))), "as many, not 2 and 1"),
        (
            lambda: Mask(documents=Documents((4,)), key_documents=Documents((5,))).check(1, 4, 6),
            "5 tokens, the batch 1 x 6",
        ),
        (lambda: Mask(prefix=(1, 2)).check(3, 4, 4), "2 numbers; give one, or 3"),
        (lambda: Mask(documents=Documents((4, 4)), prefix=(1,)).check(1, 8, 8), "1 numbers; give one, or 2"),
        (lambda: Documents.from_cu_seqlens([1, 4]), "give 0, then where each document ends"),
        (lambda: Documents.from_cu_seqlens([0, 4, 3]), "none before the one before it"),
        (lambda: Documents.from_cu_seqlens([0]), "at least one token"),
    ],
)
def test_refusals(make, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        make()
