"""How often training had each distance in reach: the pairs of a token and one it may look back at, by their distance.

A document of s tokens has max(s - i, 0) pairs at distance i; what a model has learnt of a distance follows their number
(An et al. 2024, arXiv 2410.18745). Windows take away what lies too far back, PoSE moves pairs farther apart.
"""

from collections.abc import Sequence

import numpy as np

from data.batch import Batch
from data.positions import Chunks, Consecutive, Pose, chunks_of

EDGES = (0, *(1 << power for power in range(32)))
"""Bucket b holds the distances EDGES[b] .. EDGES[b + 1] - 1: 0 alone, 1 alone, 2 to 3, 4 to 7, and so on."""


def count_distances(
    lengths: Sequence[int] | np.ndarray, window: int | None = None, chunks: Chunks | None = None
) -> np.ndarray:
    """Pairs in each bucket over documents of these lengths, exactly: int64 (32,), which may be added up.

    window: how many tokens back attention sees, itself included. chunks: how positions skip; left out, they do not.
    """
    lengths_D = np.asarray(lengths, dtype=np.int64)
    if chunks is None:
        return _in_buckets(lengths_D, np.zeros_like(lengths_D), np.ones_like(lengths_D), window)
    begins = [*np.minimum(chunks.begins_DX.T, lengths_D), lengths_D]
    stretches = []
    for first in range(len(begins) - 1):
        for last in range(first, len(begins) - 1):
            skip_D = chunks.skips_DX[:, last] - chunks.skips_DX[:, first]
            # Pairs from one chunk to another: those of the stretch around both, without those that miss one of them.
            around, behind, before = ((first, last + 1), (first + 1, last + 1), (first, last))
            for (start, stop), sign in ((around, 1), (behind, -1), (before, -1), ((first + 1, last), 1)):
                stretches.append((np.maximum(begins[stop] - begins[start], 0), skip_D, np.full_like(skip_D, sign)))
    lengths_N, skips_N, signs_N = (np.concatenate(column) for column in zip(*stretches, strict=True))
    return _in_buckets(lengths_N, skips_N, signs_N, window)


def distances_of(batches: Sequence[Batch], positions: Consecutive | Pose, window: int | None = None) -> np.ndarray:
    """`count_distances` of micro-batches, whole or one rank's parts of them, without their padding.

    `positions` is what the rows were asked for with. Ranks that hold parts of the same rows count the same.
    """
    counts = np.zeros(len(EDGES) - 1, dtype=np.int64)
    for batch in batches:
        chunks = None
        if isinstance(positions, Pose):
            lengths_D, row_D, _ = _stretches(batch)
            counts_B = np.bincount(row_D, minlength=len(batch.padding_B))
            chunks = chunks_of(positions, lengths_D, counts_B, batch.keys_B.cpu().numpy())
        counts += count_distances(real_lengths(batch), window, chunks)
    return counts


def real_lengths(batch: Batch) -> np.ndarray:
    """Tokens of every stretch inside which attention looks back, int64 (D,): of whole rows, their padding left out.

    Of a rank's part of rows, those of the whole rows.
    """
    lengths_D, row_D, end_D = _stretches(batch)
    real_B = batch.sequence_length - batch.padding_B.cpu().numpy()
    return np.clip(real_B[row_D] - (end_D + 1 - lengths_D), 0, lengths_D)


def _stretches(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each: its length, padding included, the row that it is in, and the place of its last token there."""
    lengths_D = np.array(batch.mask_lengths, dtype=np.int64)
    row_D, end_D = np.divmod(np.cumsum(lengths_D) - 1, sum(batch.lengths) // len(batch.padding_B))
    return lengths_D, row_D, end_D


def _in_buckets(lengths_N: np.ndarray, skips_N: np.ndarray, signs_N: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs inside stretches of these lengths, with each distance larger by the skip, added or taken away."""
    farthest = int((lengths_N + skips_N).max(initial=0))
    edges_E = np.array(EDGES[: 1 + sum(edge < farthest for edge in EDGES)], dtype=np.int64)  # nothing lies beyond
    limits_N = lengths_N if window is None else np.minimum(lengths_N, window)
    near_EN = np.clip(edges_E[:, None] - skips_N, 0, limits_N)
    below_E = (near_EN * lengths_N - near_EN * (near_EN - 1) // 2) @ signs_N
    counts = np.zeros(len(EDGES) - 1, dtype=np.int64)
    counts[: len(edges_E) - 1] = np.diff(below_E)
    return counts
