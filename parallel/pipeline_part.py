"""What one rank of a pipeline has of a model: some layers in a row, with what stands before or behind them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attention.mask import Mask
from model.transformer import Transformer
from moe.routing import RoutingStats, TokenFacts
from parallel.later import Later


def layers_of(part: int, parts: int, num_layers: int) -> range:
    """Which layers a part has: as many as the others, or one more in the first ones, as the last has the head."""
    few, more = divmod(num_layers, parts)
    start = part * few + min(part, more)
    return range(start, start + few + (part < more))


class Elsewhere(nn.Module):
    """Stands where a layer would be that another rank has, so that layers keep their numbers."""


class Part(nn.Module):
    """Some layers in a row, the first of all parts with the embedding and the last with norm and head.

    Its modules are the model's own, under the names that they have there.
    """

    model: Transformer
    """Whose modules these are."""

    def __init__(self, model: Transformer, index: int, parts: int) -> None:
        super().__init__()
        self.index, self.is_first, self.is_last = index, index == 0, index == parts - 1
        self.layers = layers_of(index, parts, model.settings.num_layers)
        # Not registered: a part is no parent of the model, which has other parts too.
        object.__setattr__(self, "model", model)
        self.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in self.layers})
        if self.is_first:
            self.embedding = model.embedding
        if self.is_last:
            self.norm, self.head = model.norm, model.head
        self.later: Later | None = None
        """Takes the gradients of weights that are to wait, where the schedule can fill its waiting with them."""
        self.visit: Callable[[Part, Tensor | None, int], Tensor] | None = None
        """What is done when a micro-batch comes: (this part, its hidden states or None, its number) to what goes on."""

    @property
    def moe_layers(self) -> slice:
        """Which MoE layers of the model, counted from its first, are here."""
        dense = self.model.settings.num_dense_layers
        if self.model.settings.moe is None:
            return slice(0, 0)
        return slice(max(self.layers.start - dense, 0), max(self.layers.stop - dense, 0))

    def forward(self, x_BTD: Tensor | None = None, *, number: Tensor) -> Tensor:
        """A micro-batch, by its number (1,), in the way of whoever sent it; the last part's loss comes as (1,)."""
        assert self.visit is not None, "only inside Pipeline.both_ways or Pipeline.forward"
        answer = self.visit(self, x_BTD, int(number))
        return torch.stack([answer]) if self.is_last else answer.contiguous()

    def through(
        self, x_BTD: Tensor | None, tokens_BT: Tensor, positions_BT: Tensor, mask: Mask, facts: TokenFacts
    ) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """As the whole model's forward, of this part alone: x_BTD are the part's before, None for the first one."""
        if x_BTD is None:
            x_BTD = self.embedding(tokens_BT)
        x_BTD, routing = self.model.through(self.layers, x_BTD, positions_BT, mask, facts)
        return (self.norm(x_BTD) if self.is_last else x_BTD), routing


class _Attach(torch.autograd.Function):
    """x as it is; the scalar's gradient is 1, whatever becomes of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalar: Tensor) -> Tensor:
        ctx.save_for_backward(scalar)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (scalar,) = ctx.saved_tensors
        return grad, torch.ones_like(scalar)


def attach(x: Tensor, scalar: Tensor) -> Tensor:
    """x, whose backward pass is the scalar's too: a part of the loss that never comes to the last part."""
    return _Attach.apply(x, scalar)
