"""The dense feed-forward layer: SwiGLU (Shazeer 2020) with gate and up in one matrix."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.loss import product_dtype

BLOCK_ROWS = 1024
"""Tokens that the CPU takes through the whole layer at once: what lies between the products is then reused memory."""


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)); the rows of `gate_up` are the gate's F, then the up projection's F."""

    def __init__(self, width: int, feed_forward_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * feed_forward_width, bias=False)
        self.down = nn.Linear(feed_forward_width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        if x_BTD.device.type != "cpu":
            return self.down(SwiGLU.apply(self.gate_up(x_BTD)))
        dtype = product_dtype(x_BTD)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1]).to(dtype)
        out_ND = BlockedFeedForward.apply(x_ND, self.gate_up.weight.to(dtype), self.down.weight.to(dtype))
        return out_ND.view(x_BTD.shape)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of (..., 2F), keeping only its input: silu is cheaper to repeat than to store."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad_gate_up = torch.empty_like(gate_up)
        _swiglu_backward(grad, gate_up, torch.empty_like(grad), grad_gate_up)
        return grad_gate_up


class BlockedFeedForward(torch.autograd.Function):
    """The whole layer on (N, D), block by block; keeps x and the pre-activations, not what SwiGLU makes of them."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_up_JD: Tensor, down_DF: Tensor) -> Tensor:
        out_ND = torch.empty_like(x_ND)
        h_space = x_ND.new_empty(min(BLOCK_ROWS, len(x_ND)), down_DF.shape[1])
        # One tensor a block: allocators take a single large one from the system, and give it back, at every step.
        kept = []
        for x, out in _blocks(x_ND, out_ND):
            z = x @ gate_up_JD.T
            gate, up = z.chunk(2, dim=-1)
            h = torch.ops.aten.silu.out(gate, out=h_space[: len(x)]).mul_(up)
            torch.mm(h, down_DF.T, out=out)
            kept.append(z)
        ctx.save_for_backward(x_ND, gate_up_JD, down_DF, *kept)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, ...]:
        x_ND, gate_up_JD, down_DF, *kept = ctx.saved_tensors
        grads = tuple(map(torch.zeros_like, (x_ND, gate_up_JD, down_DF)))
        grad_x_ND, grad_gate_up_JD, grad_down_DF = grads
        rows, hidden = min(BLOCK_ROWS, len(x_ND)), down_DF.shape[1]
        h_space, dh_space, dz_space = (x_ND.new_empty(rows, size) for size in (hidden, hidden, 2 * hidden))
        for z, (x, grad, grad_x) in zip(kept, _blocks(x_ND, grad_ND, grad_x_ND), strict=True):
            h, dh, dz = (space[: len(x)] for space in (h_space, dh_space, dz_space))
            torch.mm(grad, down_DF, out=dh)
            _swiglu_backward(dh, z, h, dz)
            # addmm with out, not addmm_: torch's operation counter does not know the latter.
            torch.addmm(grad_down_DF, grad.T, h, out=grad_down_DF)
            torch.addmm(grad_gate_up_JD, dz.T, x, out=grad_gate_up_JD)
            torch.mm(dz, gate_up_JD, out=grad_x)
        return grads


def _blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same BLOCK_ROWS rows of every tensor at a time."""
    return zip(*(tensor.split(BLOCK_ROWS) for tensor in tensors), strict=True) if len(tensors[0]) else ()


def _swiglu_backward(grad: Tensor, gate_up: Tensor, h: Tensor, grad_gate_up: Tensor) -> None:
    """Write the gradient of SwiGLU's input into `grad_gate_up` and its output, computed again, into `h`."""
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    silu = torch.ops.aten.silu.out(gate, out=h)
    torch.mul(grad, silu, out=grad_up)
    torch.mul(grad, up, out=grad_gate)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    silu.mul_(up)
