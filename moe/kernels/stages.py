"""The steps of grouped experts (moe.grouped.Stages) on Triton kernels: around torch's products, or all the way.

Rows past plan.offsets_E[-1] are never read into a result; gradients of their gates are zero. Either object serves one
forward and backward pass.
"""

import torch
from torch import Tensor

from moe.dispatch import Plan
from moe.grouped import TorchStages, grouped_product, grouped_weight_grad
from moe.kernels import glue, grouped


def _activate(z_RJ: Tensor, plan: Plan) -> Tensor:
    return glue.swiglu(z_RJ, plan.offsets_E)


def _combine(y_RD: Tensor, gates_NK: Tensor, plan: Plan) -> Tensor:
    return glue.gather_sum(y_RD, plan.places_NK, plan.offsets_E, gates_NK)


def _activate_backward(z_RJ: Tensor, dh_RF: Tensor, gates_R: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    return glue.swiglu_backward(z_RJ, dh_RF, gates_R, plan.offsets_E)


class FusedStages:
    """Torch's grouped matmuls (CUTLASS on Hopper), and one kernel for each step between them.

    Takes fp32, bf16 and fp16 with rows of a multiple of 16 bytes.
    """

    def __init__(self) -> None:
        products = TorchStages(grouped_product, grouped_weight_grad)
        self.up, self.down, self.grad_hidden = products.up, products.down, products.grad_hidden
        self.grad_down, self.grad_gate_up = products.grad_down, products.grad_gate_up

    activate = staticmethod(_activate)
    combine = staticmethod(_combine)
    activate_backward = staticmethod(_activate_backward)

    def grad_input(self, dz_RJ: Tensor, plan: Plan, gate_up: Tensor) -> Tensor:
        """See Stages."""
        return glue.gather_sum(grouped_product(dz_RJ, gate_up, plan.offsets_E), plan.places_NK, plan.offsets_E)


class TritonStages:
    """Every product is our own kernel: rows are gathered on their way in, so no sorted copy of x or of dO exists.

    Takes fp32, bf16 and fp16 of any size, but rows of a multiple of 16 bytes are the fast ones. `grad_dtype` is that of
    the weights' gradients, if not the weights' own.
    """

    def __init__(self, grad_dtype: torch.dtype | None = None) -> None:
        self.grad_dtype = grad_dtype
        self.hidden_RF: Tensor | None = None
        """h, which the forward pass's `up` has at hand, until `activate` asks for it."""
        self.is_backward = False
        """Whether h was asked for, so that `up`, if it comes again, comes from a backward pass that wants z alone."""

    combine = staticmethod(_combine)
    activate_backward = staticmethod(_activate_backward)

    def up(self, x_ND: Tensor, plan: Plan, gate_up: Tensor) -> Tensor:
        """See Stages."""
        z_RJ, self.hidden_RF = grouped.up(
            x_ND, gate_up, plan.offsets_E, plan.tokens_R, with_hidden=not self.is_backward
        )
        return z_RJ

    def activate(self, z_RJ: Tensor, plan: Plan) -> Tensor:
        """See Stages."""
        hidden_RF, self.hidden_RF, self.is_backward = self.hidden_RF, None, True
        return _activate(z_RJ, plan) if hidden_RF is None else hidden_RF

    def down(self, h_RF: Tensor, plan: Plan, down: Tensor) -> Tensor:
        """See Stages."""
        return grouped.product(h_RF, down, plan.offsets_E, transposed=True)

    def grad_hidden(self, grad_ND: Tensor, plan: Plan, down: Tensor) -> Tensor:
        """See Stages."""
        return grouped.product(grad_ND, down, plan.offsets_E, plan.tokens_R)

    def grad_down(self, grad_ND: Tensor, weighted_h_RF: Tensor, plan: Plan, num_experts: int) -> Tensor:
        """See Stages."""
        return self._weight_grad(grad_ND, weighted_h_RF, plan, gathers_first=True)

    def grad_gate_up(self, dz_RJ: Tensor, x_ND: Tensor, plan: Plan, num_experts: int) -> Tensor:
        """See Stages."""
        return self._weight_grad(dz_RJ, x_ND, plan, gathers_first=False)

    def grad_input(self, dz_RJ: Tensor, plan: Plan, gate_up: Tensor) -> Tensor:
        """See Stages."""
        return glue.gather_sum(grouped.product(dz_RJ, gate_up, plan.offsets_E), plan.places_NK, plan.offsets_E)

    def _weight_grad(self, left: Tensor, right: Tensor, plan: Plan, gathers_first: bool) -> Tensor:
        return grouped.weight_grad(
            left, right, plan.offsets_E, plan.tokens_R, gathers_first=gathers_first, dtype=self.grad_dtype
        )
