# ruff: noqa: PLR0917 - a kernel takes its arguments by position
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Grouped matmuls over rows sorted by expert, gathering rows on the way in: fp32 sums, no atomics, no host waits.

Rows are loaded by pointer (cp.async), because Hopper's TMA gathers none. fp32 operands are multiplied as three TF32
products each, which keeps fp32's accuracy on tensor cores. All tensors are contiguous and of one dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.tiles import Tile, choose

TILES_AT_ONCE = 128
"""Entries of the tile map that a program writes at once."""


@triton.jit(do_not_specialize=["num_tiles"])
def tile_map_kernel(
    ends_ptr, map_ptr, num_tiles, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr
):
    """One expert's tiles of rows: (expert, first row, row to stop before); the last program marks those not needed."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    stops = tl.load(ends_ptr + experts, mask=experts < E, other=0)
    starts = tl.load(ends_ptr + experts - 1, mask=(experts > 0) & (experts < E), other=0)
    tiles = (stops - starts + BLOCK_M - 1) // BLOCK_M
    before = tl.sum(tl.where(experts < expert, tiles, 0))
    mine = tl.sum(tl.where(experts == expert, tiles, 0))
    start = tl.sum(tl.where(experts == expert, starts, 0))
    stop = tl.sum(tl.where(experts == expert, stops, 0))
    for first in range(0, mine, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        row = start + tile * BLOCK_M
        place = map_ptr + before + tile
        tl.store(place, tl.zeros_like(tile) + expert, mask=tile < mine)
        tl.store(place + num_tiles, row, mask=tile < mine)
        tl.store(place + 2 * num_tiles, tl.minimum(row + BLOCK_M, stop), mask=tile < mine)
    if expert == E - 1:
        for first in range(before + mine, num_tiles, BLOCK_T):
            tile = first + tl.arange(0, BLOCK_T)
            tl.store(map_ptr + tile, tl.full((BLOCK_T,), -1, tl.int32), mask=tile < num_tiles)


@triton.jit
def in_groups(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The index-th tile when GROUP_M tiles of rows take turns on the same columns: both operands stay in L2."""
    per_group = GROUP_M * tiles_n
    first = index // per_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + index % per_group % height, index % per_group // height


@triton.jit
def load_block(pointers, is_row, is_column, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A block with zeros outside; no mask in a dimension that divides evenly, because predicates cost registers."""
    if EVEN_ROWS and EVEN_COLUMNS:
        block = tl.load(pointers)
    elif EVEN_ROWS:
        block = tl.load(pointers, mask=is_column[None, :], other=0.0)
    elif EVEN_COLUMNS:
        block = tl.load(pointers, mask=is_row[:, None], other=0.0)
    else:
        block = tl.load(pointers, mask=is_row[:, None] & is_column[None, :], other=0.0)
    return block


@triton.jit(do_not_specialize=["num_tiles", "depth"])
def product_kernel(
    a_ptr,
    tokens_ptr,
    w_ptr,
    out_ptr,
    map_ptr,
    num_tiles,
    depth,
    N: tl.constexpr,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[r] = a[r] @ w[e] for a tile of one expert's rows; w is (E, K, N), or (E, N, K) if TRANSPOSED."""
    tile_m, tile_n = in_groups(tl.program_id(0), num_tiles, tl.cdiv(N, BLOCK_N), GROUP_M)
    expert = tl.load(map_ptr + tile_m).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(map_ptr + num_tiles + tile_m)
    stop = tl.load(map_ptr + 2 * num_tiles + tile_m)
    rows = first + tl.arange(0, BLOCK_M)
    is_row = rows < stop
    # Rows beyond the tile's end repeat its first one instead of being masked: their products are never stored.
    rows = tl.where(is_row, rows, first).to(tl.int64)
    source = tl.load(tokens_ptr + rows) if GATHER else rows
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < N
    steps = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + source[:, None] * K + steps[None, :]
    w_ptr += expert * (N * K)
    if TRANSPOSED:
        w_ptrs = w_ptr + columns[:, None].to(tl.int64) * K + steps[None, :]
    else:
        w_ptrs = w_ptr + steps[:, None].to(tl.int64) * N + columns[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # depth is K, but no constant: a loop of known length is unrolled until no instruction cache holds it.
    for k in range(0, depth, BLOCK_K):
        is_step = steps < K - k
        a = load_block(a_ptrs, is_row, is_step, True, K % BLOCK_K == 0)
        if TRANSPOSED:
            w = load_block(w_ptrs, is_column, is_step, N % BLOCK_N == 0, K % BLOCK_K == 0).T
            w_ptrs += BLOCK_K
        else:
            w = load_block(w_ptrs, is_step, is_column, K % BLOCK_K == 0, N % BLOCK_N == 0)
            w_ptrs += BLOCK_K * N
        total = tl.dot(a, w, total, input_precision="tf32x3")
        a_ptrs += BLOCK_K
    out_ptrs = out_ptr + rows[:, None] * N + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["num_tiles", "depth"])
def up_kernel(
    x_ptr,
    tokens_ptr,
    w_ptr,
    z_ptr,
    h_ptr,
    map_ptr,
    num_tiles,
    depth,
    F: tl.constexpr,
    D: tl.constexpr,
    WITH_HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """z[r] = x[tokens[r]] @ w[e]^T for a tile of rows, gate and up side by side, and h = silu(gate) * up of them."""
    tile_m, tile_n = in_groups(tl.program_id(0), num_tiles, tl.cdiv(F, BLOCK_N), GROUP_M)
    expert = tl.load(map_ptr + tile_m).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(map_ptr + num_tiles + tile_m)
    stop = tl.load(map_ptr + 2 * num_tiles + tile_m)
    rows = first + tl.arange(0, BLOCK_M)
    is_row = rows < stop
    rows = tl.where(is_row, rows, first).to(tl.int64)
    source = tl.load(tokens_ptr + rows)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < F
    steps = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + source[:, None] * D + steps[None, :]
    w_ptrs = w_ptr + expert * (2 * F * D) + columns[:, None].to(tl.int64) * D + steps[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):  # depth is D: see product_kernel
        is_step = steps < D - k
        x = load_block(x_ptrs, is_row, is_step, True, D % BLOCK_K == 0)
        w_gate = load_block(w_ptrs, is_column, is_step, F % BLOCK_N == 0, D % BLOCK_K == 0)
        w_up = load_block(w_ptrs + F * D, is_column, is_step, F % BLOCK_N == 0, D % BLOCK_K == 0)
        gate = tl.dot(x, w_gate.T, gate, input_precision="tf32x3")
        up = tl.dot(x, w_up.T, up, input_precision="tf32x3")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    mask = is_row[:, None] & is_column[None, :]
    dtype = z_ptr.dtype.element_ty
    z_ptrs = z_ptr + rows[:, None] * (2 * F) + columns[None, :]
    tl.store(z_ptrs, gate.to(dtype), mask=mask)
    tl.store(z_ptrs + F, up.to(dtype), mask=mask)
    if WITH_HIDDEN:
        # From z as it is stored: the backward pass, which reads z, then finds the same h.
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        h = gate * tl.sigmoid(gate) * up
        tl.store(h_ptr + rows[:, None] * F + columns[None, :], h.to(dtype), mask=mask)


@triton.jit
def weight_grad_kernel(
    a_ptr,
    b_ptr,
    tokens_ptr,
    out_ptr,
    ends_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    GATHER_A: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[e] = a[rows of e]^T @ b[rows of e] for a tile; a is gathered by tokens, or else b is."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = in_groups(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends_ptr + expert)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # An expert without rows goes through no step and stores exact zeros.
    for first in range(start, stop, BLOCK_K):
        rows = first + steps
        is_row = rows < stop
        tokens = tl.load(tokens_ptr + rows, mask=is_row, other=0)
        rows = rows.to(tl.int64)
        a_rows = tokens if GATHER_A else rows
        b_rows = rows if GATHER_A else tokens
        # Both are masked: a row of the next expert, or of none, may hold NaN, and 0 * NaN is NaN.
        a = load_block(a_ptr + a_rows[:, None] * M + m[None, :], is_row, m < M, False, M % BLOCK_M == 0)
        b = load_block(b_ptr + b_rows[:, None] * N + n[None, :], is_row, n < N, False, N % BLOCK_N == 0)
        total = tl.dot(a.T, b, total, input_precision="tf32x3")
    out_ptrs = out_ptr + expert.to(tl.int64) * (M * N) + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def map_tiles(offsets_E: Tensor, num_rows: int, tile_rows: int) -> Tensor:
    """For each tile of rows its expert, first row and row to stop before, (3, tiles) int32, made on the device.

    There are as many as any split of the rows could need, so nothing waits for the split; those not needed have
    expert -1.
    """
    num_experts = len(offsets_E)
    num_tiles = num_rows // tile_rows + min(num_experts, num_rows)
    tiles = torch.empty(3, num_tiles, dtype=torch.int32, device=offsets_E.device)
    if num_tiles:
        block = max(16, triton.next_power_of_2(num_experts))
        tile_map_kernel[(num_experts,)](offsets_E, tiles, num_tiles, num_experts, tile_rows, block, TILES_AT_ONCE)
    return tiles


def product(
    a: Tensor,
    weights: Tensor,
    offsets_E: Tensor,
    tokens_R: Tensor | None = None,
    *,
    transposed: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Each sorted row times its expert's weights (E, K, N), or (E, N, K) if `transposed`: (R, N).

    With `tokens_R`, row r is a[tokens_R[r]]. Rows past offsets_E[-1] are left as they were allocated.
    """
    a, weights = a.contiguous(), weights.contiguous()
    num_rows = len(a) if tokens_R is None else len(tokens_R)
    width, depth = (weights.shape[1], weights.shape[2]) if transposed else (weights.shape[2], weights.shape[1])
    tile = tile or choose("product", a.dtype, num_rows // len(offsets_E), width, depth)
    out_RN = a.new_empty(num_rows, width)
    tiles = map_tiles(offsets_E, num_rows, tile.rows)
    if num_rows:
        product_kernel[(tiles.shape[1] * triton.cdiv(width, tile.columns),)](
            a,
            offsets_E if tokens_R is None else tokens_R,
            weights,
            out_RN,
            tiles,
            tiles.shape[1],
            depth,
            width,
            depth,
            tokens_R is not None,
            transposed,
            tile.rows,
            tile.columns,
            tile.depth,
            tile.group,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out_RN


def up(
    x_ND: Tensor,
    gate_up: Tensor,
    offsets_E: Tensor,
    tokens_R: Tensor,
    *,
    with_hidden: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """z[r] = gate_up[e] @ x[tokens[r]] (R, 2F), and h = silu(gate) * up (R, F) from the same pass if asked for."""
    x_ND, gate_up = x_ND.contiguous(), gate_up.contiguous()
    num_rows, width, expert_width = len(tokens_R), gate_up.shape[2], gate_up.shape[1] // 2
    tile = tile or choose("up", x_ND.dtype, num_rows // len(offsets_E), expert_width, width)
    z_RJ = x_ND.new_empty(num_rows, 2 * expert_width)
    h_RF = x_ND.new_empty(num_rows, expert_width) if with_hidden else None
    tiles = map_tiles(offsets_E, num_rows, tile.rows)
    if num_rows:
        up_kernel[(tiles.shape[1] * triton.cdiv(expert_width, tile.columns),)](
            x_ND,
            tokens_R,
            gate_up,
            z_RJ,
            z_RJ if h_RF is None else h_RF,
            tiles,
            tiles.shape[1],
            width,
            expert_width,
            width,
            with_hidden,
            tile.rows,
            tile.columns,
            tile.depth,
            tile.group,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return z_RJ, h_RF


def weight_grad(
    a: Tensor,
    b: Tensor,
    offsets_E: Tensor,
    tokens_R: Tensor,
    *,
    gathers_first: bool,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Per expert, a^T @ b over its rows: (E, M, N), exact zeros for an expert without rows, in `dtype` or a's.

    `tokens_R` gathers the rows of `a` if `gathers_first`, else those of `b`; the other is already sorted by expert.
    """
    a, b = a.contiguous(), b.contiguous()
    num_experts, height, width = len(offsets_E), a.shape[1], b.shape[1]
    rows_per_expert = len(tokens_R) // num_experts
    tile = tile or choose("weight_grad", a.dtype, rows_per_expert, width, rows_per_expert)
    out_EMN = torch.empty(num_experts, height, width, dtype=dtype or a.dtype, device=a.device)
    tiles = triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns)
    weight_grad_kernel[(num_experts * tiles,)](
        a,
        b,
        tokens_R,
        out_EMN,
        offsets_E,
        height,
        width,
        gathers_first,
        tile.rows,
        tile.columns,
        tile.depth,
        tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_EMN
