"""xformers' pair of functions that give and take the log-sum-exp, with its flash kernel.

Checked against xformers 0.0.35. Its other kernel, CUTLASS, is the one that backend "efficient" calls through torch.
"""

from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attention.backends.aten import needs_gpu, repeat_heads, sum_heads
from attention.backends.band import Band, band_of
from attention.backends.fused import Widths, backward, forward
from attention.contract import Capability, Options
from attention.mask import Mask


class Xformers:
    """xformers' flash kernel by its own mask objects; every query head gets a key head of its own."""

    name = "xformers"
    widths = Widths(are_equal=True, multiple=8)
    capability = Capability(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        # It wants at least as many keys as queries in each document.
        key_documents=False,
        prefix=False,
        first_tokens=False,
        softcap=False,
        # One more for the gradient of the log-sum-exp would be too many with 256.
        max_channels=248,
        partial=False,
        deterministic=False,
    )

    def unavailable(self) -> str | None:
        if found() is None:
            return "xformers is not installed, or not for this torch"
        return needs_gpu()

    def forward(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options
    ) -> tuple[Tensor, Tensor]:
        mask.check(q_BTHC.shape[0], q_BTHC.shape[1], k_BSGC.shape[1])
        return forward(partial(_forward, mask), self.widths, q_BTHC, k_BSGC, v_BSGE, options)

    def backward(  # noqa: PLR0917 (as in the contract)
        self,
        grad_BTHE: Tensor,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGE: Tensor,
        out_BTHE: Tensor,
        lse_BHT: Tensor,
        mask: Mask,
        options: Options,
        grad_lse_BHT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (grad_BTHE, q_BTHC, k_BSGC, v_BSGE, out_BTHE, lse_BHT)
        return backward(partial(_backward, mask), self.widths, *tensors, options, grad_lse_BHT)


@lru_cache
def found() -> ModuleType | None:
    """xformers.ops.fmha, or None: not installed, or at odds with the torch or the flash-attn beside it."""
    try:
        from xformers.ops import fmha
    except (ImportError, OSError, RuntimeError):
        return None
    return fmha if fmha.flash.FwOp.is_available() else None


def _forward(mask: Mask, q_BTHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    fmha, (B, T, H) = _fmha(), q_BTHC.shape[:3]
    band = band_of(T, k_BSHC.shape[1], mask) if mask.documents is None else None
    if mask.documents is None and band is None:
        return torch.zeros_like(q_BTHC), q_BTHC.new_full((B, H, T), float("-inf"), dtype=torch.float32)
    q, k, v = _cut(q_BTHC, band, "queries"), *(_cut(repeat_heads(x, H), band, "keys") for x in (k_BSHC, v_BSHC))
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, attn_bias=_bias(fmha, mask, band, q.device), scale=scale, op=fmha.flash.FwOp
    )
    if band is None:
        # One packed row: (1, H, N).
        return out.view(q_BTHC.shape), lse.view(H, B, T).transpose(0, 1)
    if band.queries == slice(0, T):
        return out, lse
    whole_BTHC, whole_BHT = torch.zeros_like(q_BTHC), lse.new_full((B, H, T), float("-inf"))
    whole_BTHC[:, band.queries], whole_BHT[:, :, band.queries] = out, lse
    return whole_BTHC, whole_BHT


def _backward(  # noqa: PLR0917 (a product has many factors)
    mask: Mask,
    grad_BTHC: Tensor,
    q_BTHC: Tensor,
    k_BSGC: Tensor,
    v_BSGC: Tensor,
    out_BTHC: Tensor,
    lse_BHT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    fmha, (T, H), (S, G) = _fmha(), q_BTHC.shape[1:3], k_BSGC.shape[1:3]
    band = band_of(T, S, mask) if mask.documents is None else None
    wholes = torch.zeros_like(q_BTHC), torch.zeros_like(k_BSGC), torch.zeros_like(v_BSGC)
    if mask.documents is None and band is None:
        return wholes
    grad, q, out = (_cut(x, band, "queries") for x in (grad_BTHC, q_BTHC, out_BTHC))
    k, v = (_cut(repeat_heads(x, H), band, "keys") for x in (k_BSGC, v_BSGC))
    lse = lse_BHT.transpose(0, 1).flatten(1)[None] if band is None else lse_BHT[:, :, band.queries]
    dq, dk, dv = fmha.memory_efficient_attention_backward(
        *(grad, out, lse.contiguous(), q, k, v),
        attn_bias=_bias(fmha, mask, band, q.device),
        scale=scale,
        op=fmha.flash.BwOp,
    )
    parts = dq, sum_heads(dk, G), sum_heads(dv, G)
    if band is None:
        return parts[0].view(q_BTHC.shape), parts[1].view(k_BSGC.shape), parts[2].view(v_BSGC.shape)
    for whole, part, place in zip(wholes, parts, (band.queries, band.keys, band.keys), strict=True):
        whole[:, place] = part
    return wholes


def _fmha() -> Any:
    fmha = found()
    assert fmha is not None
    return fmha


def _cut(x_BT: Tensor, band: Band | None, side: str) -> Tensor:
    """What takes part of each row; with documents one row of all tokens."""
    return x_BT.flatten(0, 1)[None].contiguous() if band is None else x_BT[:, getattr(band, side)].contiguous()


def _bias(fmha: Any, mask: Mask, band: Band | None, device: torch.device) -> Any:
    """The mask as an object of xformers'."""
    if band is None:
        assert mask.documents is not None
        blocks = fmha.attn_bias.BlockDiagonalMask.from_seqlens(list(mask.documents.lengths), device=device)
        if mask.window is not None:
            return blocks.make_local_attention_from_bottomright(mask.window)
        return blocks.make_causal_from_bottomright() if mask.is_causal else blocks
    if band.right is None:
        return None
    if band.left is None and band.right == 0:
        return fmha.attn_bias.LowerTriangularFromBottomRightMask()
    # It has no word for an unbounded side; no row is longer than its keys.
    left = band.keys.stop - band.keys.start + band.right if band.left is None else band.left
    return fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=left, window_right=band.right)
