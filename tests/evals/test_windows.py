"""Windows of held-out text: disjoint, inside the text, the same text at every length."""

import numpy as np
import pytest

from evals.windows import documents_in, read, spread, spread_inside, sum_up, tile


def test_spread_is_disjoint_inside_and_even():
    rng = np.random.default_rng(1)
    for seed in range(300):
        length = int(rng.integers(1, 60))
        num_tokens = length + 1 + int(rng.integers(0, 500))
        max_tokens = int(rng.integers(1, 600))
        starts = spread(num_tokens, length, max_tokens, seed)
        assert len(starts) == max(1, min(max_tokens // length, (num_tokens - 1) // length))
        assert starts[0] >= 0 and starts[-1] + length + 1 <= num_tokens
        assert (np.diff(starts) >= length).all() and len(set(np.diff(starts))) <= 1
        np.testing.assert_array_equal(starts, spread(num_tokens, length, max_tokens, seed))


def test_spread_reaches_every_part_and_moves_with_the_seed():
    starts = spread(100_001, 100, 1_000, 0)
    assert starts[0] < 10_000 and starts[-1] >= 90_000
    assert len({spread(100_001, 100, 1_000, seed)[0] for seed in range(20)}) > 10


def test_shorter_windows_tile_longer_ones():
    blocks = np.array([3, 500])
    starts = tile(blocks, 128, 32)
    covered = np.concatenate([np.arange(start, start + 32) for start in starts])
    np.testing.assert_array_equal(np.sort(covered), np.concatenate([np.arange(3, 131), np.arange(500, 628)]))
    np.testing.assert_array_equal(tile(blocks, 128, 128), blocks)


def test_labels_are_the_next_tokens_within_documents():
    tokens = np.array([1, 2, 9, 3, 4, 5, 9, 6, 7], dtype=np.uint16)
    rows = read(tokens, np.array([0, 4]), 4, end_of_text=9)
    np.testing.assert_array_equal(rows.tokens_BT, [[1, 2, 9, 3], [4, 5, 9, 6]])
    np.testing.assert_array_equal(rows.labels_BT, [[2, -100, -100, 4], [5, -100, -100, 7]])
    assert rows.end_of_text == 9


def test_windows_inside_documents_never_cross(haystack):
    documents = documents_in(haystack, 256)
    assert sum(d.stop - d.start for d in documents) == (haystack != 256).sum()
    starts = spread_inside(documents, 100, 10**9, 0)
    rows = read(haystack, starts, 100, 256)
    assert (rows.labels_BT != -100).all() and (rows.tokens_BT != 256).all()
    assert len(starts) == sum((d.stop - d.start - 1) // 100 for d in documents)
    assert len(spread_inside(documents, 100, 1_000, 0)) == 10


def test_sum_up_counts_text_alone(materials):
    labels = np.array([[65, 66, -100], [67, -100, -100]])
    logprob = np.array([[-1.0, -2.0, np.nan], [-3.0, np.nan, np.nan]])
    loss = sum_up(labels, logprob, materials.tokenizer)
    assert (loss.nats, loss.tokens, loss.num_bytes) == (6.0, 3, 3)
    assert loss.bits_per_byte == pytest.approx(2 / np.log(2)) and loss.per_token == 2.0
