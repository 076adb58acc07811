"""Documents and masks: the drawing, the groups, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention.mask import Documents, Mask, round_up
from settings import Refusal

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple)


def seen(mask: Mask, t: int, s: int, T: int, S: int) -> bool:
    """The definition, one pair at a time, for a single row."""
    place = t + S - T
    ends = np.cumsum(mask.documents.lengths) if mask.documents else np.array([S])
    same = np.searchsorted(ends, place, side="right") == np.searchsorted(ends, s, side="right")
    near = mask.window is None or s > place - mask.window
    return bool(same and near and (s <= place or not mask.is_causal))


@pytest.mark.parametrize(("T", "S"), [(6, 6), (2, 6), (6, 2), (1, 5)])
@pytest.mark.parametrize("window", [None, 1, 3, 99])
def test_dense_is_the_definition(T: int, S: int, window: int | None) -> None:
    mask = Mask(window=window)
    drawn = mask.dense(2, T, S, "cpu")
    assert drawn.shape == (2, T, S)
    for t in range(T):
        for s in range(S):
            assert drawn[0, t, s] == drawn[1, t, s] == seen(mask, t, s, T, S)


@given(lengths, st.sampled_from([None, 1, 4]), st.booleans())
def test_dense_keeps_documents_apart(lengths: tuple[int, ...], window: int | None, is_causal: bool) -> None:
    mask = Mask(is_causal, window if is_causal else None, Documents(lengths))
    T = sum(lengths)
    drawn = mask.dense(1, T, T, "cpu")[0]
    for t, s in np.random.default_rng(0).integers(0, T, (50, 2)):
        assert drawn[t, s] == seen(mask, t, s, T, T)


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


def test_narrower_window_wins() -> None:
    assert Mask(window=8).within(4).window == 4
    assert Mask(window=4).within(8).window == 4
    assert Mask().within(8).window == 8
    assert Mask(window=4).within(None).window == 4


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
    ],
)
def test_refusals(make, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        make()
