# ruff: noqa: PLR0917 - a kernel takes its arguments by position
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention backward from an out and a log-sum-exp that may be those of a larger softmax (Dao 2023, algorithm 2).

Each gradient is summed by one program, in fp32 and in an order that never changes: no atomics. That costs 7 products
where 5 would do, once for keys and values and once for queries.
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


@triton.jit(do_not_specialize=["num_rows"])
def delta_kernel(
    grad_ptr,
    out_ptr,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,
    exponent_ptr,
    num_rows,
    grad_token,
    grad_head,
    out_token,
    out_head,
    lse_token,
    lse_head,
    grad_lse_token,
    grad_lse_head,
    R: tl.constexpr,
    E: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta = sum(grad * out) - grad_lse and the log-sum-exp as an exponent of 2, both (G, tokens * R).

    So the rows of a key head stand side by side, and a block of them is read without any arithmetic.
    """
    g = tl.program_id(1)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(at, num_rows - 1)
    grad = load_queries(grad_ptr, rows, g, grad_token, grad_head, R, E, BLOCK_E).to(tl.float32)
    out = load_queries(out_ptr, rows, g, out_token, out_head, R, E, BLOCK_E).to(tl.float32)
    delta = tl.sum(grad * out, 1)
    tokens, heads = (rows // R).to(tl.int64), (g * R + rows % R).to(tl.int64)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + tokens * grad_lse_token + heads * grad_lse_head).to(tl.float32)
    lse = tl.load(lse_ptr + tokens * lse_token + heads * lse_head)
    own = g.to(tl.int64) * num_rows + at
    tl.store(delta_ptr + own, delta, mask=at < num_rows)
    tl.store(exponent_ptr + own, lse * 1.4426950408889634, mask=at < num_rows)


@triton.jit
def weigh(scores, sees, exponents, factor, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """(softmax weights from q k^T, slope of the softcap there)."""
    slope = 1.0
    if SOFTCAP:
        scores = tanh(scores * softcap)
        slope = 1.0 - scores * scores
    weights = tl.exp2(scores * factor - exponents)
    if MASKED:  # after the exponential, which is +inf for a query that sees nothing
        weights = tl.where(sees, weights, 0.0)
    return weights, slope


@triton.jit
def add_rows(
    q,
    k,
    v,
    grad,
    sees,
    exponents,
    deltas,
    grad_k,
    grad_v,
    factor,
    softcap,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of keys and values with those of one more block of rows. One product after the other: two blocks
    of scores at a time would not fit in registers."""
    scores = tl.dot(k, q.T, input_precision=PRECISION)
    weights, slope = weigh(scores, sees, exponents[None, :], factor, softcap, MASKED, SOFTCAP)
    grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    below = tl.broadcast_to(-deltas[None, :], scores.shape)
    grad_scores = weights * tl.dot(v, grad.T, below, input_precision=PRECISION) * slope
    return tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION), grad_v


@triton.jit
def add_keys(
    q,
    k,
    v,
    grad,
    sees,
    exponents,
    deltas,
    grad_q,
    factor,
    softcap,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of queries with those of one more block of keys."""
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    weights, slope = weigh(scores, sees, exponents[:, None], factor, softcap, MASKED, SOFTCAP)
    below = tl.broadcast_to(-deltas[:, None], scores.shape)
    grad_scores = weights * tl.dot(grad, v.T, below, input_precision=PRECISION) * slope
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_blocks", "num_rows", "first_tokens", "window"])
def key_gradients_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    delta_ptr,
    exponent_ptr,
    grad_k_ptr,
    grad_v_ptr,
    table_ptr,
    num_blocks,
    num_rows,
    grad_token,
    grad_head,
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
    scale,
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
    """Gradients of a block of keys (tokens, G, C) and values (tokens, G, E) of one key head, over all rows it meets."""
    g, first, count, own, answer, shift, row, prefix, _head, low, inner, outer, high = read_block(table_ptr, num_blocks)
    steps = tl.arange(0, KEYS)
    # Keys past the block's end repeat its last one and are not stored.
    mine = tl.minimum(steps, count - 1)
    k = load_rows(k_ptr + g.to(tl.int64) * k_head, first + mine, k_token, C, BLOCK_C)
    v = load_rows(v_ptr + g.to(tl.int64) * v_head, first + mine, v_token, E, BLOCK_E)
    exponent_ptr += g.to(tl.int64) * num_rows
    delta_ptr += g.to(tl.int64) * num_rows
    grad_k = tl.zeros((KEYS, BLOCK_C), tl.float32)
    grad_v = tl.zeros((KEYS, BLOCK_E), tl.float32)
    for start in range(inner, outer, ROWS):
        rows = row + start + tl.arange(0, ROWS)
        q = load_queries(q_ptr, rows, g, q_token, q_head, R, C, BLOCK_C)
        grad = load_queries(grad_ptr, rows, g, grad_token, grad_head, R, E, BLOCK_E)
        exponents, deltas = tl.load(exponent_ptr + rows), tl.load(delta_ptr + rows)
        grad_k, grad_v = add_rows(
            q, k, v, grad, None, exponents, deltas, grad_k, grad_v, factor, softcap, False, SOFTCAP, PRECISION
        )
    for i in range(masked_steps(0, low, inner, outer, high, ROWS)):
        start, stop = masked_step(i, 0, low, inner, outer, high, ROWS)
        index = start + tl.arange(0, ROWS)
        # Rows past the end repeat the last one, and weigh nothing: exp(-inf).
        rows = row + tl.minimum(index, stop - 1)
        q = load_queries(q_ptr, rows, g, q_token, q_head, R, C, BLOCK_C)
        grad = load_queries(grad_ptr, rows, g, grad_token, grad_head, R, E, BLOCK_E)
        exponents = tl.load(exponent_ptr + row + index, mask=index < stop, other=float("inf"))
        deltas = tl.load(delta_ptr + row + index, mask=index < stop, other=0.0)
        places = (row + index + shift)[None, :]
        sees = seen(places, (own + steps)[:, None], prefix, first_tokens, window, R, WINDOW, HEAD)
        grad_k, grad_v = add_rows(
            q, k, v, grad, sees, exponents, deltas, grad_k, grad_v, factor, softcap, CAUSAL, SOFTCAP, PRECISION
        )

    at = (first + answer + steps).to(tl.int64) * G + g
    store_rows(grad_k_ptr, at, C, steps < count, grad_k * scale, C, BLOCK_C)
    store_rows(grad_v_ptr, at, E, steps < count, grad_v, E, BLOCK_E)


@triton.jit(do_not_specialize=["num_blocks", "num_rows", "first_tokens", "window"])
def query_gradients_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    delta_ptr,
    exponent_ptr,
    grad_q_ptr,
    table_ptr,
    num_blocks,
    num_rows,
    grad_token,
    grad_head,
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
    scale,
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
    """Gradients of a block of rows of one key head's queries (tokens, H, C), over all keys they meet."""
    g, first, count, _own, answer, shift, key, prefix, head, low, inner, outer, high = read_block(table_ptr, num_blocks)
    rows = first + tl.minimum(tl.arange(0, ROWS), count - 1)
    q = load_queries(q_ptr, rows, g, q_token, q_head, R, C, BLOCK_C)
    grad = load_queries(grad_ptr, rows, g, grad_token, grad_head, R, E, BLOCK_E)
    exponents = tl.load(exponent_ptr + g.to(tl.int64) * num_rows + rows)
    deltas = tl.load(delta_ptr + g.to(tl.int64) * num_rows + rows)
    k_ptr += key.to(tl.int64) * k_token + g.to(tl.int64) * k_head
    v_ptr += key.to(tl.int64) * v_token + g.to(tl.int64) * v_head
    steps = tl.arange(0, KEYS)
    grad_q = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(inner, outer, KEYS):
        k = load_rows(k_ptr, start + steps, k_token, C, BLOCK_C)
        v = load_rows(v_ptr, start + steps, v_token, E, BLOCK_E)
        grad_q = add_keys(q, k, v, grad, None, exponents, deltas, grad_q, factor, softcap, False, SOFTCAP, PRECISION)
    for i in range(masked_steps(head, low, inner, outer, high, KEYS)):
        start, stop = masked_step(i, head, low, inner, outer, high, KEYS)
        keys = start + steps
        k = load_rows(k_ptr, tl.minimum(keys, stop - 1), k_token, C, BLOCK_C)
        v = load_rows(v_ptr, tl.minimum(keys, stop - 1), v_token, E, BLOCK_E)
        sees = (keys < stop)[None, :]
        if CAUSAL:
            sees &= seen((rows + shift)[:, None], keys[None, :], prefix, first_tokens, window, R, WINDOW, HEAD)
        grad_q = add_keys(q, k, v, grad, sees, exponents, deltas, grad_q, factor, softcap, True, SOFTCAP, PRECISION)

    rows += answer
    at = (rows // R).to(tl.int64) * (G * R) + g * R + rows % R
    store_rows(grad_q_ptr, at, C, tl.arange(0, ROWS) < count, grad_q * scale, C, BLOCK_C)
