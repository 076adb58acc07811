"""The memory-efficient attention of torch on CUDA: the fused kernel that takes fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.backends import aten
from attention.backends.fused import Widths
from attention.backends.packed import backward, forward
from attention.contract import Capability, Options
from attention.mask import Mask


class CudaEfficient:
    """The memory-efficient kernel: fp32 too, and drawn masks; every query head wants a key head of its own."""

    widths = Widths(multiple=8)

    def forward(  # noqa: PLR0917 (a product has many factors)
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, bias_TS: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        T, H = q_BTHC.shape[1:3]
        q, k, v = (x.transpose(1, 2) for x in (q_BTHC, aten.repeat_heads(k_BSGC, H), aten.repeat_heads(v_BSGE, H)))
        out, lse, _, _ = aten.ops._scaled_dot_product_efficient_attention(
            q, k, v, aten.spread(bias_TS, q), True, 0.0, is_causal, scale=scale
        )
        return out.transpose(1, 2), lse[:, :, :T]

    def backward(  # noqa: PLR0917
        self,
        grad_BTHE: Tensor,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGE: Tensor,
        out_BTHE: Tensor,
        lse_BHT: Tensor,
        bias_TS: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (T, H), G = q_BTHC.shape[1:3], k_BSGC.shape[2]
        tensors = (grad_BTHE, q_BTHC, aten.repeat_heads(k_BSGC, H), aten.repeat_heads(v_BSGE, H), out_BTHE)
        grad, q, k, v, out = (x.transpose(1, 2) for x in tensors)
        # It reads the log-sum-exp as it writes it: rows of a multiple of 32 queries, those beyond the last +inf.
        lse = F.pad(lse_BHT, (0, -T % 32), value=float("inf")).contiguous()
        wanted = [True, True, True, False]
        dq, dk, dv, _ = aten.ops._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, aten.spread(bias_TS, q), out, lse, *aten.no_dropout(q), 0.0, wanted, is_causal, scale=scale
        )
        return dq.transpose(1, 2), aten.sum_heads(dk.transpose(1, 2), G), aten.sum_heads(dv.transpose(1, 2), G)


class Efficient:
    """torch's memory-efficient kernel on CUDA, fp32 too."""

    name = "efficient"
    capability = Capability(("cuda",), (torch.float32, *aten.LOW_PRECISION), softcap=False)
    kernel = CudaEfficient()

    def unavailable(self) -> str | None:
        return aten.needs_gpu()

    def forward(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options
    ) -> tuple[Tensor, Tensor]:
        return forward(self.kernel, q_BTHC, k_BSGC, v_BSGE, mask, options)

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
        return backward(self.kernel, *tensors, mask, options, grad_lse_BHT)
