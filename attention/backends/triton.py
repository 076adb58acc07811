"""The backend of our own kernels: for what the libraries leave out, with answers and gradients in fp32 on request.

Any mask, a softcap, values of another width than keys, gradients of the log-sum-exp, and gradients that come out the
same every time. Documents and tiles cost no more than their area.
"""

import torch
from torch import Tensor

from attention.contract import Capability, Options
from attention.kernels import why_not
from attention.mask import Mask


class Triton:
    """Our Triton kernels: NVIDIA GPUs of compute capability 8.0 or newer."""

    name = "triton"
    capability = Capability(devices=("cuda",), dtypes=(torch.bfloat16, torch.float16, torch.float32), max_channels=256)

    def unavailable(self) -> str | None:
        return why_not()

    def forward(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options
    ) -> tuple[Tensor, Tensor]:
        from attention.kernels import launch

        return launch.forward(q_BTHC, k_BSGC, v_BSGE, mask, options)

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
        from attention.kernels import launch

        return launch.backward(grad_BTHE, q_BTHC, k_BSGC, v_BSGE, out_BTHE, lse_BHT, mask, options, grad_lse_BHT)
