"""The gated activation of experts, and its way back for rows that count with a weight."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(z_RJ: Tensor) -> Tensor:
    """h = silu(gate) * up, (R, F), of pre-activations (R, 2F), gate first."""
    gate, up = z_RJ.chunk(2, dim=1)
    return F.silu(gate).mul_(up)


def swiglu_backward(z_RJ: Tensor, dh_RF: Tensor, gates_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of a row's answer, brought back to its h but not yet weighted by its gate; overwrites dh.

    Returns the gradient of z for the weighted row, gate * h, and the gate's own gradient, rowsum(dh * h), in fp32 or
    better: neither h nor the answers have to be kept for it (SonicMoE, arXiv 2512.14080, section 3).
    """
    gate, up = z_RJ.chunk(2, dim=1)
    dz_RJ = torch.empty_like(z_RJ)
    grad_gate, grad_up = dz_RJ.chunk(2, dim=1)
    silu_RF = F.silu(gate)
    h_RF = silu_RF * up
    grad_gates_R = (dh_RF * h_RF).sum(dim=1, dtype=torch.promote_types(h_RF.dtype, torch.float32))
    torch.mul(dh_RF.mul_(gates_R[:, None]), silu_RF, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(dh_RF.mul_(up), gate, grad_input=grad_gate)
    return dz_RJ, h_RF.mul_(gates_R[:, None]), grad_gates_R
