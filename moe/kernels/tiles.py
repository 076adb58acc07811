"""How a grouped product is cut into tiles: one choice for each shape, and candidates for a sweep to try."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

Kind = Literal["up", "product", "weight_grad"]


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how.

    `rows` x `columns` of the output, `depth` of the contraction at a time; for kind "up" the columns are computed
    twice, gate and up, so both accumulators count.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    """How many steps of the contraction are on their way at once; half of them for "weight_grad", which waits for the
    indices of its gather in between."""
    group: int = 8
    """Tiles of rows that share the same columns before the next columns come: what stays in the L2 cache."""


LARGE, SMALL = 64, 0
"""From so many rows an expert on, on average, a tile of rows is usually full."""

# wgmma takes 64 rows a group of 4 warps, hence no tile below 64 rows. All of these compile for sm_90 without spilling
# (benchmarks/kernels.py); which of them is fastest only a sweep on a GPU can tell.
HALF: dict[Kind, dict[int, Tile]] = {
    "up": {LARGE: Tile(128, 128, 64, 8, 3), SMALL: Tile(64, 64, 64, 4, 4)},
    "product": {LARGE: Tile(128, 256, 64, 8, 3), SMALL: Tile(64, 128, 64, 4, 4)},
    "weight_grad": {LARGE: Tile(128, 256, 64, 8, 5), SMALL: Tile(128, 128, 32, 8, 7)},
}
SINGLE: dict[Kind, dict[int, Tile]] = {
    "up": {SMALL: Tile(64, 64, 32, 4, 3)},
    "product": {SMALL: Tile(64, 128, 32, 4, 3)},
    "weight_grad": {SMALL: Tile(64, 128, 32, 4, 5)},
}
# Those of at most 113 KB of shared memory run two to an SM, one multiplying while the other stores.
CANDIDATES: dict[Kind, tuple[Tile, ...]] = {
    "up": (Tile(128, 64, 64, 8, 3), Tile(128, 64, 64, 8, 4), Tile(128, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3)),
    "product": (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 4, 3),
        Tile(256, 128, 64, 8, 3),
        Tile(64, 256, 64, 4, 3),
    ),
    "weight_grad": (
        Tile(128, 128, 64, 8, 5),
        Tile(128, 128, 64, 8, 7),
        Tile(128, 128, 64, 4, 5),
        Tile(128, 256, 64, 8, 3),
        Tile(256, 128, 64, 8, 5),
    ),
}


def choose(kind: Kind, dtype: torch.dtype, rows_per_expert: int, columns: int, depth: int) -> Tile:
    """The tile for a product with such an output width and contraction: a pure function, no measuring.

    For "weight_grad" the contraction runs over an expert's rows, so depth is rows_per_expert.
    """
    by_rows = (HALF if dtype.itemsize == 2 else SINGLE)[kind]
    tile = next(tile for least, tile in sorted(by_rows.items(), reverse=True) if rows_per_expert >= least)
    return fit(tile, columns, depth)


def candidates(kind: Kind, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Every tile worth timing on a GPU, the chosen ones first."""
    if dtype.itemsize != 2:
        return tuple(SINGLE[kind].values())
    return (*HALF[kind].values(), *CANDIDATES[kind])


def fit(tile: Tile, columns: int, depth: int) -> Tile:
    """The same tile, no wider and no deeper than a small problem, nor below the 16 that a tensor core multiplies."""
    return replace(tile, columns=min(tile.columns, _power(columns)), depth=min(tile.depth, _power(depth)))


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
