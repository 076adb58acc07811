"""What the expert kernels become on Hopper, without one: registers, spills, shared memory, tensor cores, bytes moved.

    python -m benchmarks.kernels            compile all of them for sm_90, print, fail where one is not as it should be
    python -m benchmarks.kernels --keep     the same, and write benchmarks/results/kernels-sm90.json
    python -m benchmarks.kernels --sweep    on a GPU: time every candidate tile, and each kernel around the matmuls

Every kernel is compiled with every tile that `moe.kernels.tiles` offers, in bf16, and with the chosen tiles in fp16 and
fp32, at OLMoE's shape (width 2048, 64 experts of width 1024, 8 a token). A kernel fails that spills more than a few,
that needs more than the 227 KB of shared memory of a Hopper SM, or that multiplies without tensor cores (HGMMA).
"""

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.record import keep
from moe.dispatch import sort_rows
from moe.kernels import glue, grouped
from moe.kernels.tiles import Kind, Tile, candidates, choose, fit

BANDWIDTH = 4.3e12
"""Bytes a second of a large copy on one H200."""
SPILL_LIMIT = 16
"""Loads and stores of local memory that a kernel may have. Compilers of one kernel differ by a handful: of heads of 256
channels Triton 3.6 spills nothing and 3.9 up to 12, where the next smaller tile would lose Hopper's wide products."""
SHARED_LIMIT = 227 * 1024
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """One MoE layer and the tokens that go through it."""

    width: int
    expert_width: int
    experts: int
    per_token: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.tokens * self.per_token


OLMOE = Shape(width=2048, expert_width=1024, experts=64, per_token=8, tokens=32768)
"""Muennighoff et al. 2024, table 1; 32k tokens."""


@dataclass(frozen=True)
class Case:
    """One kernel with all that is fixed when it is compiled."""

    name: str
    kernel: Any
    dtype: str
    constants: dict[str, Any]
    """Values of the arguments that are constants."""
    tile: Tile | None = None
    """Of a matmul; the kernels around them have none."""
    types: dict[str, str] = field(default_factory=dict)
    """Types of arguments that are not what their name says."""
    multiples: tuple[str, ...] = ()
    """Numbers that are multiples of 16, such as strides: addresses are then aligned as they are at run time."""

    @property
    def signature(self) -> dict[str, str]:
        """Each argument's type, for the compiler: index tensors by their names, the rest in the case's dtype."""
        usual = {"ends_ptr": "*i32", "map_ptr": "*i32", "tokens_ptr": "*i64", "places_ptr": "*i64"}
        usual |= {"gates_ptr": "*fp32", "weights_ptr": "*fp32", "grad_gates_ptr": "*fp32"} | self.types

        def type_of(name: str) -> str:
            if name in self.constants:
                return "constexpr"
            return usual.get(name, f"*{self.dtype}" if name.endswith("_ptr") else "i32")

        return {name: type_of(name) for name in self.kernel.arg_names}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case."""

    registers: int
    spills: int
    """Instructions that store to or load from a thread's local memory."""
    shared: int
    """Bytes of shared memory of a program."""
    hgmma: int
    """Tensor-core instructions of Hopper."""
    cp_async: int
    """Asynchronous copies from global to shared memory."""

    def wrong(self, case: Case) -> str | None:
        """What should not be, or None."""
        if self.spills > SPILL_LIMIT:
            return f"{self.spills} spills"
        if self.shared > SHARED_LIMIT:
            return f"{self.shared} bytes of shared memory, {SHARED_LIMIT} are there"
        if case.tile and not self.hgmma:
            return "no tensor-core instruction"
        return None


def compile_case(case: Case) -> Compiled:
    """Compile for sm_90 and read the machine code; needs no GPU and no driver."""
    names = case.kernel.arg_names
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    even = [i for i, name in enumerate(names) if name.endswith("_ptr") or name in case.multiples]
    aligned = {(i,): [["tt.divisibility", 16]] for i in even}
    tile = case.tile or Tile(0, 0, 0, warps=4, stages=3)
    built = triton.compile(
        ASTSource(case.kernel, case.signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        usage, code = (
            subprocess.run([tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    count = {what: len(re.findall(rf"\b{what}\b", code)) for what in ("STL", "LDL", "HGMMA", "LDGSTS")}
    spills = count["STL"] + count["LDL"] or stack
    return Compiled(registers, spills, built.metadata.shared, count["HGMMA"], count["LDGSTS"])


def matmul_cases(dtype: str, shape: Shape, only_chosen: bool) -> Iterator[Case]:
    """Each use of each matmul kernel with each tile on offer."""
    for use, (kind, kernel, constants, columns, depth) in uses(shape).items():
        chosen = choose(kind, DTYPES[dtype], shape.rows // shape.experts, columns, depth)
        for tile in (chosen,) if only_chosen else candidates(kind, DTYPES[dtype]):
            cut = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "GROUP_M": tile.group}
            yield Case(use, kernel, dtype, constants | cut, tile)
            if kind == "weight_grad" and dtype != "fp32" and tile == chosen:
                yield Case(f"{use}, fp32 out", kernel, dtype, constants | cut, tile, {"out_ptr": "*fp32"})


def uses(shape: Shape) -> dict[str, tuple[Kind, Any, dict[str, Any], int, int]]:
    """Where a matmul kernel is used: its kind, kernel, constants, output width and contraction."""
    D, F, rows = shape.width, shape.expert_width, shape.rows // shape.experts
    up, product, grad = grouped.up_kernel, grouped.product_kernel, grouped.weight_grad_kernel
    return {
        "up": ("up", up, {"F": F, "D": D, "WITH_HIDDEN": False}, F, D),
        "up and hidden": ("up", up, {"F": F, "D": D, "WITH_HIDDEN": True}, F, D),
        "down": ("product", product, {"N": D, "K": F, "GATHER": False, "TRANSPOSED": True}, D, F),
        "grad_hidden": ("product", product, {"N": F, "K": D, "GATHER": True, "TRANSPOSED": False}, F, D),
        "grad_input": ("product", product, {"N": D, "K": 2 * F, "GATHER": False, "TRANSPOSED": False}, D, 2 * F),
        "grad_down": ("weight_grad", grad, {"M": D, "N": F, "GATHER_A": True}, F, rows),
        "grad_gate_up": ("weight_grad", grad, {"M": 2 * F, "N": D, "GATHER_A": False}, D, rows),
    }


def glue_cases(dtype: str, shape: Shape) -> Iterator[Case]:
    """The kernels around the matmuls, and the one that maps tiles to experts."""
    D, F, K = shape.width, shape.expert_width, shape.per_token
    rows, columns = glue.block_of(F)
    block = {"F": F, "BLOCK_R": rows, "BLOCK_F": columns}
    yield Case("swiglu", glue.swiglu_kernel, dtype, block)
    yield Case("swiglu_backward", glue.swiglu_backward_kernel, dtype, block)
    for weighted in (True, False):
        sums = {"D": D, "K": K, "HAS_WEIGHTS": weighted, "BLOCK_D": glue.block_of(D)[1], "UNROLL": min(K, 8)}
        yield Case("combine" if weighted else "gather_sum", glue.gather_sum_kernel, dtype, sums)
    tiles = {
        "BLOCK_M": 128,
        "BLOCK_E": max(16, triton.next_power_of_2(shape.experts)),
        "BLOCK_T": grouped.TILES_AT_ONCE,
    }
    yield Case("tile_map", grouped.tile_map_kernel, dtype, tiles, types={"map_ptr": "*i32"})


def bytes_moved(shape: Shape, size: int = 2) -> dict[str, int]:
    """What each kernel around the matmuls has to read and write at least, in elements of `size` bytes."""
    D, F, slot = shape.width, shape.expert_width, 8 + 4
    return {
        "swiglu": shape.rows * 3 * F * size,
        "swiglu_backward": shape.rows * (6 * F * size + 4 + 4),
        "combine": shape.rows * (D * size + slot) + shape.tokens * D * size,
        "gather_sum": shape.rows * (D * size + slot - 4) + shape.tokens * D * size,
    }


def compile_all(dtypes: list[str], only: list[str] | None, shape: Shape) -> tuple[list[dict[str, Any]], int]:
    """Compile and print everything; the rows, and how many of them are not as they should be."""
    rows, failures = [], 0
    for dtype in dtypes:
        for case in itertools.chain(glue_cases(dtype, shape), matmul_cases(dtype, shape, dtype != "bf16")):
            if only is not None and case.name not in only:
                continue
            compiled = compile_case(case)
            wrong = compiled.wrong(case)
            failures += wrong is not None
            tile = asdict(case.tile) if case.tile else None
            rows.append({"kernel": case.name, "dtype": dtype, "tile": tile, **asdict(compiled), "wrong": wrong})
            cut = "{rows}x{columns}x{depth}, {warps} warps, {stages} stages".format_map(tile) if tile else ""
            print(
                f"{case.name:22} {dtype} {cut:34} {compiled.registers:3} registers {compiled.spills} spills"
                f" {compiled.shared / 1024:5.0f} KB {compiled.hgmma:2} HGMMA {compiled.cp_async:3} cp.async"
                f" {'WRONG: ' + wrong if wrong else ''}",
                flush=True,
            )
    return rows, failures


def roofline(shape: Shape) -> list[dict[str, Any]]:
    """The least a kernel around the matmuls can take, in bf16: its bytes at the speed of a copy."""
    rows = []
    for name, moved in bytes_moved(shape).items():
        rows.append({"kernel": name, "gigabytes": round(moved / 1e9, 2), "ms": round(moved / BANDWIDTH * 1e3, 3)})
        print(f"{name:22} {rows[-1]['gigabytes']:5.2f} GB {rows[-1]['ms']:6.3f} ms at {BANDWIDTH / 1e12} TB/s")
    return rows


def sweep(shape: Shape, dtype: torch.dtype, device: str, rounds: int) -> list[dict[str, Any]]:
    """Time every candidate tile of every matmul, and the kernels around them, with random routing."""
    problem = Problem(shape, dtype, device)
    rows = []
    for use, (kind, _, _, columns, depth) in uses(shape).items():
        flops = 2 * shape.rows * shape.width * shape.expert_width * (2 if "up" in use or use == "grad_input" else 1)
        for tile in dict.fromkeys(fit(tile, columns, depth) for tile in candidates(kind, dtype)):
            seconds = median_seconds(lambda use=use, tile=tile: problem.multiply(use, tile), device, rounds)  # type: ignore[misc]
            rows.append({"kernel": use, "tile": asdict(tile), "ms": seconds * 1e3, "tflops": flops / seconds / 1e12})
            print(rows[-1], flush=True)
    for name, moved in bytes_moved(shape, dtype.itemsize).items():
        seconds = median_seconds(problem.glue()[name], device, rounds)
        rows.append({"kernel": name, "ms": seconds * 1e3, "terabytes_per_second": moved / seconds / 1e12})
        print(rows[-1], flush=True)
    return rows


class Problem:
    """Random tokens, weights and routing of a shape, and each kernel's call on them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        D, J, F = shape.width, 2 * shape.expert_width, shape.expert_width

        def randn(*sizes: int) -> Tensor:
            return torch.randn(sizes, dtype=dtype, device=device)

        scores_NE = torch.rand(shape.tokens, shape.experts, device=device)
        self.plan = sort_rows(scores_NE.topk(shape.per_token).indices, shape.experts)
        self.gates_NK = torch.rand(shape.tokens, shape.per_token, device=device)
        self.x_ND, self.y_RD, self.z_RJ, self.h_RF = (
            randn(shape.tokens, D),
            randn(shape.rows, D),
            randn(shape.rows, J),
            randn(shape.rows, F),
        )
        self.gate_up, self.down = randn(shape.experts, J, D) / D**0.5, randn(shape.experts, D, F) / F**0.5

    def multiply(self, use: str, tile: Tile) -> object:
        """One use of a matmul kernel."""
        offsets_E, tokens_R = self.plan.offsets_E, self.plan.tokens_R
        calls: dict[str, Callable[[], object]] = {
            "up": lambda: grouped.up(self.x_ND, self.gate_up, offsets_E, tokens_R, tile=tile),
            "up and hidden": lambda: grouped.up(
                self.x_ND, self.gate_up, offsets_E, tokens_R, with_hidden=True, tile=tile
            ),
            "down": lambda: grouped.product(self.h_RF, self.down, offsets_E, transposed=True, tile=tile),
            "grad_hidden": lambda: grouped.product(self.x_ND, self.down, offsets_E, tokens_R, tile=tile),
            "grad_input": lambda: grouped.product(self.z_RJ, self.gate_up, offsets_E, tile=tile),
            "grad_down": lambda: grouped.weight_grad(
                self.x_ND, self.h_RF, offsets_E, tokens_R, gathers_first=True, tile=tile
            ),
            "grad_gate_up": lambda: grouped.weight_grad(
                self.z_RJ, self.x_ND, offsets_E, tokens_R, gathers_first=False, tile=tile
            ),
        }
        return calls[use]()

    def glue(self) -> dict[str, Callable[[], object]]:
        """The kernels around the matmuls."""
        offsets_E, places_NK = self.plan.offsets_E, self.plan.places_NK
        gates_R = self.gates_NK.flatten()[self.plan.order_R]
        return {
            "swiglu": lambda: glue.swiglu(self.z_RJ, offsets_E),
            "swiglu_backward": lambda: glue.swiglu_backward(self.z_RJ, self.h_RF, gates_R, offsets_E),
            "combine": lambda: glue.gather_sum(self.y_RD, places_NK, offsets_E, self.gates_NK),
            "gather_sum": lambda: glue.gather_sum(self.y_RD, places_NK, offsets_E),
        }


def median_seconds(call: Callable[[], object], device: str, rounds: int) -> float:
    """The median time of a call, after one that compiles and one that warms up."""
    times = []
    for turn in range(rounds + 2):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        if turn >= 2:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--only", nargs="+", help="compile kernels of these names alone: up, down, swiglu, ...")
    parser.add_argument("--keep", action="store_true", help="write the results to benchmarks/results")
    parser.add_argument("--sweep", action="store_true", help="time every tile on this machine's GPU instead")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each kernel")
    arguments = parser.parse_args()
    if arguments.sweep:
        if not torch.cuda.is_available():
            sys.exit("--sweep times kernels on an NVIDIA GPU; this machine has none. Leave it out to compile alone.")
        rows, failures, name = sweep(OLMOE, torch.bfloat16, "cuda", arguments.rounds), 0, "kernels"
    else:
        rows, failures = compile_all(arguments.dtypes, arguments.only, OLMOE)
        rows, name = rows + roofline(OLMOE), "kernels-sm90"
    if arguments.keep:
        print(keep(name, rows))
    if failures:
        sys.exit(f"{failures} kernels are not as they should be")


if __name__ == "__main__":
    main()
