"""How a kernel cuts its work: one choice for each dtype and width of a head, and candidates for a sweep to try."""

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["forward", "key_gradients", "query_gradients"]


@dataclass(frozen=True)
class Tile:
    """What one program holds, and how it walks.

    "forward" and "query_gradients" hold `rows` and walk over `keys` at a time, "key_gradients" holds `keys` and walks
    over `rows`. Of rows there are H / G a token.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    """How many steps of the walk are on their way at once."""
    precision: Literal["tf32x3", "ieee"] = "tf32x3"
    """Of products in fp32: three TF32 products each, which keeps fp32's accuracy on tensor cores, or none there."""


# From so many channels on, keys and values together, each padded to a power of two. With Triton 3.6 all of them compile
# for sm_90 without spilling (benchmarks/attention_kernels.py); which is fastest only a sweep on a GPU can tell.
HALF: dict[Kind, dict[int, Tile]] = {
    "forward": {32: Tile(128, 128, 8, 3), 192: Tile(128, 64, 8, 3), 384: Tile(128, 64, 8, 2)},
    "key_gradients": {32: Tile(64, 128, 8, 2), 384: Tile(32, 64, 8, 2), 512: Tile(16, 64, 8, 2)},
    "query_gradients": {32: Tile(128, 64, 8, 3), 192: Tile(128, 64, 8, 2), 384: Tile(128, 32, 8, 2)},
}
SOFTCAPPED: dict[Kind, dict[int, Tile]] = {"key_gradients": {192: Tile(64, 64, 8, 2)}}
"""In place of those above where a softcap's slope has to be kept in registers too."""
# In three TF32 products operands are held twice, which leaves room for small blocks and, of wide heads, for none.
SINGLE: dict[Kind, dict[int, Tile]] = {
    "forward": {32: Tile(64, 64, 4, 2), 192: Tile(32, 32, 4, 1), 384: Tile(32, 32, 8, 1, "ieee")},
    "key_gradients": {32: Tile(16, 64, 8, 2), 192: Tile(32, 16, 8, 1), 384: Tile(16, 32, 8, 1, "ieee")},
    "query_gradients": {32: Tile(64, 32, 4, 2), 192: Tile(16, 32, 8, 1), 384: Tile(32, 32, 8, 1, "ieee")},
}
# Those of at most 113 KB of shared memory run two to an SM, where they have registers for it.
CANDIDATES: dict[Kind, tuple[Tile, ...]] = {
    "forward": (Tile(128, 64, 8, 4), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 32, 8, 4), Tile(64, 128, 4, 2)),
    "key_gradients": (Tile(32, 128, 8, 2), Tile(32, 128, 8, 3), Tile(64, 64, 8, 2)),
    "query_gradients": (Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(128, 32, 8, 3)),
}


def choose(kind: Kind, dtype: torch.dtype, channels: int, value_channels: int, *, has_softcap: bool = False) -> Tile:
    """The tile for heads of so many channels of keys and of values: a pure function, no measuring."""
    by_channels = (HALF if dtype.itemsize == 2 else SINGLE)[kind]
    if has_softcap and dtype.itemsize == 2:
        by_channels = by_channels | SOFTCAPPED.get(kind, {})
    total = padded(channels) + padded(value_channels)
    return next(tile for least, tile in sorted(by_channels.items(), reverse=True) if total >= least)


def candidates(kind: Kind, dtype: torch.dtype, channels: int, value_channels: int) -> tuple[Tile, ...]:
    """Every tile worth timing on a GPU, the chosen one first; others for heads of 128 channels in 16 bits only."""
    chosen = choose(kind, dtype, channels, value_channels)
    return (chosen, *CANDIDATES[kind]) if dtype.itemsize == 2 and channels == value_channels == 128 else (chosen,)


def padded(channels: int) -> int:
    """The next power of two, and at least the 16 that a tensor core multiplies."""
    return max(16, 1 << (channels - 1).bit_length())
