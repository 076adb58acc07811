"""cuDNN's attention, by torch's operators."""

from torch import Tensor

from attention.backends import aten
from attention.backends.fused import Widths
from attention.backends.packed import backward, forward
from attention.contract import Capability, Options
from attention.mask import Mask


class CudaCudnn:
    """cuDNN's kernel: bf16 and fp16, drawn masks, fewer key heads."""

    widths = Widths(multiple=8)

    def __init__(self) -> None:
        # Whether the log-sum-exp has a last dimension of 1 has changed between versions of torch.
        self._lse_ndim = 4

    def forward(  # noqa: PLR0917 (a product has many factors)
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, bias_TS: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BSGC, v_BSGE))
        out, lse, *_ = aten.ops._scaled_dot_product_cudnn_attention(
            q, k, v, aten.spread(bias_TS, q), True, 0.0, is_causal, False, scale=scale
        )
        self._lse_ndim = lse.ndim
        return out.transpose(1, 2), lse.view(q.shape[:3])

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
        grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_BTHE, q_BTHC, k_BSGC, v_BSGE, out_BTHE))
        lse = lse_BHT.contiguous().view(*q.shape[:3], *[1] * (self._lse_ndim - 3))
        T, S = q.shape[2], k.shape[2]
        dq, dk, dv = aten.ops._scaled_dot_product_cudnn_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            *aten.no_dropout(q),
            aten.spread(bias_TS, q),
            None,
            None,
            T,
            S,
            0.0,
            is_causal,
            scale=scale,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class Cudnn:
    """cuDNN's kernel as torch calls it."""

    name = "cudnn"
    capability = Capability(
        # As many channels as every GPU with the kernel takes.
        ("cuda",),
        aten.LOW_PRECISION,
        softcap=False,
        partial=False,
        max_channels=128,
        deterministic=False,
    )
    kernel = CudaCudnn()

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
