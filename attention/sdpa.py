"""The backend that needs torch alone: fused kernels, documents one by one, windows in tiles, no dense masks."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.contract import Capability
from attention.mask import Mask

# Queries that attend from a cache in one call: bounds the mask of a call to this many rows.
QUERY_BLOCK = 1024

Attended = tuple[Tensor, Tensor | None]  # out (B, T, H, C), log-sum-exp (B, T, H)


class Sdpa:
    """torch's fused attention: the flash kernel on CPUs, whichever kernel torch picks on CUDA."""

    name = "sdpa"
    capability = Capability(
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        lse_devices=("cpu",),
        window=True,
        documents=True,
        unequal_lengths=True,
        trainable=True,
    )

    def unavailable(self) -> str | None:
        if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return f"torch {torch.__version__} has no CPU flash kernel; install torch 2.11 to 2.13"
        return None

    def __call__(
        self,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGC: Tensor,
        mask: Mask,
        *,
        scale: float | None = None,
        needs_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        kernel = Kernel(scale, needs_lse)
        if mask.documents is None:
            out_BTHC, lse_BTH = attend_rows(kernel, q_BTHC, k_BSGC, v_BSGC, mask)
        else:
            mask.check(q_BTHC.shape[0], q_BTHC.shape[1], k_BSGC.shape[1])
            out_BTHC, lse_BTH = attend_documents(kernel, q_BTHC, k_BSGC, v_BSGC, mask)
        return out_BTHC, None if lse_BTH is None else lse_BTH.transpose(1, 2)


@dataclass(frozen=True)
class Kernel:
    """One fused call. Never with a query that sees nothing, and never causal with T != S: kernels disagree on both."""

    scale: float | None
    needs_lse: bool

    def __call__(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, bias_TS: Tensor | None = None, *, is_causal: bool = False
    ) -> Attended:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BSGC, v_BSGC))
        if q.is_cpu:
            # The operator under F.scaled_dot_product_attention: it gives the log-sum-exp and repeats no key heads.
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, is_causal, attn_mask=bias_TS, scale=self.scale
            )
            return out.transpose(1, 2), lse.transpose(1, 2) if self.needs_lse else None
        is_grouped = q.shape[1] != k.shape[1]
        if is_grouped and bias_TS is not None:
            # With a bias and fewer key heads torch has only the kernel that keeps every score in memory.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            is_grouped = False
        out = F.scaled_dot_product_attention(q, k, v, bias_TS, 0.0, is_causal, scale=self.scale, enable_gqa=is_grouped)
        return out.transpose(1, 2), None


def attend_documents(kernel: Kernel, q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor, mask: Mask) -> Attended:
    """Attend inside each document, in one call for all documents of (nearly) one length."""
    documents, plain = mask.documents, Mask(mask.is_causal, mask.window)
    assert documents is not None
    if documents.is_uniform:
        length = documents.lengths[0]
        q, k, v = (x.reshape(-1, length, *x.shape[2:]) for x in (q_BTHC, k_BTGC, v_BTGC))
        out, lse = attend_rows(kernel, q, k, v, plain)
        return out.reshape(q_BTHC.shape), None if lse is None else lse.reshape(q_BTHC.shape[:3])
    # Padding at a document's end needs no mask under a causal one: no token before it ever looks there.
    grouping = documents.grouping(q_BTHC.device, is_padded=mask.is_causal)
    sizes = [group.count * group.length for group in grouping.groups]
    gathered = [Gather.apply(x.flatten(0, 1), grouping.source_P, grouping.place_N) for x in (q_BTHC, k_BTGC, v_BTGC)]
    outs, lses = [], []
    for group, *heads_P in zip(grouping.groups, *(x.split(sizes) for x in gathered), strict=True):
        q, k, v = (x.unflatten(0, (group.count, group.length)) for x in heads_P)
        out, lse = attend_rows(kernel, q, k, v, plain)
        outs.append(out.flatten(0, 1))
        if lse is not None:
            lses.append(lse.flatten(0, 1))
    out_NHC = Restore.apply(torch.cat(outs), grouping.source_P, grouping.place_N)
    lse_BTH = torch.cat(lses)[grouping.place_N].view(q_BTHC.shape[:3]) if lses else None
    return out_NHC.view(q_BTHC.shape), lse_BTH


class Gather(torch.autograd.Function):
    """Flat tokens to gathered slots. Filled-up slots get no gradient: no real query ever sees them."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, source_P: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(place_N)
        return x_N.index_select(0, source_P)

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None, None]:
        return grad_P.index_select(0, ctx.saved_tensors[0]), None, None


class Restore(torch.autograd.Function):
    """Gathered slots back to flat tokens."""

    @staticmethod
    def forward(ctx: Any, x_P: Tensor, source_P: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(source_P, place_N)
        return x_P.index_select(0, place_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        source_P, place_N = ctx.saved_tensors
        if len(source_P) == len(place_N):
            return grad_N.index_select(0, source_P), None, None
        grad_P = grad_N.new_zeros(len(source_P), *grad_N.shape[1:])
        return grad_P.index_copy_(0, place_N, grad_N), None, None


def attend_rows(kernel: Kernel, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, mask: Mask) -> Attended:
    """Attend where every row is one document; T and S may differ."""
    T, S = q_BTHC.shape[1], k_BSGC.shape[1]
    if T == 0 or S == 0:
        return attend_to_nothing(kernel, q_BTHC, k_BSGC, v_BSGC)
    if not mask.is_causal:
        return kernel(q_BTHC, k_BSGC, v_BSGC)
    if T > S:
        nothing = attend_to_nothing(kernel, q_BTHC[:, : T - S], k_BSGC, v_BSGC)
        return join([nothing, attend_rows(kernel, q_BTHC[:, T - S :], k_BSGC, v_BSGC, mask)])
    if T < S:
        return attend_to_cache(kernel, q_BTHC, k_BSGC, v_BSGC, mask.window)
    if mask.window is not None and mask.window < T:
        return attend_window(kernel, q_BTHC, k_BSGC, v_BSGC, mask.window)
    return kernel(q_BTHC, k_BSGC, v_BSGC, is_causal=True)


def attend_to_nothing(kernel: Kernel, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor) -> Attended:
    """Queries without a key: out 0 and log-sum-exp -inf. Kernels end the whole process over these."""
    # Kept in the graph, so that q, k and v get gradients of zero and not none.
    out = q_BTHC * 0 + 0 * (k_BSGC.sum() + v_BSGC.sum())
    dtype = torch.promote_types(q_BTHC.dtype, torch.float32)
    lse = torch.full(q_BTHC.shape[:3], float("-inf"), dtype=dtype, device=q_BTHC.device)
    return out, lse if kernel.needs_lse else None


def attend_to_cache(kernel: Kernel, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, window: int | None) -> Attended:
    """Fewer queries than keys: the queries are the last tokens."""
    T, S = q_BTHC.shape[1], k_BSGC.shape[1]
    parts = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        last = S - T + stop
        first = 0 if window is None else max(0, last - (stop - start) - window + 1)
        # One query sees all keys that are left: its mask would be all true.
        bias = None if stop - start == 1 else band(stop - start, last - first, window, q_BTHC)
        parts.append(kernel(q_BTHC[:, start:stop], k_BSGC[:, first:last], v_BSGC[:, first:last], bias))
    return join(parts)


def attend_window(kernel: Kernel, q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor, window: int) -> Attended:
    """A sliding window over a longer row: each tile of `window` queries sees its own tile and the one before."""
    B, T = q_BTHC.shape[:2]
    count = T // window - 1
    body = (count + 1) * window
    parts = [kernel(q_BTHC[:, :window], k_BTGC[:, :window], v_BTGC[:, :window], is_causal=True)]
    if count:
        q = q_BTHC[:, window:body].unflatten(1, (count, window)).flatten(0, 1)
        k, v = (with_previous(x[:, :body], window) for x in (k_BTGC, v_BTGC))
        out, lse = kernel(q, k, v, band(window, 2 * window, window, q_BTHC))
        lse = None if lse is None else lse.unflatten(0, (B, count)).flatten(1, 2)
        parts.append((out.unflatten(0, (B, count)).flatten(1, 2), lse))
    if body < T:
        bias = band(T - body, window + T - body, window, q_BTHC)
        parts.append(kernel(q_BTHC[:, body:], k_BTGC[:, body - window :], v_BTGC[:, body - window :], bias))
    return join(parts)


def with_previous(x_BTGC: Tensor, window: int) -> Tensor:
    """Each tile but the first behind the tile before it: (B * (T / window - 1), 2 * window, G, C)."""
    tiles = x_BTGC.unflatten(1, (-1, window))
    return torch.cat((tiles[:, :-1], tiles[:, 1:]), dim=2).flatten(0, 1)


def band(T: int, S: int, window: int | None, like: Tensor) -> Tensor:
    """0 where the last T of S tokens may look and -inf elsewhere: (T, S), of the dtype and on the device of `like`."""
    seen_TS = Mask(window=window).dense(1, T, S, like.device)[0]
    return torch.zeros(T, S, device=like.device, dtype=like.dtype).masked_fill_(~seen_TS, float("-inf"))


def join(parts: list[Attended]) -> Attended:
    """Consecutive queries one after the other."""
    if len(parts) == 1:
        return parts[0]
    lses = [lse for _, lse in parts if lse is not None]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat(lses, dim=1) if lses else None
