"""Root-mean-square normalisation with fp32 statistics (Zhang and Sennrich 2019)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 (fp64 for fp64) and returned in x's dtype."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x_ND: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        if x_ND.device.type == "cpu":
            return FusedRMSNorm.apply(x_ND, self.weight, self.epsilon)
        return F.rms_norm(x_ND, x_ND.shape[-1:], self.weight, self.epsilon).to(x_ND.dtype)


class FusedRMSNorm(torch.autograd.Function):
    """The norm as one node that keeps only its input and one number a row: torch has a fused kernel on GPUs alone."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        x = _at_least_fp32(x_ND)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_ND, inverse_rms, weight_D)
        return torch.mul(x, inverse_rms).mul_(weight_D).to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, inverse_rms, weight_D = ctx.saved_tensors
        width = x_ND.shape[-1]
        x, grad, scale = (_at_least_fp32(t).reshape(-1, t.shape[-1]) for t in (x_ND, grad_ND, inverse_rms))
        weight = weight_D.to(x.dtype)
        products = grad * x
        # d/dx of x_i w_i / rms: the second term is what the rms itself moves.
        along_x = (products @ weight).unsqueeze(-1).mul_(scale.pow(3)).div_(-width)
        # .sum adds in pairs; a matrix-vector product would lose a digit over thousands of tokens.
        grad_weight = products.mul_(scale).sum(dim=0)
        grad_x = torch.mul(grad, weight, out=products).mul_(scale).addcmul_(x, along_x)
        return grad_x.view_as(x_ND).to(x_ND.dtype), grad_weight.to(weight_D.dtype), None


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
