"""The tables of blocks, walked as the kernels walk them: together they draw the mask, every pair once, nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.kernels.blocks import COLUMNS, Rows, Spans, key_blocks, query_blocks, segments_of, table_of
from attention.mask import Documents, Mask


@st.composite
def problems(draw):
    """(mask, (B, T, S)), any mask there is."""
    window = draw(st.none() | st.integers(1, 30))
    mask = Mask(
        is_causal=window is not None or draw(st.booleans()),
        window=window,
        first_tokens=draw(st.sampled_from([0, 0, 1, 5, 40])),
    )
    prefixes = [0, 0, 3] if mask.is_causal else [0]
    if draw(st.booleans()):
        rows, queries, keys = draw(st.integers(1, 2)), draw(st.integers(0, 40)), draw(st.integers(0, 40))
        offset = draw(st.none() | st.integers(-50, 50))
        prefixes += [tuple(draw(st.lists(st.integers(0, 45), min_size=rows, max_size=rows)))] * mask.is_causal
        return replace(mask, offset=offset, prefix=draw(st.sampled_from(prefixes))), (rows, queries, keys)
    lengths = tuple(draw(st.lists(st.integers(1, 25), min_size=1, max_size=5)))
    other = tuple(draw(st.lists(st.integers(1, 25), min_size=len(lengths), max_size=len(lengths))))
    keys = draw(st.sampled_from([None, Documents(other)]))
    prefixes += [
        tuple(draw(st.lists(st.integers(0, 30), min_size=len(lengths), max_size=len(lengths))))
    ] * mask.is_causal
    mask = replace(mask, documents=Documents(lengths), key_documents=keys, prefix=draw(st.sampled_from(prefixes)))
    return mask, (1, sum(lengths), sum(lengths if keys is None else other))


def spans(block, step):
    """(start, stop, whether it is masked) of each step of a block's walk."""
    yield from ((start, start + step, False) for start in range(block["inner"], block["outer"], step))
    for first, stop, last in (
        (0, block["head"], block["head"]),
        (block["low"], block["inner"], block["high"]),
        (block["outer"], block["high"], block["high"]),
    ):
        yield from ((start, min(start + step, last), True) for start in range(first, stop, step))


def walk(table, seen, step):
    """How often each pair of `seen` (own, other) is counted; a masked step counts those that are seen."""
    counts = np.zeros(seen.shape, dtype=int)
    for column in table.T.tolist():
        block = dict(zip(COLUMNS, column, strict=True))
        own = slice(block["first"], block["first"] + block["count"])
        for start, stop, is_masked in spans(block, step):
            other = slice(block["other"] + start, block["other"] + stop)
            assert stop > start and counts[own, other].shape[1] == stop - start
            if is_masked:
                assert seen[own, other].any(axis=0).all(), "a step reaches beyond what any of the block meets"
            counts[own, other] += seen[own, other] if is_masked else 1
    return counts


def drawn(mask, shape, heads):
    """The mask over all rows (token * heads + head) and all keys."""
    B, T, S = shape
    seen = np.zeros((B * T, B * S), dtype=bool)
    for row, dense in enumerate(mask.dense(B, T, S, "cpu").numpy()):
        seen[row * T : (row + 1) * T, row * S : (row + 1) * S] = dense
    return seen.repeat(heads, axis=0)


@given(problems(), st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 4, 16]), st.sampled_from([1, 4, 8]))
@settings(max_examples=250, deadline=None)
def test_the_tables_draw_the_mask(problem, heads, rows, keys):
    mask, shape = problem
    segments, seen = segments_of(mask, *shape), drawn(mask, shape, heads)
    np.testing.assert_array_equal(walk(query_blocks(segments, mask, heads, rows, keys), seen, keys), seen)
    np.testing.assert_array_equal(walk(key_blocks(segments, mask, heads, rows, keys), seen.T, rows), seen.T)


@given(problems(), st.sampled_from([1, 3]))
@settings(max_examples=50, deadline=None)
def test_every_row_and_every_key_has_one_block(problem, heads):
    mask, (B, T, S) = problem
    segments = segments_of(mask, B, T, S)
    for table, total in (
        (query_blocks(segments, mask, heads, 4, 8), B * T * heads),
        (key_blocks(segments, mask, heads, 4, 8), B * S),
    ):
        covered = [i for first, count in table[:2].T.tolist() for i in range(first, first + count)]
        assert sorted(covered) == list(range(total))


@given(problems(), st.sampled_from([1, 3]))
@settings(max_examples=50, deadline=None)
def test_the_places_in_a_table_are_those_of_the_mask(problem, heads):
    mask, shape = problem
    segments = segments_of(mask, *shape)
    places = {}
    for first, count, _, _, shift, *_ in query_blocks(segments, mask, heads, 4, 8).T.tolist():
        places |= {row: (row + shift) // heads for row in range(first, first + count)}
    dense = mask.dense(*shape, "cpu")
    if mask.documents is None and mask.is_causal and mask.window is None and not np.any(mask.prefix):
        B, T, S = shape
        for b in range(B):
            for t in range(T):
                assert np.clip(places[(b * T + t) * heads] + 1, 0, S) == dense[b, t].sum()
    for first, count, start, _, shift, other, *_ in key_blocks(segments, mask, heads, 4, 8).T.tolist():
        assert first - start in segments.key and count <= 8
        assert other % heads == 0 and (other + shift) // heads in segments.offset


@given(problems(), st.sampled_from([1, 3]))
@settings(max_examples=100, deadline=None)
def test_no_mask_where_all_is_seen(problem, heads):
    """Of steps that fit between what all rows see: without a head, which may close a gap that no one expects."""
    mask, shape = problem
    mask = replace(mask, prefix=0, first_tokens=0)
    segments, seen = segments_of(mask, *shape), drawn(mask, shape, heads)
    for table, visible in (
        (query_blocks(segments, mask, heads, 4, 4), seen),
        (key_blocks(segments, mask, heads, 4, 4), seen.T),
    ):
        for column in table.T.tolist():
            block = dict(zip(COLUMNS, column, strict=True))
            own = slice(block["first"], block["first"] + block["count"])
            for start in range(block["outer"], block["high"] - 3, 4):
                other = slice(block["other"] + start, block["other"] + start + 4)
                assert not visible[own, other].all()


def test_heavy_blocks_start_first():
    mask, shape = Mask(documents=Documents((100, 5, 60))), (1, 165, 165)
    table = query_blocks(segments_of(mask, *shape), mask, 1, 8, 8)
    steps = table[COLUMNS.index("high")] - table[COLUMNS.index("low")]
    assert (np.diff(-(-steps // 8)) <= 0).all() and steps[0] == 100


@pytest.mark.parametrize("window", [64, 256])
def test_the_work_of_a_window_is_linear(window):
    """Rows of 8 heads reach over 16 tokens: a block of 128 wastes less than 2 blocks of keys."""
    mask, shape = Mask(window=window), (1, 4096, 4096)
    table = query_blocks(segments_of(mask, *shape), mask, 8, 128, 64)
    low, high = table[COLUMNS.index("low")], table[COLUMNS.index("high")]
    assert (high - low).max() <= window + 15 and table.shape[1] == 4096 * 8 // 128


def test_a_table_is_made_once():
    arguments = (2, (16, 16), torch.device("cpu"))
    table = table_of(Rows(Mask(documents=Documents((3, 4))), (1, 7, 7)), "query", *arguments)
    assert table_of(Rows(Mask(documents=Documents((3, 4))), (1, 7, 7)), "query", *arguments) is table
    assert table_of(Rows(Mask(documents=Documents((3, 4))), (1, 7, 7)), "key", *arguments) is not table
    assert table.dtype == torch.int32 and table.is_contiguous()


def test_answers_stand_where_questions_stand_and_those_of_parts_one_after_another():
    mask, parts = Mask(), ((8, 6, 2, 5, 3), (8, 6, 20, 9, 8), (0, 3, 0, 4, 1))
    for work, queries, keys in (
        (Rows(mask, (3, 5, 7)), range(0, 15, 5), range(0, 21, 7)),
        (Spans(mask, parts), (0, 6, 12), (0, 5, 14)),
    ):
        segments = work.segments()
        for table, starts, expected in (
            (query_blocks(segments, mask, 2, 4, 4), segments.query * 2, [2 * first for first in queries]),
            (key_blocks(segments, mask, 2, 4, 4), segments.key, list(keys)),
        ):
            found = {(first - start, first - start + answer) for first, _, start, answer, *_ in table.T.tolist()}
            assert found == set(zip(starts.tolist(), expected, strict=True))
