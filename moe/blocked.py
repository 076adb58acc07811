"""The experts' way on CPUs: blocks of one expert's rows, each taken through all steps while it is in cache."""

# ruff: noqa: PLR0917 (every way to multiply has the signature of ExpertMatmul)

import itertools
import math
from collections.abc import Iterator
from typing import Any

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


def cut(ends_E: list[int], block_rows: int) -> tuple[list[int], list[int]]:
    """Each block's expert and size: an expert's rows in blocks of nearly equal size, `block_rows` at most."""
    experts, sizes = [], []
    for expert, (start, stop) in enumerate(itertools.pairwise([0, *ends_E])):
        num_blocks = math.ceil((stop - start) / block_rows)
        experts += [expert] * num_blocks
        sizes += [(stop - start + i) // num_blocks for i in range(num_blocks)]
    return experts, sizes


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
        experts, sizes = cut(ctx.ends_E, BLOCK_ROWS)
        num_rows = ctx.ends_E[-1]
        x, ups_JD, downs_DF = x_ND.to(dtype), gate_up.to(dtype).unbind(), down.to(dtype).unbind()
        z_RJ = x_ND.new_empty(0 if recompute_up else num_rows, gate_up.shape[1])
        y_RD = x.new_empty(num_rows, x.shape[1])
        z_blocks = _room(z_RJ, sizes) if recompute_up else z_RJ.split(sizes)
        blocks = zip(experts, plan.tokens_R[:num_rows].split(sizes), z_blocks, y_RD.split(sizes), strict=True)
        for expert, tokens, z_rows, y_rows in blocks:
            z = _multiply_up(x.index_select(0, tokens), ups_JD[expert], z_rows)
            torch.mm(swiglu(z), downs_DF[expert].t(), out=y_rows)
        ctx.save_for_backward(x_ND, gates_NK, gate_up, down, *plan, *(() if recompute_up else (z_RJ,)))
        return gather_sum(y_RD, plan, gates_NK).to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gates_NK, gate_up, down, *saved = ctx.saved_tensors
        plan, num_rows = Plan(*saved[:4]), ctx.ends_E[-1]
        experts, sizes = cut(ctx.ends_E, BLOCK_ROWS)
        x, gate_up, down, grad = (t.to(ctx.dtype) for t in (x_ND, gate_up, down, grad_ND))
        gates_R = gates_NK.flatten()[plan.order_R[:num_rows]]
        grad_gates_R, dx_RD = torch.empty_like(gates_R), x.new_empty(num_rows, x.shape[1])
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        ups_JD, downs_DF, grad_ups, grad_downs = (t.unbind() for t in (gate_up, down, grad_gate_up, grad_down))
        z_blocks = _room(x_ND.new_empty(0, gate_up.shape[1]), sizes) if ctx.recompute_up else saved[4].split(sizes)
        by_row = (t.split(sizes) for t in (plan.tokens_R[:num_rows], gates_R, grad_gates_R, dx_RD))
        before = None
        for expert, z_rows, tokens, gates, grad_gates, dx_rows in zip(experts, z_blocks, *by_row, strict=True):
            x_rows, grad_rows = x.index_select(0, tokens), grad.index_select(0, tokens)
            z = _multiply_up(x_rows, ups_JD[expert], z_rows) if ctx.recompute_up else z_rows.to(ctx.dtype)
            dz, weighted_h, grad_gates[:] = swiglu_backward(z, grad_rows.mm(downs_DF[expert]), gates)
            torch.mm(dz, ups_JD[expert], out=dx_rows)
            is_next = int(expert == before)  # 0 for an expert's first block: what memory held before does not count
            grad_ups[expert].addmm_(dz.t(), x_rows, beta=is_next)
            grad_downs[expert].addmm_(grad_rows.t(), weighted_h, beta=is_next)
            before = expert
        for expert in set(range(len(down))).difference(experts):
            grad_ups[expert].zero_(), grad_downs[expert].zero_()
        dx_ND, grad_gate_up, grad_down = (t.to(x_ND.dtype) for t in (gather_sum(dx_RD, plan), grad_gate_up, grad_down))
        return dx_ND, gather_slots(grad_gates_R, plan), grad_gate_up, grad_down, None, None, None


def _room(like_RJ: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """For the pre-activations of one block after the other, where they are not kept."""
    return (like_RJ.new_empty(size, like_RJ.shape[1]) for size in sizes)


def _multiply_up(x_rows: Tensor, up_JD: Tensor, z_rows: Tensor) -> Tensor:
    """The block's pre-activations: written to `z_rows`, and returned as they read there, in the dtype of products."""
    if z_rows.dtype == x_rows.dtype:
        return torch.mm(x_rows, up_JD.t(), out=z_rows)
    return z_rows.copy_(x_rows.mm(up_JD.t())).to(x_rows.dtype)
