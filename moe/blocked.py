"""The experts' way on CPUs: blocks of one expert's rows, each taken through all steps while it is in cache."""

# ruff: noqa: PLR0917 (every way to multiply has the signature of ExpertMatmul)

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.dispatch import Plan, gather_slots, gather_sum
from moe.swiglu import swiglu, swiglu_backward

BLOCK_ROWS = 1024
"""Rows of a block at most: with fewer, products read and rearrange an expert's weights too often; more gain nothing."""


def blocked(x_ND: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor, plan: Plan, recompute_up: bool) -> Tensor:
    """Blocks of one expert's rows, each taken through all steps while it is in cache: keeps little, fast on CPUs."""
    return _Blocked.apply(x_ND, gates_NK, gate_up, down, plan, product_dtype(x_ND), recompute_up)


def native_dtypes() -> frozenset[torch.dtype]:
    """What this processor has units to multiply in; without them torch multiplies one number after the other."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    low = ((torch.bfloat16, has_bf16), (torch.float16, torch.cpu._is_amx_fp16_supported()))
    return frozenset({torch.float32, torch.float64, *(dtype for dtype, is_native in low if is_native)})


NATIVE_DTYPES = native_dtypes()


def product_dtype(x: Tensor) -> torch.dtype:
    """What rows of x are multiplied in: their own dtype, or fp32 where the processor has no units for it."""
    return x.dtype if x.device.type != "cpu" or x.dtype in NATIVE_DTYPES else torch.float32


class Block(NamedTuple):
    """Rows that are taken through all steps at once: a part of one expert's, or all of several small ones'."""

    experts: list[int]
    """Whose rows these are, in order."""
    sizes: list[int]
    """How many there are of each."""
    betas: list[int]
    """1 for rows of an expert whose first ones are in an earlier block: their weight gradients add to those."""


def cut(ends_E: list[int], block_rows: int) -> list[Block]:
    """All rows in blocks of `block_rows` at most; an expert with more of them is cut in nearly equal parts."""
    blocks: list[Block] = []
    for expert, (start, stop) in enumerate(itertools.pairwise([0, *ends_E])):
        num_parts = math.ceil((stop - start) / block_rows)
        for part in range(num_parts):
            size = (stop - start + part) // num_parts
            if not blocks or sum(blocks[-1].sizes) + size > block_rows:
                blocks.append(Block([], [], []))
            for values, value in zip(blocks[-1], (expert, size, int(part > 0)), strict=True):
                values.append(value)
    return blocks


class _Blocked(torch.autograd.Function):
    """Keeps only the tokens and the pre-activations z, and with recompute_up only the tokens.

    All products, and what lies between them, are in `dtype`; z is rounded to the tokens' own, as it is kept in it.
    What a block needs is allocated for each block: an allocator gives again what it just got back, still in cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gates_NK: Tensor,
        gate_up: Tensor,
        down: Tensor,
        plan: Plan,
        dtype: torch.dtype,
        recompute_up: bool,
    ) -> Tensor:
        ctx.dtype, ctx.ends_E, ctx.recompute_up = dtype, plan.offsets_E.tolist(), recompute_up
        blocks, num_rows = cut(ctx.ends_E, BLOCK_ROWS), ctx.ends_E[-1]
        sizes = [sum(block.sizes) for block in blocks]
        x, ups_DJ, downs_FD = x_ND.to(dtype), _turned(gate_up.to(dtype)), _turned(down.to(dtype))
        z_RJ = x_ND.new_empty(0 if recompute_up else num_rows, gate_up.shape[1])
        y_RD = x.new_empty(num_rows, x.shape[1])
        z_blocks = _room(z_RJ, sizes) if recompute_up else z_RJ.split(sizes)
        by_row = zip(plan.tokens_R[:num_rows].split(sizes), z_blocks, y_RD.split(sizes), strict=True)
        for block, (tokens, z_rows, y_rows) in zip(blocks, by_row, strict=True):
            z = _multiply_up(x.index_select(0, tokens), ups_DJ, block, z_rows)
            _multiply(swiglu(z), downs_FD, block, y_rows)
        ctx.save_for_backward(x_ND, gates_NK, gate_up, down, *plan, *(() if recompute_up else (z_RJ,)))
        return gather_sum(y_RD, plan, gates_NK).to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gates_NK, gate_up, down, *saved = ctx.saved_tensors
        plan, blocks, num_rows = Plan(*saved[:4]), cut(ctx.ends_E, BLOCK_ROWS), ctx.ends_E[-1]
        sizes = [sum(block.sizes) for block in blocks]
        x, gate_up, down, grad = (t.to(ctx.dtype) for t in (x_ND, gate_up, down, grad_ND))
        ups_DJ, ups_JD, downs_DF = _turned(gate_up), gate_up.unbind(), down.unbind()
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        grad_ups, grad_downs = grad_gate_up.unbind(), grad_down.unbind()
        gates_R = gates_NK.flatten()[plan.order_R[:num_rows]]
        grad_gates_R, dx_RD = torch.empty_like(gates_R), x.new_empty(num_rows, x.shape[1])
        z_blocks = _room(x_ND.new_empty(0, gate_up.shape[1]), sizes) if ctx.recompute_up else saved[4].split(sizes)
        by_row = (t.split(sizes) for t in (plan.tokens_R[:num_rows], gates_R, grad_gates_R, dx_RD))
        for block, z_rows, tokens, gates, grad_gates, dx_rows in zip(blocks, z_blocks, *by_row, strict=True):
            x_rows, grad_rows = x.index_select(0, tokens), grad.index_select(0, tokens)
            z = _multiply_up(x_rows, ups_DJ, block, z_rows) if ctx.recompute_up else z_rows.to(ctx.dtype)
            dh = _multiply(grad_rows, downs_DF, block, x.new_empty(len(x_rows), down.shape[2]))
            dz, weighted_h, grad_gates[:] = swiglu_backward(z, dh, gates)
            _multiply(dz, ups_JD, block, dx_rows)
            _add_products(dz, x_rows, block, grad_ups)
            _add_products(grad_rows, weighted_h, block, grad_downs)
        for expert, (start, stop) in enumerate(itertools.pairwise([0, *ctx.ends_E])):
            if start == stop:
                grad_ups[expert].zero_(), grad_downs[expert].zero_()
        dx_ND, grad_gate_up, grad_down = (t.to(x_ND.dtype) for t in (gather_sum(dx_RD, plan), grad_gate_up, grad_down))
        return dx_ND, gather_slots(grad_gates_R, plan), grad_gate_up, grad_down, None, None, None


def _turned(weights_EAB: Tensor) -> tuple[Tensor, ...]:
    """Each expert's matrix, turned: (B, A)."""
    return weights_EAB.transpose(1, 2).unbind()


def _room(like_RJ: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """For the pre-activations of one block after the other, where they are not kept."""
    return (like_RJ.new_empty(size, like_RJ.shape[1]) for size in sizes)


def _multiply(rows_RA: Tensor, weights_AB: Sequence[Tensor], block: Block, out_RB: Tensor) -> Tensor:
    """Write each row times its expert's weights to `out`."""
    for expert, rows, out in zip(block.experts, rows_RA.split(block.sizes), out_RB.split(block.sizes), strict=True):
        torch.mm(rows, weights_AB[expert], out=out)
    return out_RB


def _multiply_up(x_rows: Tensor, ups_DJ: Sequence[Tensor], block: Block, z_rows: Tensor) -> Tensor:
    """The block's pre-activations: written to `z_rows`, and returned as they read there, in the dtype of products."""
    if z_rows.dtype == x_rows.dtype:
        return _multiply(x_rows, ups_DJ, block, z_rows)
    z = _multiply(x_rows, ups_DJ, block, x_rows.new_empty(z_rows.shape))
    return z.copy_(z_rows.copy_(z))


def _add_products(left_RA: Tensor, right_RB: Tensor, block: Block, totals_AB: Sequence[Tensor]) -> None:
    """Add left^T times right over each expert's rows to its total, or with beta 0 put it in its place."""
    parts = zip(*block, left_RA.split(block.sizes), right_RB.split(block.sizes), strict=True)
    for expert, _, beta, left, right in parts:
        totals_AB[expert].addmm_(left.t(), right, beta=beta)
