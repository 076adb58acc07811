"""All experts in one product a step: what the steps are, the one autograd function over them, and torch's own steps."""

# ruff: noqa: PLR0917 (every way to multiply has the signature of ExpertMatmul)

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe.dispatch import Plan, gather_slots, gather_sum, pad_rows
from moe.swiglu import swiglu, swiglu_backward


class Stages(Protocol):
    """The steps of a gated expert layer and of its backward pass, over rows sorted by expert; J is 2F, gate first.

    Rows past `plan.offsets_E[-1]` are nobody's: a step may leave anything in them, and none may let what it finds there
    reach another row, a weight's gradient or a token. No step waits for the device, but padded ones.
    """

    def up(self, x_ND: Tensor, plan: Plan, gate_up: Tensor) -> Tensor:
        """z (R, J): x[tokens] times gate_up[e]^T."""
        ...

    def activate(self, z_RJ: Tensor, plan: Plan) -> Tensor:
        """h (R, F): silu(gate) * up."""
        ...

    def down(self, h_RF: Tensor, plan: Plan, down: Tensor) -> Tensor:
        """y (R, D): h times down[e]^T."""
        ...

    def combine(self, y_RD: Tensor, gates_NK: Tensor, plan: Plan) -> Tensor:
        """out (N, D): the sum of a token's rows, weighted by its gates, in fp32 and without atomics."""
        ...

    def grad_hidden(self, grad_ND: Tensor, plan: Plan, down: Tensor) -> Tensor:
        """dh (R, F), not yet weighted: grad[tokens] times down[e]."""
        ...

    def activate_backward(
        self, z_RJ: Tensor, dh_RF: Tensor, gates_R: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dz (R, J) of the weighted rows, gate * h (R, F), and the gates' gradient rowsum(dh * h) (R,) in fp32."""
        ...

    def grad_down(self, grad_ND: Tensor, weighted_h_RF: Tensor, plan: Plan, num_experts: int) -> Tensor:
        """(E, D, F): per expert grad[tokens]^T times gate * h."""
        ...

    def grad_gate_up(self, dz_RJ: Tensor, x_ND: Tensor, plan: Plan, num_experts: int) -> Tensor:
        """(E, J, D): per expert dz^T times x[tokens]."""
        ...

    def grad_input(self, dz_RJ: Tensor, plan: Plan, gate_up: Tensor) -> Tensor:
        """dx (N, D): dz times gate_up[e], summed over a token's rows."""
        ...


class Later(Protocol):
    """Takes what makes a parameter's gradient, and makes it when there is time."""

    def add(self, parameter: Tensor, gradient: Callable[[], Tensor]) -> None: ...


class WaitingStages:
    """Stages whose weight gradients are left to be made later: the two answer None, and autograd takes that for it."""

    def __init__(self, stages: Stages, later: Later, gate_up: nn.Parameter, down: nn.Parameter) -> None:
        self.stages, self.later, self.parameters = stages, later, (gate_up, down)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stages, name)

    def grad_down(self, *arguments: Any) -> None:
        """See Stages."""
        self.later.add(self.parameters[1], partial(self.stages.grad_down, *arguments))

    def grad_gate_up(self, *arguments: Any) -> None:
        """See Stages."""
        self.later.add(self.parameters[0], partial(self.stages.grad_gate_up, *arguments))


Wait = Callable[[Stages], Stages]


def at_once(stages: Stages) -> Stages:
    """The stages as they are."""
    return stages


class _Grouped(torch.autograd.Function):
    """Keeps only the tokens and the pre-activations z, and with recompute_up only the tokens.

    Neither y nor h is needed for the gradients: the gates' is rowsum(dh * h), and h follows from z (SonicMoE, arXiv
    2512.14080, section 3).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gates_NK: Tensor,
        gate_up: Tensor,
        down: Tensor,
        plan: Plan,
        stages: Stages,
        recompute_up: bool,
    ) -> Tensor:
        z_RJ = stages.up(x_ND, plan, gate_up)
        ctx.stages, ctx.recompute_up = stages, recompute_up
        ctx.save_for_backward(x_ND, gates_NK, gate_up, down, *plan, *(() if recompute_up else (z_RJ,)))
        h_RF = stages.activate(z_RJ, plan)
        del z_RJ  # these are as large as a layer's activations: none outlives its use
        y_RD = stages.down(h_RF, plan, down)
        del h_RF
        return stages.combine(y_RD, gates_NK, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gates_NK, gate_up, down, *saved = ctx.saved_tensors
        plan, stages, num_experts = Plan(*saved[:4]), ctx.stages, len(down)
        grad_ND = grad_ND.contiguous()  # it may come with a stride of 0, as .sum() sends it; kernels count on rows
        z_RJ = stages.up(x_ND, plan, gate_up) if ctx.recompute_up else saved[4]
        # One more gate, 0, for the filler rows of a padded plan.
        gates_R = F.pad(gates_NK.flatten(), (0, 1))[plan.order_R]
        dh_RF = stages.grad_hidden(grad_ND, plan, down)
        dz_RJ, weighted_h_RF, grad_gates_R = stages.activate_backward(z_RJ, dh_RF, gates_R, plan)
        del dh_RF
        grad_down = stages.grad_down(grad_ND, weighted_h_RF, plan, num_experts)
        del weighted_h_RF
        grad_gate_up = stages.grad_gate_up(dz_RJ, x_ND, plan, num_experts)
        grad_gates_NK = gather_slots(grad_gates_R, plan).to(gates_NK.dtype)
        dx_ND = stages.grad_input(dz_RJ, plan, gate_up)
        return dx_ND, grad_gates_NK, grad_gate_up, grad_down, None, None, None


class TorchStages:
    """Torch's own operators, on a product and a weight gradient over all experts; for one forward and backward pass."""

    def __init__(
        self,
        product: Callable[[Tensor, Tensor, Tensor], Tensor],
        weight_grad: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        """product: rows (R, A), weights (E, A, B), offsets to rows (R, B); weight_grad: (R, A), (R, B) to (E, A, B)."""
        self.product, self.weight_grad = product, weight_grad
        self.grad_RD: Tensor | None = None
        """The gathered gradient, from grad_hidden to grad_down: to gather it twice costs a pass over memory."""

    def up(self, x_ND: Tensor, plan: Plan, gate_up: Tensor) -> Tensor:
        """See Stages."""
        return self.product(x_ND.index_select(0, plan.tokens_R), gate_up.transpose(1, 2), plan.offsets_E)

    def activate(self, z_RJ: Tensor, plan: Plan) -> Tensor:
        """See Stages."""
        return swiglu(z_RJ)

    def down(self, h_RF: Tensor, plan: Plan, down: Tensor) -> Tensor:
        """See Stages."""
        return self.product(h_RF, down.transpose(1, 2), plan.offsets_E)

    def combine(self, y_RD: Tensor, gates_NK: Tensor, plan: Plan) -> Tensor:
        """See Stages."""
        return gather_sum(y_RD, plan, gates_NK)

    def grad_hidden(self, grad_ND: Tensor, plan: Plan, down: Tensor) -> Tensor:
        """See Stages."""
        self.grad_RD = grad_ND.index_select(0, plan.tokens_R)
        return self.product(self.grad_RD, down, plan.offsets_E)

    def activate_backward(
        self, z_RJ: Tensor, dh_RF: Tensor, gates_R: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Stages; overwrites dh."""
        return swiglu_backward(z_RJ, dh_RF, gates_R)

    def grad_down(self, grad_ND: Tensor, weighted_h_RF: Tensor, plan: Plan, num_experts: int) -> Tensor:
        """See Stages."""
        assert self.grad_RD is not None
        grad_RD, self.grad_RD = self.grad_RD, None
        return self.weight_grad(grad_RD, weighted_h_RF, plan.offsets_E)

    def grad_gate_up(self, dz_RJ: Tensor, x_ND: Tensor, plan: Plan, num_experts: int) -> Tensor:
        """See Stages."""
        return self.weight_grad(dz_RJ, x_ND.index_select(0, plan.tokens_R), plan.offsets_E)

    def grad_input(self, dz_RJ: Tensor, plan: Plan, gate_up: Tensor) -> Tensor:
        """See Stages."""
        return gather_sum(self.product(dz_RJ, gate_up, plan.offsets_E), plan)


def grouped_product(rows_RA: Tensor, weights_EAB: Tensor, offsets_E: Tensor) -> Tensor:
    """Each row times its expert's weights, (R, B); rows past the last offset are left as they were allocated."""
    if not len(rows_RA):
        return rows_RA.new_empty(0, weights_EAB.shape[2])
    return F.grouped_mm(rows_RA, weights_EAB, offs=offsets_E)


def grouped_weight_grad(left_RA: Tensor, right_RB: Tensor, offsets_E: Tensor) -> Tensor:
    """Per expert left^T times right, (E, A, B)."""
    if not len(left_RA):
        return left_RA.new_zeros(len(offsets_E), left_RA.shape[1], right_RB.shape[1])
    grad_EAB = F.grouped_mm(left_RA.t(), right_RB, offs=offsets_E)
    if leaves_empty_groups(grad_EAB.device):
        is_empty_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)) == 0
        grad_EAB.masked_fill_(is_empty_E[:, None, None], 0)
    return grad_EAB


@functools.cache
def leaves_empty_groups(device: torch.device) -> bool:
    """Whether torch leaves an empty expert's weight gradient uninitialised: so on GPUs after Hopper (torch #172439)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) > (9, 0)


def padded_product(rows_RA: Tensor, weights_EAB: Tensor, offsets_E: Tensor) -> Tensor:
    """Each row of a padded plan times its expert's weights, (R, B)."""
    return torch.bmm(rows_RA.view(len(offsets_E), -1, rows_RA.shape[1]), weights_EAB).flatten(0, 1)


def padded_weight_grad(left_RA: Tensor, right_RB: Tensor, offsets_E: Tensor) -> Tensor:
    """Per expert left^T times right over the rows of a padded plan, (E, A, B)."""
    left, right = (side.view(len(offsets_E), -1, side.shape[1]) for side in (left_RA, right_RB))
    return torch.bmm(left.transpose(1, 2), right)


def grouped_mm(
    x_ND: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor, plan: Plan, recompute_up: bool, wait: Wait = at_once
) -> Tensor:
    """All experts in one torch grouped matmul a step; on CUDA in bf16 it never waits for the device."""
    stages = wait(TorchStages(grouped_product, grouped_weight_grad))
    return _Grouped.apply(x_ND, gates_NK, gate_up, down, plan, stages, recompute_up)


def bmm(
    x_ND: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor, plan: Plan, recompute_up: bool, wait: Wait = at_once
) -> Tensor:
    """Every expert's rows filled up to as many as the busiest has, then batched matmuls: for even loads on CPUs."""
    stages = wait(TorchStages(padded_product, padded_weight_grad))
    return _Grouped.apply(x_ND, gates_NK, gate_up, down, pad_rows(plan), stages, recompute_up)


def fused(
    x_ND: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor, plan: Plan, recompute_up: bool, wait: Wait = at_once
) -> Tensor:
    """Torch's grouped matmuls, and one Triton kernel for each step between them."""
    from moe.kernels.stages import FusedStages

    return _Grouped.apply(x_ND, gates_NK, gate_up, down, plan, wait(FusedStages()), recompute_up)


def triton(
    x_ND: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor, plan: Plan, recompute_up: bool, wait: Wait = at_once
) -> Tensor:
    """Triton kernels for every step, products included."""
    from moe.kernels.stages import TritonStages

    return _Grouped.apply(x_ND, gates_NK, gate_up, down, plan, wait(TritonStages()), recompute_up)


CAN_WAIT: dict[str, Callable[..., Tensor]] = {"bmm": bmm, "grouped_mm": grouped_mm, "fused": fused, "triton": triton}
"""The ways that can leave weight gradients for later."""
