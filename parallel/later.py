"""Weight gradients that wait: the input's gradient goes on to the rank before, the weight's is made when there is time.

Zero-bubble schedules (Qi et al. 2023, arXiv 2401.10241) cut the backward pass in two. torch would cut it by going
through autograd's graph twice, which runs what makes both gradients at once, and sends tokens to ranks, two times. Here
the graph is gone through once, and layers leave the products that make weights' gradients behind.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule

from model.loss import product_dtype
from moe.experts import Experts


class Later:
    """What a part's backward passes have left to do."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def add(self, parameter: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Let a parameter's gradient be made, and added to what it has, when its time comes."""

        def make() -> None:
            made = gradient().to(parameter.dtype)
            parameter.grad = made if parameter.grad is None else parameter.grad.add_(made)

        self._waiting.append(make)

    def take(self) -> Callable[[], None]:
        """What has come together since it was last taken, as one thing to do."""
        waiting, self._waiting = self._waiting, []

        @torch.no_grad()
        def do() -> None:
            while waiting:
                waiting.pop(0)()

        return do


def leave_weights(module: nn.Module, later: Later) -> None:
    """Let the linear layers and experts inside leave their weights' gradients to `later`.

    All other parameters, and experts whose way to multiply makes both gradients at once, get theirs as before.
    """
    for each in module.modules():
        if isinstance(each, nn.Linear) and each.bias is None:
            each.forward = partial(_linear, each, later)
        elif isinstance(each, Experts):
            each.later = later


def add_up_in_full(module: nn.Module) -> None:
    """Move gradients that were made outside autograd to where FSDP adds them up, in the precision that it sums in.

    It does so itself behind each backward pass; what is made after the last one would be left in the weights' own.
    """
    for each in module.modules():
        if isinstance(each, FSDPModule):
            state: Any = each._get_fsdp_state()
            # One group a module until torch 2.12, where it may have several.
            groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            for parameter in (parameter for group in groups if group for parameter in group.fsdp_params):
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


def _linear(layer: nn.Linear, later: Later, x: Tensor) -> Tensor:
    """As the layer's own forward."""
    if not torch.is_grad_enabled():
        return F.linear(x, layer.weight)
    dtype = product_dtype(x)
    return _Linear.apply(x.to(dtype), layer.weight.to(dtype), partial(later.add, layer.weight))


class _Linear(torch.autograd.Function):
    """x times a weight, whose gradient is left for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_JD: Tensor, leave: Callable[[Callable[[], Tensor]], None]) -> Tensor:
        ctx.save_for_backward(x, weight_JD)
        ctx.leave = leave
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight_JD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight_JD = ctx.saved_tensors
        ctx.leave(lambda: grad.flatten(0, -2).T @ x.flatten(0, -2))
        return grad @ weight_JD, None, None
