"""Kernels that need a GPU, played by plain tensors: they check what they get and answer right, quirks included."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

INF = float("inf")


def scores_of(q: Tensor, k: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """(scores (H, T, S), their slope in q k^T) of one document, query heads over fewer key heads."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("thc,shc->hts", q, k) * scale
    if not softcap:
        return scores, scale
    tanh = torch.tanh(scores / softcap)
    return softcap * tanh, scale * (1 - tanh.square())


def dense_forward(  # noqa: PLR0917
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float = 0.0, empty: float = -INF
) -> tuple[Tensor, Tensor]:
    """out (T, H, E) and log-sum-exp (H, T) of one document under a drawn mask; `empty` where nothing is seen."""
    scores = scores_of(q, k, scale, softcap)[0].masked_fill(~seen, -INF)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hts,she->the", weights, v), lse.masked_fill(lse == -INF, empty)


def dense_backward(  # noqa: PLR0917
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """By the given out and log-sum-exp; NaN for a query that sees nothing and comes with a log-sum-exp of -inf."""
    scores, slope = scores_of(q, k, scale, softcap)
    weights = (scores.masked_fill(~seen, -INF) - lse[..., None]).exp()
    G = k.shape[1]
    wide_v = v.repeat_interleave(q.shape[1] // G, dim=1)
    delta = (grad * out).sum(-1).T
    grad_scores = weights * (torch.einsum("the,she->hts", grad, wide_v) - delta[..., None]) * slope
    wide_k = k.repeat_interleave(q.shape[1] // G, dim=1)
    dq = torch.einsum("hts,shc->thc", grad_scores, wide_k)
    dk = torch.einsum("hts,thc->shc", grad_scores, q).unflatten(1, (G, -1)).sum(2)
    dv = torch.einsum("hts,the->she", weights, grad).unflatten(1, (G, -1)).sum(2)
    return dq, dk, dv


def band(T: int, S: int, left: int | None, right: int | None) -> Tensor:
    """Bottom-right, both sides included, as flash kernels draw a window."""
    place, key = torch.arange(T)[:, None] + S - T, torch.arange(S)[None]
    seen = torch.ones(T, S, dtype=torch.bool)
    if left is not None:
        seen = seen & (key >= place - left)
    if right is not None:
        seen = seen & (key <= place + right)
    return seen


def square(T: int, S: int, is_causal: bool) -> Tensor:
    """A causal mask as torch's CUDA kernels place it where T != S: wherever; none of our calls may ask."""
    assert not is_causal or T == S
    return torch.ones(T, S, dtype=torch.bool).tril() if is_causal else torch.ones(T, S, dtype=torch.bool)


class Varlen:
    """Documents of flat tokens under a window: what all flash libraries share."""

    def __init__(self, empty: float) -> None:
        self.empty = empty
        self.windows: list[tuple[int | None, int | None]] = []

    def forward(  # noqa: PLR0917
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        window: tuple[int | None, int | None],
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        self.check(q, k, v, starts, longest)
        self.windows.append(window)
        pieces = [
            dense_forward(q[a:b], k[c:d], v[c:d], band(b - a, d - c, *window), scale, softcap, self.empty)
            for (a, b), (c, d) in pairs(starts)
        ]
        outs, lses = zip(*pieces, strict=True)
        return torch.cat(outs), torch.cat(lses, dim=1)

    def backward(  # noqa: PLR0917
        self,
        tensors: tuple[Tensor, ...],
        starts: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        window: tuple[int | None, int | None],
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, ...]:
        grad, q, k, v, out, lse = tensors
        self.check(q, k, v, starts, longest)
        assert all(x.is_contiguous() for x in tensors) and lse.shape == (q.shape[1], q.shape[0])
        assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
        pieces = [
            dense_backward(
                *(grad[a:b], q[a:b], k[c:d], v[c:d], out[a:b], lse[:, a:b]),
                *(band(b - a, d - c, *window), scale, softcap),
            )
            for (a, b), (c, d) in pairs(starts)
        ]
        return tuple(torch.cat(part) for part in zip(*pieces, strict=True))

    @staticmethod
    def check(q: Tensor, k: Tensor, v: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int]) -> None:
        assert q.ndim == k.ndim == v.ndim == 3 and q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
        assert q.shape[-1] % 8 == 0 and q.shape[1] % k.shape[1] == 0 and k.shape[:2] == v.shape[:2]
        for x, start, most in zip((q, k), starts, longest, strict=True):
            assert start.dtype == torch.int32 and start.is_contiguous()
            assert start[0] == 0 and start[-1] == len(x) and start.diff().max() == most and start.diff().min() > 0


def pairs(starts: tuple[Tensor, Tensor]) -> list[tuple[list[int], list[int]]]:
    """((start, stop) of the queries, of the keys) of each document."""
    sides = [torch.stack((start[:-1], start[1:]), dim=1).tolist() for start in starts]
    return list(zip(*sides, strict=True))


def unbounded_is_minus_one(left: int, right: int, causal: bool) -> tuple[int | None, int | None]:
    assert isinstance(left, int) and isinstance(right, int) and left >= -1 and right >= -1
    return None if left < 0 else left, 0 if causal else None if right < 0 else right


def flash_attention_2(core: Varlen) -> SimpleNamespace:
    """flash_attn.flash_attn_interface of 2.8.3: -1 is unbounded, gradients are written, few defaults."""

    def _flash_attn_varlen_forward(  # noqa: PLR0917
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
        block_table: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
        zero_tensors: bool = False,
    ) -> tuple[Tensor, ...]:
        assert not dropout_p and not return_softmax and alibi_slopes is None
        window = unbounded_is_minus_one(window_size_left, window_size_right, causal)
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        out, lse = core.forward(q, k, v, starts, longest, window, softmax_scale, softcap)
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_backward(  # noqa: PLR0917
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
        zero_tensors: bool = False,
    ) -> Tensor:
        assert not dropout_p and alibi_slopes is None
        window = unbounded_is_minus_one(window_size_left, window_size_right, causal)
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        parts = core.backward((dout, q, k, v, out, softmax_lse), starts, longest, window, softmax_scale, softcap)
        for given, part in zip((dq, dk, dv), parts, strict=True):
            given.copy_(part)
        return torch.empty(0)

    return SimpleNamespace(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward, _flash_attn_varlen_backward=_flash_attn_varlen_backward
    )


def flash_attention_3_of_2025(core: Varlen) -> SimpleNamespace:
    """flash_attn_interface beside 2.8.3: the window is a pair, and everything of generation has to be given."""

    def _flash_attn_forward(  # noqa: PLR0917
        q, k, v, k_new, v_new, qv, out,
        cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
        page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale,
        softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        given = (k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k)
        assert all(x is None for x in (*given, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale))
        window = unbounded_is_minus_one(*window_size, causal)
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return *core.forward(q, k, v, starts, longest, window, softmax_scale, softcap), None

    def _flash_attn_backward(  # noqa: PLR0917
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert sequed_q is None and sequed_k is None
        window = unbounded_is_minus_one(*window_size, causal)
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        parts = core.backward((dout, q, k, v, out, softmax_lse), starts, longest, window, softmax_scale, softcap)
        for given, part in zip((dq, dk, dv), parts, strict=True):
            given.copy_(part)
        return dq, dk, dv, torch.empty(0)

    return SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


class CustomOp:
    """torch.library.custom_op: hides the signature of what it wraps."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._init_fn = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._init_fn(*args, **kwargs)


def flash_attention_3_of_2026(core: Varlen) -> SimpleNamespace:
    """flash_attn_interface of 2026: custom operators, the window in two, `is_causal` backward."""

    @CustomOp
    def _flash_attn_forward(  # noqa: PLR0917
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        window = unbounded_is_minus_one(window_size_left, window_size_right, causal)
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        out, lse = core.forward(q, k, v, starts, longest, window, softmax_scale, softcap)
        return out, lse, torch.empty(0), torch.empty(0)

    @CustomOp
    def _flash_attn_backward(  # noqa: PLR0917
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        window = unbounded_is_minus_one(window_size_left, window_size_right, is_causal)
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        parts = core.backward((dout, q, k, v, out, softmax_lse), starts, longest, window, softmax_scale, softcap)
        for given, part in zip((dq, dk, dv), parts, strict=True):
            given.copy_(part)
        return torch.empty(0)

    return SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


def flash_attention_4(core: Varlen) -> SimpleNamespace:
    """flash_attn.cute.interface of 4.0.0b36: None is unbounded, -1 is a window of nothing, gradients are returned."""

    def window_of(causal: bool, left: int | None, right: int | None) -> tuple[int | None, int | None]:
        if left is not None and right is not None and left < 0 and right < 0:
            left = right = None
        return left, 0 if causal else right

    def _flash_attn_fwd(  # noqa: PLR0917
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, return_lse=False,
    ):  # fmt: skip
        assert qv is None and return_lse, "without it there may be no log-sum-exp"
        window = window_of(causal, window_size_left, window_size_right)
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return *core.forward(q, k, v, starts, longest, window, softmax_scale, softcap or 0.0), None, None, None

    def _flash_attn_bwd(  # noqa: PLR0917
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        dlse=None,
    ):  # fmt: skip
        window = window_of(causal, window_size_left, window_size_right)
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return core.backward((dout, q, k, v, out, lse), starts, longest, window, softmax_scale, softcap)

    return SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
