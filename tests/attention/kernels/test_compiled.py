"""What the compiler makes of the kernels for Hopper: tensor cores, no spills. Needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from attention.kernels.tiles import CANDIDATES
from benchmarks import attention_kernels

ROOT = Path(__file__).parents[3]


def test_kernels_compile_for_hopper_as_they_should():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.attention_kernels", "--dtypes", "bf16", "--chosen", "--only"]
    run = subprocess.run(
        [*command, "full, 128/128", "everything, 128/128", "causal, 128/128"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if " registers " in line]
    assert len(lines) == 12 and all(" 0 spills " in line and " 0 HGMMA" not in line for line in lines)


def test_every_kernel_is_compiled_with_every_tile_on_offer():
    names = [case.name for case in attention_kernels.cases("bf16")]
    assert len(names) == 3 * 4 * 4 + sum(map(len, CANDIDATES.values()))
    assert {name.partition(",")[0] for name in names} == {"forward", "key_gradients", "query_gradients"}
