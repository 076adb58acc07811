"""Rows that begin alike: each in one family, which shares what it says and as much as it can."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.prefixes import WORTH_SHARING, Family, batches, find_families


def common(rows_BT: np.ndarray) -> int:
    """How many first tokens all rows have in common."""
    differs_T = (rows_BT != rows_BT[0]).any(axis=0)
    return int(differs_T.argmax()) if differs_T.any() else rows_BT.shape[1]


@settings(max_examples=200, deadline=None)
@given(
    beginnings=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=5), seed=st.integers(0)
)
def test_every_row_has_one_family_that_shares_what_it_says(beginnings: list[tuple[int, int]], seed: int) -> None:
    rng, length = np.random.default_rng(seed), 12
    rows = []
    for shared, count in beginnings:
        beginning = rng.integers(0, 3, shared)
        rows += [np.concatenate([beginning, rng.integers(0, 3, length - shared)]) for _ in range(count)]
    tokens_BT = rng.permutation(np.stack(rows).astype(np.int64))
    families = find_families(tokens_BT)
    assert sorted(row for family in families for row in family.rows) == list(range(len(tokens_BT)))
    for family in families:
        in_common = common(tokens_BT[list(family.rows)])
        if len(family.rows) == 1:
            assert family.shared == 0
        else:
            assert WORTH_SHARING * length <= in_common and family.shared == min(in_common, length - 1)
    for one in families:
        for other in families:
            if one is not other:
                both = tokens_BT[[*one.rows, *other.rows]]
                assert common(both) < WORTH_SHARING * length, "two families could have been one"


@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=8), at_once=st.integers(1, 4)
)
@settings(max_examples=100, deadline=None)
def test_families_of_a_size_are_read_together(sizes: list[tuple[int, int]], at_once: int) -> None:
    families = [Family(tuple(range(10 * n, 10 * n + size)), shared) for n, (size, shared) in enumerate(sizes)]
    by_rows = {family.rows: family.shared for family in families}
    read = list(batches(families, at_once))
    for rows_BM, shared in read:
        assert 1 <= len(rows_BM) <= at_once
        assert shared == min(by_rows[tuple(rows_M.tolist())] for rows_M in rows_BM)
    assert sorted(tuple(rows_M.tolist()) for rows_BM, _ in read for rows_M in rows_BM) == sorted(by_rows)
    for size in {size for size, _ in sizes}:
        parts = [len(rows_BM) for rows_BM, _ in read if rows_BM.shape[1] == size]
        assert sum(part < at_once for part in parts) <= 1, "more batches than it takes"


@pytest.mark.parametrize(("differ_at", "is_shared"), [(0, False), (4, False), (5, True), (9, True), (None, True)])
def test_half_a_row_is_worth_sharing(differ_at: int | None, is_shared: bool) -> None:
    tokens_BT = np.zeros((2, 10), dtype=np.int64)
    if differ_at is not None:
        tokens_BT[1, differ_at] = 1
    shared = min(differ_at if differ_at is not None else 10, 9)
    expected = [Family((0, 1), shared)] if is_shared else [Family((0,), 0), Family((1,), 0)]
    assert find_families(tokens_BT) == expected
