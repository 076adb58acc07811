# ruff: noqa: PLR0917 - a kernel takes its arguments by position
# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the kernels of both directions share: loads, the mask of a block, softcap, and the walk over masked blocks."""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, rows, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of WIDTH channels, filled up with zeros to BLOCK; ptr may hold one address or one a row."""
    columns = tl.arange(0, BLOCK)
    # int64: tokens * stride passes 2^31 at a million tokens.
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if WIDTH == BLOCK:  # noqa: SIM108 - chosen when compiled; no mask, because predicates cost registers
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    return block


@triton.jit
def store_rows(ptr, rows, stride, is_row, block, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The first WIDTH channels of the rows that are."""
    columns = tl.arange(0, BLOCK)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = is_row[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, block.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_queries(ptr, rows, g, token, head, R: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of key head g, row = token * R + one of the R query heads, from a tensor with these strides."""
    heads = (g * R + rows % R).to(tl.int64)
    return load_rows(ptr + heads[:, None] * head, rows // R, token, WIDTH, BLOCK)


@triton.jit
def seen(places, keys, prefix, first_tokens, window, R: tl.constexpr, WINDOW: tl.constexpr, HEAD: tl.constexpr):
    """Whether rows see `keys` under a causal mask, keys counted from the segment's start and places in rows: R times
    the key a row stands at, and up to R - 1 more, which spares a division."""
    sees = keys * R <= places
    if WINDOW:
        in_window = (keys + window) * R > places
        if HEAD:
            in_window |= keys < first_tokens
        sees &= in_window
    if HEAD:
        sees |= keys < prefix
    return sees


@triton.jit
def tanh(x):
    """Exact to fp32 at both ends: near 0 the quotient of exponentials loses digits, which a Pade fraction keeps."""
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0, -far, far))


@triton.jit
def read_block(table_ptr, num_blocks):
    """(key head, the columns of attention.kernels.blocks) of this program: one key head after the other, because
    what runs at the same time should read the same keys."""
    ptr = table_ptr + tl.program_id(0) % num_blocks
    first = tl.load(ptr)
    count = tl.load(ptr + num_blocks)
    start = tl.load(ptr + 2 * num_blocks)
    answer = tl.load(ptr + 3 * num_blocks)
    shift = tl.load(ptr + 4 * num_blocks)
    other = tl.load(ptr + 5 * num_blocks)
    prefix = tl.load(ptr + 6 * num_blocks)
    head = tl.load(ptr + 7 * num_blocks)
    low = tl.load(ptr + 8 * num_blocks)
    inner = tl.load(ptr + 9 * num_blocks)
    outer = tl.load(ptr + 10 * num_blocks)
    high = tl.load(ptr + 11 * num_blocks)
    g = tl.program_id(0) // num_blocks
    return g, first, count, start, answer, shift, other, prefix, head, low, inner, outer, high


@triton.jit
def masked_step(i, head, low, inner, outer, high, STEP: tl.constexpr):
    """(start, stop) of the i-th block that needs a mask: those of the head, those before inner, those from outer on."""
    head_steps = (head + STEP - 1) // STEP
    low_steps = (inner - low) // STEP
    j = i - head_steps
    start = tl.where(j < low_steps, low + j * STEP, outer + (j - low_steps) * STEP)
    return tl.where(j < 0, i * STEP, start), tl.where(j < 0, head, high)


@triton.jit
def masked_steps(head, low, inner, outer, high, STEP: tl.constexpr):
    """How many blocks need a mask."""
    tail = tl.maximum(high - outer, 0)
    return (head + STEP - 1) // STEP + (inner - low) // STEP + (tail + STEP - 1) // STEP
