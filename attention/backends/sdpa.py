"""The backend that needs torch alone: the fused kernels under its scaled_dot_product_attention."""

import torch
from torch import Tensor

from attention.backends import aten
from attention.backends.efficient import CudaEfficient
from attention.backends.fused import Widths
from attention.backends.packed import FusedKernel, backward, forward
from attention.backends.rows import Kernel
from attention.contract import Capability, Options
from attention.mask import Mask
from settings import Refusal

FLASH_CHANNELS = 256
"""The widest head that the flash kernel on CUDA takes."""


class CpuFlash:
    """The flash kernel for CPUs.

    Of its traps (torch 2.11 to 2.13) none is met through `rows.py`: it ends the process over no queries or no
    keys, puts a causal mask top-left, and says log-sum-exp 0 of a query that sees nothing.
    """

    widths = Widths(are_equal=True)

    def forward(  # noqa: PLR0917 (a product has many factors)
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, bias_TS: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BSGC, v_BSGC))
        out, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=bias_TS, scale=scale
        )
        return out.transpose(1, 2), lse_BHT

    def backward(  # noqa: PLR0917
        self,
        grad_BTHC: Tensor,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGC: Tensor,
        out_BTHC: Tensor,
        lse_BHT: Tensor,
        bias_TS: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_BTHC, q_BTHC, k_BSGC, v_BSGC, out_BTHC))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse_BHT, 0.0, is_causal, attn_mask=bias_TS, scale=scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class CudaFlash:
    """FlashAttention 2 as it is built into torch: bf16 and fp16, no drawn masks."""

    widths = Widths(are_equal=True, multiple=8)

    def forward(  # noqa: PLR0917 (a product has many factors)
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, bias_TS: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert bias_TS is None
        T, S = q_BTHC.shape[1], k_BSGC.shape[1]
        out_BTHC, lse_BHT, *_ = aten.ops._flash_attention_forward(
            q_BTHC, k_BSGC, v_BSGC, None, None, T, S, 0.0, is_causal, False, scale=scale
        )
        return out_BTHC, lse_BHT

    def backward(  # noqa: PLR0917
        self,
        grad_BTHC: Tensor,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGC: Tensor,
        out_BTHC: Tensor,
        lse_BHT: Tensor,
        bias_TS: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert bias_TS is None
        T, S = q_BTHC.shape[1], k_BSGC.shape[1]
        tensors = (grad_BTHC, q_BTHC, k_BSGC, v_BSGC, out_BTHC, lse_BHT.contiguous())
        return aten.ops._flash_attention_backward(
            *tensors, None, None, T, S, 0.0, is_causal, *aten.no_dropout(q_BTHC), scale=scale
        )


class CudaSdpa:
    """Flash where it can, the memory-efficient kernel for fp32 and drawn masks."""

    widths = Widths(are_equal=True, multiple=8)
    flash, efficient = CudaFlash(), CudaEfficient()

    def forward(  # noqa: PLR0917
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, bias_TS: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        return self._kernel(q_BTHC, bias_TS).forward(q_BTHC, k_BSGC, v_BSGC, bias_TS, is_causal, scale)

    def backward(  # noqa: PLR0917
        self,
        grad_BTHC: Tensor,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGC: Tensor,
        out_BTHC: Tensor,
        lse_BHT: Tensor,
        bias_TS: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (grad_BTHC, q_BTHC, k_BSGC, v_BSGC, out_BTHC, lse_BHT)
        return self._kernel(q_BTHC, bias_TS).backward(*tensors, bias_TS, is_causal, scale)

    def _kernel(self, q_BTHC: Tensor, bias_TS: Tensor | None) -> Kernel:
        if q_BTHC.dtype == torch.float64:
            raise Refusal("attention.backend='sdpa' takes no float64 on CUDA; use backend = \"blockwise\" or float32")
        has_flash = bias_TS is None and q_BTHC.dtype in aten.LOW_PRECISION and q_BTHC.shape[-1] <= FLASH_CHANNELS
        return self.flash if has_flash else self.efficient


class Sdpa:
    """torch's fused attention: flash on CPUs, flash or the memory-efficient kernel on CUDA."""

    name = "sdpa"
    capability = Capability(("cpu", "cuda"), (torch.float32, torch.float64, *aten.LOW_PRECISION), softcap=False)

    def __init__(self) -> None:
        self._kernels: dict[str, FusedKernel] = {"cpu": CpuFlash(), "cuda": CudaSdpa()}

    def unavailable(self) -> str | None:
        if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return f"torch {torch.__version__} has no CPU flash kernel; install torch 2.11 to 2.13"
        return None

    def forward(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options
    ) -> tuple[Tensor, Tensor]:
        return forward(self._kernels[q_BTHC.device.type], q_BTHC, k_BSGC, v_BSGE, mask, options)

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
        return backward(self._kernels[q_BTHC.device.type], *tensors, mask, options, grad_lse_BHT)
