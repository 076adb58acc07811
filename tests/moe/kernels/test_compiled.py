"""What the compiler makes of the kernels for Hopper: tensor cores, and hardly a spill. Needs no GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import kernels
from moe.kernels.tiles import Tile

ROOT = Path(__file__).parents[3]


def test_kernels_compile_for_hopper_as_they_should():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.kernels", "--dtypes", "fp16", "--only"]
    run = subprocess.run(
        [*command, "swiglu_backward", "combine", "up and hidden", "grad_hidden", "grad_gate_up"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if " registers " in line]
    assert len(lines) == 5 and all(" 0 spills " in line for line in lines)
    assert all(" 0 HGMMA" not in line for line in lines if "warps" in line)


def test_a_tile_too_large_is_found_out():
    case = next(kernels.matmul_cases("bf16", kernels.OLMOE, only_chosen=True))
    tile = Tile(128, 256, 64, warps=4, stages=3)
    crowded = replace(case, tile=tile, constants=case.constants | {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns})
    compiled = kernels.compile_case(crowded)
    assert "spills" in (compiled.wrong(crowded) or "")


def test_what_is_wrong_with_a_kernel():
    matmul = next(kernels.matmul_cases("bf16", kernels.OLMOE, only_chosen=True))
    glue = next(kernels.glue_cases("bf16", kernels.OLMOE))
    good = kernels.Compiled(registers=128, spills=0, shared=232448, hgmma=4, cp_async=8)
    assert good.wrong(matmul) is None
    assert replace(good, spills=kernels.SPILL_LIMIT).wrong(matmul) is None
    assert "spills" in (replace(good, spills=kernels.SPILL_LIMIT + 1).wrong(matmul) or "")
    assert "shared memory" in (replace(good, shared=232449).wrong(matmul) or "")
    assert "tensor-core" in (replace(good, hgmma=0).wrong(matmul) or "")
    assert replace(good, hgmma=0).wrong(glue) is None


def test_bytes_at_the_shape_of_olmoe():
    rows, D, F = 32768 * 8, 2048, 1024
    moved = kernels.bytes_moved(kernels.OLMOE)
    assert moved["swiglu"] == 2 * rows * 3 * F
    assert moved["combine"] == 2 * (rows + 32768) * D + rows * (8 + 4)
