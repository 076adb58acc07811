"""Muon for matrices that lie on several ranks: the update is made whole, and each rank keeps its part of the answer.

Orthogonalising the parts of a matrix one by one would be another optimizer. Momentum is kept in parts, and all that a
rank ever has whole is one matrix at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class MuonOverRanks(torch.optim.Muon):
    """torch's Muon, its state included: each update is gathered, orthogonalised by torch's own step, and cut again."""

    def __init__(
        self,
        params: Any,
        gather: Callable[[nn.Parameter, Tensor], Tensor],
        take: Callable[[nn.Parameter, Tensor], Tensor],
        **options: Any,
    ) -> None:
        """gather: this rank's part of something of a parameter's shape, to the whole of it; take: the reverse."""
        super().__init__(params, **options)
        self._gather, self._take = gather, take

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, so no loss
        """One step of every matrix that has a gradient; all ranks take them in the same order."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)

    def _step_one(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        whole = nn.Parameter(torch.zeros_like(gathered := self._gather(parameter, update)))
        whole.grad = gathered
        options = {key: group[key] for key in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        torch.optim.Muon([whole], weight_decay=0.0, momentum=0.0, nesterov=False, **options).step()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        own.add_(self._take(parameter, whole))
