# ruff: noqa: PLR0917 - a kernel takes its arguments by position
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention forward: softmax(q k^T * scale) v and its log-sum-exp, one program a block of rows, no score in memory.

The online softmax of Milakov and Gimelshein 2018 over blocks of keys, as in FlashAttention-2 (Dao 2023, algorithm 1),
in base 2. Blocks outside the mask are never visited, blocks inside it are not masked (attention.kernels.blocks).
"""

import triton
import triton.language as tl

from attention.kernels.scores import (
    load_queries,
    load_rows,
    masked_step,
    masked_steps,
    read_block,
    seen,
    store_rows,
    tanh,
)


@triton.jit
def absorb(
    q,
    k,
    v,
    sees,
    peak,
    total,
    out,
    factor,
    softcap,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The softmax so far, with one more block of keys: its largest score (base 2), sum of weights, and weighted sum."""
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    if SOFTCAP:
        scores = tanh(scores * softcap)
    if MASKED:
        scores = tl.where(sees, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
    # A row that has seen nothing yet has no peak: -inf minus -inf would be NaN.
    anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = tl.exp2(scores * factor - anchor[:, None])
    shrink = tl.exp2(peak - anchor)
    total = total * shrink + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return new_peak, total, out


@triton.jit(do_not_specialize=["num_blocks", "first_tokens", "window"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    table_ptr,
    num_blocks,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    window,
    first_tokens,
    factor,
    softcap,
    G: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """out (tokens, H, E) and its log-sum-exp (tokens, H) for a block of rows of one key head.

    factor: what a score (its tanh, if SOFTCAP) is multiplied with to be an exponent of 2; softcap: what a score is
    multiplied with before the tanh.
    """
    g, first, count, _start, answer, shift, key, prefix, head, low, inner, outer, high = read_block(
        table_ptr, num_blocks
    )
    # Rows past the block's end repeat its last one and are not stored.
    rows = first + tl.minimum(tl.arange(0, ROWS), count - 1)
    q = load_queries(q_ptr, rows, g, q_token, q_head, R, C, BLOCK_C)
    k_ptr += key.to(tl.int64) * k_token + g.to(tl.int64) * k_head
    v_ptr += key.to(tl.int64) * v_token + g.to(tl.int64) * v_head
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK_E), tl.float32)
    steps = tl.arange(0, KEYS)
    for start in range(inner, outer, KEYS):
        k = load_rows(k_ptr, start + steps, k_token, C, BLOCK_C)
        v = load_rows(v_ptr, start + steps, v_token, E, BLOCK_E)
        peak, total, out = absorb(q, k, v, None, peak, total, out, factor, softcap, False, SOFTCAP, PRECISION)
    for i in range(masked_steps(head, low, inner, outer, high, KEYS)):
        start, stop = masked_step(i, head, low, inner, outer, high, KEYS)
        keys = start + steps
        # Keys past the end repeat the last one: what stands there may be another document's, or nobody's.
        k = load_rows(k_ptr, tl.minimum(keys, stop - 1), k_token, C, BLOCK_C)
        v = load_rows(v_ptr, tl.minimum(keys, stop - 1), v_token, E, BLOCK_E)
        sees = (keys < stop)[None, :]
        if CAUSAL:
            sees &= seen((rows + shift)[:, None], keys[None, :], prefix, first_tokens, window, R, WINDOW, HEAD)
        peak, total, out = absorb(q, k, v, sees, peak, total, out, factor, softcap, True, SOFTCAP, PRECISION)

    is_row = tl.arange(0, ROWS) < count
    rows += answer
    at = (rows // R).to(tl.int64) * (G * R) + g * R + rows % R
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    store_rows(out_ptr, at, E, is_row, out, E, BLOCK_E)
    tl.store(lse_ptr + at, (peak + tl.log2(total)) * 0.6931471805599453, mask=is_row)
