"""The plain backend: every score in memory, softmax in fp32. Slow, plainly right; the others are held to it."""

import torch
from torch import Tensor

from attention.contract import Capability
from attention.mask import Mask


class Reference:
    """Softmax attention as it is written on paper."""

    name = "reference"
    capability = Capability(
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        lse_devices=("cpu", "cuda"),
        window=True,
        documents=True,
        unequal_lengths=True,
        trainable=True,
    )

    def unavailable(self) -> str | None:
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
        B, T, H, C = q_BTHC.shape
        S, G = k_BSGC.shape[1:3]
        dtype = torch.promote_types(q_BTHC.dtype, torch.float32)
        q_BTGRC = q_BTHC.to(dtype).unflatten(2, (G, H // G))
        scores_BGRTS = torch.einsum("btgrc,bsgc->bgrts", q_BTGRC, k_BSGC.to(dtype)) * (
            C**-0.5 if scale is None else scale
        )
        seen_BTS = mask.dense(B, T, S, q_BTHC.device)
        scores_BGRTS = scores_BGRTS.masked_fill(~seen_BTS[:, None, None], float("-inf"))
        # A finite maximum even where nothing is seen: -inf minus -inf would be NaN there.
        peak_BGRT1 = scores_BGRTS.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
        weights_BGRTS = (scores_BGRTS - peak_BGRT1).exp()
        sum_BGRT1 = weights_BGRTS.sum(-1, keepdim=True)
        weights_BGRTS = weights_BGRTS / sum_BGRT1.masked_fill(sum_BGRT1 == 0, 1.0)
        out_BTGRC = torch.einsum("bgrts,bsgc->btgrc", weights_BGRTS, v_BSGC.to(dtype))
        lse_BHT = (peak_BGRT1 + sum_BGRT1.log()).squeeze(-1).flatten(1, 2).detach() if needs_lse else None
        return out_BTGRC.flatten(2, 3).to(q_BTHC.dtype), lse_BHT
