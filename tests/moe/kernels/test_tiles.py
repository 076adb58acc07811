"""Tiles: the choice is a pure function that fits the problem and the machine."""

import itertools

import pytest
import torch

from moe.kernels.tiles import HALF, SINGLE, Tile, candidates, choose, fit

KINDS = ("up", "product", "weight_grad")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_choice_is_among_the_candidates_and_no_larger_than_the_problem(kind, dtype):
    for rows, columns, depth in itertools.product((0, 1, 63, 64, 5000), (1, 16, 48, 4096), (1, 40, 4096)):
        tile = choose(kind, dtype, rows, columns, depth)
        assert tile in [fit(candidate, columns, depth) for candidate in candidates(kind, dtype)]
        assert 16 <= tile.columns < 2 * max(columns, 9) and 16 <= tile.depth < 2 * max(depth, 9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tile_fits_registers_and_shared_memory_of_a_hopper_sm(kind, dtype):
    for tile in candidates(kind, dtype):
        twice = 2 if kind == "up" else 1
        assert tile.rows * tile.columns * twice <= tile.warps * 32 * 128  # fp32 sums in half of a thread's registers
        step = (tile.rows + twice * tile.columns) * tile.depth * dtype.itemsize
        buffers = (tile.stages + 1) // 2 if kind == "weight_grad" else tile.stages
        assert buffers * step <= 227 * 1024


def test_few_rows_an_expert_take_small_tiles():
    assert (
        choose("product", torch.bfloat16, 20, 4096, 4096).rows < choose("product", torch.bfloat16, 900, 4096, 4096).rows
    )
    assert min(HALF["product"]) == min(SINGLE["product"]) == 0  # a tile for any number of rows


def test_a_small_problem_keeps_what_does_not_depend_on_it():
    assert fit(Tile(128, 256, 64, 8, 3), columns=24, depth=17) == Tile(128, 32, 32, 8, 3)
