# ruff: noqa: PLR0917 - a kernel takes its arguments by position
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Everything around the matmuls of the experts, one pass over memory each: fp32 inside, no atomics, no host waits.

Rows past the last expert's end are neither read into a result nor written, except for gradients of gates: zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048
"""Elements a program holds at once: 16 a thread with 4 warps."""


@triton.jit
def swiglu_kernel(z_ptr, h_ptr, ends_ptr, E, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """h = silu(gate) * up for a block of rows and columns, z = (gate, up)."""
    end = tl.load(ends_ptr + E - 1)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < end)[:, None] & (columns < F)[None, :]
    # int64: rows * width passes 2^31 at a million rows.
    rows = rows.to(tl.int64)[:, None]
    gate = tl.load(z_ptr + rows * (2 * F) + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(z_ptr + rows * (2 * F) + F + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    tl.store(h_ptr + rows * F + columns[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def swiglu_backward_kernel(
    z_ptr,
    dh_ptr,
    gates_ptr,
    dz_ptr,
    weighted_ptr,
    grad_gates_ptr,
    ends_ptr,
    R,
    E,
    F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """All that follows from z, dh and a row's gate: dz, gate * h, and the gate's own gradient."""
    end = tl.load(ends_ptr + E - 1)
    rows_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = rows_R < end
    weight = tl.load(gates_ptr + rows_R, mask=is_row, other=0.0).to(tl.float32)[:, None]
    rows = rows_R.to(tl.int64)[:, None]
    grad_gates = tl.zeros((BLOCK_R,), tl.float32)
    # One program sees whole rows: their sums need no atomics and come out the same every time.
    for first in range(0, F, BLOCK_F):
        columns = first + tl.arange(0, BLOCK_F)
        mask = is_row[:, None] & (columns < F)[None, :]
        gate = tl.load(z_ptr + rows * (2 * F) + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(z_ptr + rows * (2 * F) + F + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + rows * F + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        h = silu * up
        grad_gates += tl.sum(dh * h, axis=1)
        dh *= weight
        d_gate = dh * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        d_up = dh * silu
        dtype = dz_ptr.dtype.element_ty
        tl.store(dz_ptr + rows * (2 * F) + columns[None, :], d_gate.to(dtype), mask=mask)
        tl.store(dz_ptr + rows * (2 * F) + F + columns[None, :], d_up.to(dtype), mask=mask)
        tl.store(weighted_ptr + rows * F + columns[None, :], (weight * h).to(dtype), mask=mask)
    tl.store(grad_gates_ptr + rows_R, grad_gates, mask=rows_R < R)


@triton.jit
def gather_sum_kernel(
    rows_ptr,
    places_ptr,
    weights_ptr,
    out_ptr,
    ends_ptr,
    E,
    D: tl.constexpr,
    K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A token's sum over its K rows, for a block of columns."""
    end = tl.load(ends_ptr + E - 1)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.range(0, K, loop_unroll_factor=UNROLL):
        place = tl.load(places_ptr + token * K + k)
        width = tl.where(place < end, D, 0)  # a row of nobody has no columns
        row = tl.load(rows_ptr + place * D + columns, mask=columns < width, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            row *= tl.load(weights_ptr + token * K + k, mask=place < end, other=0.0).to(tl.float32)
        total += row
    tl.store(out_ptr + token * D + columns, total.to(out_ptr.dtype.element_ty), mask=columns < D)


def swiglu(z_RJ: Tensor, offsets_E: Tensor) -> Tensor:
    """silu(gate) * up of each row, z = (gate, up) side by side: (R, 2F) to (R, F)."""
    z_RJ = z_RJ.contiguous()
    num_rows, width = z_RJ.shape[0], z_RJ.shape[1] // 2
    h_RF = z_RJ.new_empty(num_rows, width)
    block_rows, block_columns = block_of(width)
    if num_rows:
        grid = (triton.cdiv(num_rows, block_rows), triton.cdiv(width, block_columns))
        swiglu_kernel[grid](z_RJ, h_RF, offsets_E, len(offsets_E), width, block_rows, block_columns)
    return h_RF


def swiglu_backward(z_RJ: Tensor, dh_RF: Tensor, gates_R: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, gate * h, grad_gates) from the gradient dh that h has where gates are 1.

    h = silu(g) * u; grad_gate = sum over F of dh * h, fp32; dz is gate * dh carried back through SwiGLU.
    """
    z_RJ, dh_RF, gates_R = z_RJ.contiguous(), dh_RF.contiguous(), gates_R.contiguous()
    num_rows, width = dh_RF.shape
    dz_RJ, weighted_RF = torch.empty_like(z_RJ), torch.empty_like(dh_RF)
    grad_gates_R = torch.empty(num_rows, dtype=torch.float32, device=z_RJ.device)
    block_rows, block_columns = block_of(width)
    if num_rows:
        swiglu_backward_kernel[(triton.cdiv(num_rows, block_rows),)](
            z_RJ,
            dh_RF,
            gates_R,
            dz_RJ,
            weighted_RF,
            grad_gates_R,
            offsets_E,
            num_rows,
            len(offsets_E),
            width,
            block_rows,
            block_columns,
        )
    return dz_RJ, weighted_RF, grad_gates_R


def gather_sum(rows_RD: Tensor, places_NK: Tensor, offsets_E: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """out[n] = sum over k of weights[n, k] * rows[places[n, k]], in fp32; places past the last expert count as zero.

    Returns (N, D) in the rows' dtype. The order of the sum is that of k: the same every time.
    """
    rows_RD, places_NK = rows_RD.contiguous(), places_NK.contiguous()
    num_tokens, slots = places_NK.shape
    width = rows_RD.shape[1]
    out_ND = rows_RD.new_empty(num_tokens, width)
    block = block_of(width)[1]
    if num_tokens:
        gather_sum_kernel[(num_tokens, triton.cdiv(width, block))](
            rows_RD,
            places_NK,
            places_NK if weights_NK is None else weights_NK.contiguous(),
            out_ND,
            offsets_E,
            len(offsets_E),
            width,
            slots,
            weights_NK is not None,
            block,
            min(slots, 8),
        )
    return out_ND


def block_of(width: int) -> tuple[int, int]:
    """Rows and columns of a block: whole rows where they are short, so that narrow experts fill a program too."""
    columns = min(ELEMENTS, triton.next_power_of_2(width))
    return ELEMENTS // columns, columns
