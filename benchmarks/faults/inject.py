"""Faults of arithmetic: a gradient that is spoiled, weights that jump; brought in from outside by torch's hooks.

Each function returns what a rank of a warm life does before it runs train.py (`Start.prepare`).
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


def spoiled_gradient(step: int, factor: float, microbatches: int, rank: int = 0) -> Callable[[], None]:
    """On one rank, the gradient of the first parameter times a factor, in the first backward pass of `step`.

    step: 2 or later. microbatches: how many each rank has in a step. The gradient is hit where autograd has it, before
    ranks add up.
    """

    def prepare() -> None:
        calls = 0

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return gradient * factor if calls == (step - 2) * microbatches + 1 else gradient

        if int(os.environ.get("RANK", "0")) == rank:
            _once_at(1, lambda parameters: parameters[0].register_hook(spoil))

    return prepare


def turned_weights(step: int) -> Callable[[], None]:
    """After `step`, every matrix is turned around and far too large, on all ranks: so is the next loss."""

    def turn(parameters: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter in parameters:
                if parameter.ndim > 1:
                    parameter.mul_(-20.0)

    return lambda: _once_at(step, turn)


def _once_at(step: int, act: Callable[[list[torch.Tensor]], Any]) -> None:
    """Do something with all parameters, once, right after the run's one optimizer has made its `step`-th step."""
    done = 0

    def after(optimizer: Optimizer, *_: object) -> None:
        nonlocal done
        done += 1
        if done == step:
            act([parameter for group in optimizer.param_groups for parameter in group["params"]])

    register_optimizer_step_post_hook(after)
