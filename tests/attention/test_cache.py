"""Caches against a plain list of all tokens: whatever is appended, trimmed and repeated, the same is seen."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.cache import KVCache, Room
from attention.mask import Documents, Mask
from settings import Refusal

CAPACITY = 60


def tokens(start: int, count: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Two streams that tell row and place: (B, T, 2) and (B, T)."""
    numbers_BT = 1000 * torch.arange(rows)[:, None] + torch.arange(start, start + count) + 1.0
    return torch.stack([numbers_BT, -numbers_BT], dim=-1), numbers_BT


def assert_sees(views: tuple[torch.Tensor, ...], first: int, stop: int) -> None:
    for view, expected in zip(views, tokens(first, stop - first, len(views[0])), strict=True):
        assert torch.equal(view, expected)


@settings(max_examples=300, deadline=None)
@given(
    window=st.none() | st.integers(1, 20),
    chunk=st.integers(1, 12),
    reach=st.integers(0, 9),
    steps=st.lists(st.tuples(st.integers(1, 25), st.integers(0, 25)), min_size=1, max_size=12),
    data=st.data(),
)
def test_the_same_is_seen_as_of_a_list(window: int | None, chunk: int, reach: int, steps: list, data) -> None:
    """Appends of any length, each followed by going back: by an append of one chunk, or the reach in any case."""
    cache, length, furthest = Room(2, CAPACITY, chunk, reach).layer((2,), (), window=window), 0, 0
    for count, back in steps:
        if length + count > CAPACITY:
            break
        views = cache.append(*tokens(length, count))
        first = 0 if window is None else max(0, length - (window - 1))
        assert_sees(views, first, length + count)
        furthest = max(furthest, length + count)
        lowest = 0 if window is None else max(0, furthest - reach)
        if count <= chunk:
            lowest = min(lowest, length)
        length = max(length + count - back, min(lowest, length + count))
        cache.trim(length)
        assert cache.length == length
        if data.draw(st.booleans()):
            cache = cache.repeat(1)


@given(window=st.integers(1, 9), chunk=st.integers(1, 6), lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_a_trim_that_would_lose_the_window_is_refused_and_changes_nothing(
    window: int, chunk: int, lengths: list[int]
) -> None:
    """Every length that is not refused goes on rightly: checked for all of them."""
    for target in range(sum(lengths)):
        cache, length = Room(2, CAPACITY, chunk).layer((2,), (), window=window), 0
        for count in lengths:
            cache.append(*tokens(length, count))
            length += count
        try:
            cache.trim(target)
        except Refusal as refusal:
            assert f"from {length} to {target} tokens" in str(refusal) and f"reach={length - target}" in str(refusal)
            assert target < length - lengths[-1] or lengths[-1] > chunk, "a last append of one chunk can be taken back"
            target = length
        assert cache.length == target
        assert_sees(cache.append(*tokens(target, 2)), max(0, target - window + 1), target + 2)


def test_memory_is_taken_once_and_windows_take_theirs_alone() -> None:
    whole, short = (Room(3, 1000, chunk=16, reach=4).layer((2, 5), (2, 5), window=w) for w in (None, 8))
    assert whole.num_bytes == 3 * 1000 * 2 * 10 * 4
    assert short.num_bytes == 3 * (7 + 4 + 16) * 2 * 10 * 4
    assert Room(3, 10).layer((2, 5), window=8).num_bytes == 3 * 10 * 10 * 4, "never more than the capacity"
    before = [stream.data_ptr() for stream in short.streams]
    for _ in range(40):
        short.append(torch.zeros(3, 3, 2, 5), torch.zeros(3, 3, 2, 5))
    assert [stream.data_ptr() for stream in short.streams] == before


def test_a_strip_moves_once_in_a_chunk() -> None:
    """Else each token would copy its window."""
    cache, held = Room(1, 1000, chunk=10).layer((), window=5), []
    for place in range(100):
        cache.append(torch.full((1, 1), float(place)))
        held.append(cache.num_held)
    assert sum(later < earlier for earlier, later in pairwise(held)) == 9


@pytest.mark.parametrize("window", [None, 4])
def test_rows_are_repeated_one_behind_the_other_and_part_ways(window: int | None) -> None:
    cache = KVCache([Room(2, CAPACITY, 3).layer((2,), (), window=window) for _ in range(2)])
    for layer in cache.layers:
        layer.append(*tokens(0, 7))
    copies = cache.repeat(3)
    assert copies.length == 7 and copies.num_bytes == 3 * cache.num_bytes
    new = torch.arange(6.0)[:, None]
    _, seen = copies.layer(1).append(new[..., None].expand(-1, -1, 2), new)
    assert torch.equal(seen[:, -1], torch.arange(6.0))
    assert torch.equal(seen[:, :-1], tokens(0, 7)[1][:, -seen.shape[1] + 1 :].repeat_interleave(3, dim=0))
    assert cache.length == 7
    assert_sees(cache.layer(1).append(*tokens(7, 1)), 0 if window is None else 4, 8)


def test_a_cache_is_as_long_as_its_shortest_layer() -> None:
    cache = KVCache([Room(2, 5).layer((2,), (), window=window) for window in (None, 2)])
    assert cache.length == 0
    cache.layer(1).append(*tokens(0, 4))
    assert cache.length == 0
    cache.layer(0).append(*tokens(0, 3))
    assert cache.length == 3


def test_a_refused_trim_leaves_all_layers_alone() -> None:
    cache = KVCache([Room(2, CAPACITY, 1).layer((2,), (), window=window) for window in (None, 4)])
    for place in range(9):
        for layer in cache.layers:
            layer.append(*tokens(place, 1))
    with pytest.raises(Refusal, match=r"from 9 to 5 tokens: what the window of 4 needs there is gone; .* reach=4"):
        cache.trim(5)
    assert [layer.length for layer in cache.layers] == [9, 9]
    cache.trim(8)
    assert [layer.length for layer in cache.layers] == [8, 8]


@pytest.mark.parametrize("window", [None, 3])
def test_what_cannot_be_is_refused(window: int | None) -> None:
    cache = Room(1, 4).layer((), window=window)
    with pytest.raises(Refusal, match="holds 4 tokens and was given 5; make it with capacity=5"):
        cache.append(torch.zeros(1, 5))
    with pytest.raises(Refusal, match="no_grad"):
        cache.append(torch.zeros(1, 1, requires_grad=True))
    cache.append(torch.zeros(1, 2))
    for length in (-1, 3):
        with pytest.raises(Refusal, match=f"holds 2 tokens; trim to a length from 0 to that, not {length}"):
            cache.trim(length)


@pytest.mark.parametrize(
    ("mask", "key"),
    [
        (Mask(documents=Documents((2, 3))), "documents"),
        (Mask(first_tokens=2), "first_tokens"),
        (Mask(prefix=3), "prefix"),
        (Mask(prefix=(0, 3)), "prefix"),
        (Mask(is_causal=False), "is_causal"),
        (Mask(offset=3), "offset"),
    ],
)
def test_masks_that_speak_of_more_than_is_held_are_refused(mask: Mask, key: str) -> None:
    cache = KVCache([Room(1, 4).layer(())])
    with pytest.raises(Refusal, match=f"{key}=.* cannot be read from a cache"):
        cache.check(mask)
    cache.check(Mask(window=3))
