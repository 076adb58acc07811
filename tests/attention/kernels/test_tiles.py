"""Tiles: the choice is a pure function of dtype and width, for every width there may be."""

from typing import get_args

import pytest
import torch

from attention.kernels.tiles import CANDIDATES, HALF, SINGLE, Kind, candidates, choose, padded

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_is_a_tile_for_every_width(kind, dtype):
    table = (HALF if dtype.itemsize == 2 else SINGLE)[kind]
    for channels in range(1, 257):
        for values in (1, channels, 256):
            tile = choose(kind, dtype, channels, values)
            assert tile in table.values()
            assert candidates(kind, dtype, channels, values)[0] == tile
    assert choose(kind, dtype, 1, 1) == table[32] and choose(kind, dtype, 256, 256) == table[max(table)]


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulators_leave_registers_for_scores(kind, dtype):
    """fp32 sums and one block of scores in the 255 registers of each thread."""
    for channels in (16, 64, 128, 256):
        for tile in candidates(kind, dtype, channels, channels):
            width = {"forward": channels, "query_gradients": channels, "key_gradients": 2 * channels}[kind]
            height = tile.keys if kind == "key_gradients" else tile.rows
            assert height * width + tile.rows * tile.keys <= tile.warps * 32 * 192


def test_wider_heads_never_take_larger_tiles():
    for table in (HALF, SINGLE):
        for by_channels in table.values():
            areas = [tile.rows * tile.keys for _, tile in sorted(by_channels.items())]
            assert areas == sorted(areas, reverse=True) or table is SINGLE


def test_what_a_sweep_tries():
    assert candidates("forward", torch.bfloat16, 128, 128)[1:] == CANDIDATES["forward"]
    assert (
        len(candidates("forward", torch.bfloat16, 64, 64)) == len(candidates("forward", torch.float32, 128, 128)) == 1
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_softcap_takes_its_registers_from_the_tile(dtype):
    for channels in (64, 128, 256):
        with_it, without = (
            choose("key_gradients", dtype, channels, channels, has_softcap=has_softcap) for has_softcap in (True, False)
        )
        is_smaller = with_it.rows * with_it.keys < without.rows * without.keys
        assert is_smaller == (channels == 128 and dtype.itemsize == 2)
        assert choose("forward", dtype, channels, channels, has_softcap=True) == choose(
            "forward", dtype, channels, channels
        )


def test_padding():
    assert [padded(n) for n in (1, 16, 17, 64, 80, 128, 192, 256)] == [16, 16, 32, 64, 128, 128, 256, 256]
