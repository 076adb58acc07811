"""What the attention kernels become on Hopper, without one: registers, spills, shared memory, tensor cores.

    python -m benchmarks.attention_kernels          compile them for sm_90, print, fail where one is not as it should be
    python -m benchmarks.attention_kernels --keep   the same, and write benchmarks/results/attention-kernels-sm90.json
    python -m benchmarks.attention_kernels --sweep  on a GPU: time every candidate tile under each mask at 16K tokens

Each kernel is compiled with the tile it is given for heads of 64, 128, 192 (values 128, as in latent attention) and 256
channels, and with every other candidate for 128, under a plain causal mask and under all a mask may ask for at once.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from attention.kernels.blocks import Rows
from attention.kernels.launch import KERNELS, Answers, Call
from attention.kernels.tiles import Kind, Tile, candidates, choose, padded
from benchmarks import attention_rivals, kernels
from benchmarks.attention_rivals import PLAIN, Heads, Problem
from benchmarks.kernels import DTYPES, Case, compile_case, median_seconds
from benchmarks.moe import Row
from benchmarks.record import keep

HEADS = ((64, 64), (128, 128), (192, 128), (256, 256))
"""(C, E)"""
FLOATS = {"factor": "fp32", "softcap": "fp32", "scale": "fp32"}
INTERNAL = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "exponent_ptr": "*fp32", "table_ptr": "*i32"}
PRODUCTS: dict[Kind, int] = {"forward": 2, "key_gradients": 4, "query_gradients": 3}
MASKS = {
    "full": {"CAUSAL": False, "WINDOW": False, "HEAD": False, "SOFTCAP": False},
    "causal": {"CAUSAL": True, "WINDOW": False, "HEAD": False, "SOFTCAP": False},
    "everything": {"CAUSAL": True, "WINDOW": True, "HEAD": True, "SOFTCAP": True},
}


def case_of(kind: Kind, dtype: str, heads: tuple[int, int], tile: Tile, mask: str, *, partial: bool = False) -> Case:
    """One kernel, compiled for 8 query heads a key head."""
    (C, E), kernel = heads, KERNELS[kind]
    constants: dict[str, Any] = {
        "G": 8,
        "R": 8,
        "C": C,
        "E": E,
        "BLOCK_C": padded(C),
        "BLOCK_E": padded(E),
        **MASKS[mask],
    }
    constants |= {"ROWS": tile.rows, "KEYS": tile.keys, "PRECISION": tile.precision}
    answers = [name for name in ("out_ptr", "grad_q_ptr", "grad_k_ptr", "grad_v_ptr") if partial]
    return Case(
        f"{kind}, {mask}, {C}/{E}" + (", fp32 out" if partial else ""),
        kernel,
        dtype,
        constants,
        kernels.Tile(tile.rows, tile.keys, max(C, E), tile.warps, tile.stages),
        FLOATS | INTERNAL | dict.fromkeys(answers, "*fp32"),
        tuple(name for name in kernel.arg_names if name.endswith(("_token", "_head"))),
    )


def cases(dtype: str, *, only_chosen: bool = False) -> Iterator[Case]:
    for kind in KERNELS:
        for heads in HEADS:
            tile = choose(kind, DTYPES[dtype], *heads)
            for mask, terms in MASKS.items():
                own = choose(kind, DTYPES[dtype], *heads, has_softcap=terms["SOFTCAP"])
                yield case_of(kind, dtype, heads, own, mask)
            if dtype != "fp32":
                yield case_of(kind, dtype, heads, tile, "causal", partial=True)
        for tile in () if only_chosen else candidates(kind, DTYPES[dtype], 128, 128)[1:]:
            yield case_of(kind, dtype, (128, 128), tile, "causal")


def sweep(length: int, heads: Heads, dtype: torch.dtype, device: str, rounds: int) -> list[Row]:
    """Milliseconds and TFLOP/s of each kernel with each candidate tile, on one row of tokens."""
    rows: list[Row] = []
    for mask_name in ("causal", "documents", "window"):
        problem = Problem.make(mask_name, length, heads, dtype, device)
        q, k, v = problem.q_1TGC, problem.k_1SGC, problem.v_1SGC
        work = Rows(problem.mask, (1, length, length))
        out_NHE, lse_NH = Call.of(q, k, v, PLAIN).forward(work, length)
        answers = Answers.of(problem.grad_1THC, out_NHE[None], lse_NH.T[None], None, heads.keys)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        gradients = {**answers.arguments(), "scale": PLAIN.scale_for(heads.channels)}
        given: dict[Kind, dict[str, Any]] = {
            "forward": {"out_ptr": out_NHE, "lse_ptr": lse_NH},
            "key_gradients": {"grad_k_ptr": grads[1], "grad_v_ptr": grads[2], **gradients},
            "query_gradients": {"grad_q_ptr": grads[0], **gradients},
        }
        for kind, products in PRODUCTS.items():
            for tile in candidates(kind, dtype, heads.channels, heads.channels):
                call = Call.of(q, k, v, PLAIN, {kind: tile})
                seconds = median_seconds(partial(call.launch, kind, work, **given[kind]), device, rounds)
                rate = problem.flops * products / 2 / seconds / 1e12
                rows.append(
                    {"mask": mask_name, "kernel": kind, "tile": asdict(tile), "ms": seconds * 1e3, "tflops": rate}
                )
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--only", nargs="+", default=[], help="compile what has one of these words in its name alone")
    parser.add_argument("--chosen", action="store_true", help="leave out tiles that only a sweep would try")
    parser.add_argument("--keep", action="store_true", help="write the results to benchmarks/results")
    parser.add_argument("--sweep", action="store_true", help="time tiles on this machine's GPU instead")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each kernel")
    arguments = parser.parse_args()
    if arguments.sweep:
        if not torch.cuda.is_available():
            sys.exit("--sweep times kernels on an NVIDIA GPU; this machine has none. Leave it out to compile alone.")
        rows = sweep(16384, attention_rivals.HEADS["cuda"], torch.bfloat16, "cuda", arguments.rounds)
        print(keep("attention-kernels", rows) if arguments.keep else "")
        return
    rows, failures = [], 0
    for dtype in arguments.dtypes:
        for case in cases(dtype, only_chosen=arguments.chosen):
            if arguments.only and not any(word in case.name for word in arguments.only):
                continue
            compiled = compile_case(case)
            # Blocks in fp32 are too small for HGMMA: HMMA multiplies them or, of wide heads, no tensor core.
            wrong = (replace(compiled, hgmma=1) if dtype == "fp32" else compiled).wrong(case)
            failures += wrong is not None
            assert case.tile is not None
            tile = {name: getattr(case.tile, name) for name in ("rows", "warps", "stages")} | {
                "keys": case.tile.columns
            }
            rows.append({"kernel": case.name, "dtype": dtype, "tile": tile, **asdict(compiled), "wrong": wrong})
            cut = "{rows}x{keys}, {warps} warps, {stages} stages".format_map(tile)
            print(
                f"{case.name:45} {dtype} {cut:28} {compiled.registers:3} registers {compiled.spills} spills"
                f" {compiled.shared / 1024:5.0f} KB {compiled.hgmma:2} HGMMA {compiled.cp_async:3} cp.async"
                f" {'WRONG: ' + wrong if wrong else ''}",
                flush=True,
            )
    if arguments.keep:
        print(keep("attention-kernels-sm90", rows))
    if failures:
        sys.exit(f"{failures} kernels are not as they should be")


if __name__ == "__main__":
    main()
