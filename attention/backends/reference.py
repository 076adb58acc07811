"""The plain backend: every score in memory, softmax in fp32. Slow, plainly right; the others are held to it."""

import torch
from torch import Tensor

from attention.contract import Capability, Options
from attention.mask import Mask


class Reference:
    """Softmax attention as it is written on paper."""

    name = "reference"
    capability = Capability(
        devices=("cpu", "cuda"), dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)
    )

    def unavailable(self) -> str | None:
        return None

    def forward(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q_BTHC.dtype, torch.float32)
        q_BTGRC, k_BSGC, v_BSGE = _widened(q_BTHC, k_BSGC, v_BSGE)
        scores_BGRTS, _ = _scores(q_BTGRC, k_BSGC, mask, options)
        lse_BGRT = torch.logsumexp(scores_BGRTS, dim=-1) if k_BSGC.shape[1] else scores_BGRTS.sum(-1) - torch.inf
        weights_BGRTS = _weights(scores_BGRTS, lse_BGRT)
        out_BTGRE = torch.einsum("bgrts,bsge->btgre", weights_BGRTS, v_BSGE)
        return out_BTGRE.flatten(2, 3).to(dtype if options.is_partial else q_BTHC.dtype), lse_BGRT.flatten(1, 2)

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
        dtypes = [x.dtype for x in (q_BTHC, k_BSGC, v_BSGE)]
        if options.is_partial:
            dtypes = [torch.promote_types(dtype, torch.float32) for dtype in dtypes]
        q_BTGRC, k_BSGC, v_BSGE = _widened(q_BTHC, k_BSGC, v_BSGE)
        heads = q_BTGRC.shape[2:4]
        grad_BTGRE, out_BTGRE = (x.to(q_BTGRC.dtype).unflatten(2, heads) for x in (grad_BTHE, out_BTHE))
        scores_BGRTS, slope_BGRTS = _scores(q_BTGRC, k_BSGC, mask, options)
        weights_BGRTS = _weights(scores_BGRTS, lse_BHT.to(q_BTGRC.dtype).unflatten(1, heads))
        delta_BGRT = (grad_BTGRE * out_BTGRE).sum(-1).permute(0, 2, 3, 1)
        if grad_lse_BHT is not None:
            delta_BGRT = delta_BGRT - grad_lse_BHT.unflatten(1, heads)
        grad_weights_BGRTS = torch.einsum("btgre,bsge->bgrts", grad_BTGRE, v_BSGE)
        grad_scores_BGRTS = weights_BGRTS * (grad_weights_BGRTS - delta_BGRT[..., None]) * slope_BGRTS
        grad_q_BTGRC = torch.einsum("bgrts,bsgc->btgrc", grad_scores_BGRTS, k_BSGC)
        grad_k_BSGC = torch.einsum("bgrts,btgrc->bsgc", grad_scores_BGRTS, q_BTGRC)
        grad_v_BSGE = torch.einsum("bgrts,btgre->bsge", weights_BGRTS, grad_BTGRE)
        gradients = (grad_q_BTGRC.flatten(2, 3), grad_k_BSGC, grad_v_BSGE)
        grad_q, grad_k, grad_v = (x.to(dtype) for x, dtype in zip(gradients, dtypes, strict=True))
        return grad_q, grad_k, grad_v


def _widened(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In fp32 at least, the query heads of one key head together: q (B, T, G, R, C)."""
    dtype = torch.promote_types(q_BTHC.dtype, torch.float32)
    return q_BTHC.to(dtype).unflatten(2, (k_BSGC.shape[2], -1)), k_BSGC.to(dtype), v_BSGE.to(dtype)


def _scores(q_BTGRC: Tensor, k_BSGC: Tensor, mask: Mask, options: Options) -> tuple[Tensor, Tensor | float]:
    """(scores, -inf where nothing is seen; their slope in q k^T)."""
    (B, T), S = q_BTGRC.shape[:2], k_BSGC.shape[1]
    scale = options.scale_for(q_BTGRC.shape[-1])
    scores_BGRTS = torch.einsum("btgrc,bsgc->bgrts", q_BTGRC, k_BSGC) * scale
    slope: Tensor | float = scale
    if options.softcap:
        tanh_BGRTS = (scores_BGRTS / options.softcap).tanh()
        scores_BGRTS, slope = options.softcap * tanh_BGRTS, scale * (1 - tanh_BGRTS.square())
    seen_BTS = mask.dense(B, T, S, q_BTGRC.device)
    return scores_BGRTS.masked_fill(~seen_BTS[:, None, None], float("-inf")), slope


def _weights(scores_BGRTS: Tensor, lse_BGRT: Tensor) -> Tensor:
    """exp(score - log-sum-exp), 0 where a query sees nothing."""
    is_empty_BGRT = lse_BGRT == float("-inf")
    return (scores_BGRTS - lse_BGRT.masked_fill(is_empty_BGRT, 0.0)[..., None]).exp()
