"""Turning heads by position: the tables of cos and sin, made once for each rotation that layers do not share."""

from typing import Any

import torch
from torch import Tensor

from context.frequencies import frequencies
from context.rotary import AnyRotary, LayerView, RotarySpec, by_view


class Rotary:
    """Turns positions into a rotation of heads. Scaling is on because the spec says so, never because of a length."""

    def __init__(self, spec: RotarySpec, channels: int) -> None:
        self.spec = spec
        self.frequencies, self.attention_factor = frequencies(spec, channels)

    def at(self, positions_BT: Tensor) -> "Rotation":
        """The rotation for tokens at these positions; computed once, then used by every layer."""
        if self.spec.kind == "none":
            return Rotation(positions_BT, None, None)
        # fp64: at position 100,000 an fp32 angle is already off by a hundredth of a radian.
        angles_BTP = positions_BT[..., None].double() * self.frequencies.to(positions_BT.device).double()
        cos, sin = (table.mul_(self.attention_factor).float() for table in (angles_BTP.cos(), angles_BTP.sin()))
        return Rotation(positions_BT, cos[:, :, None], sin[:, :, None], self.attention_factor)


class LayerRotary:
    """What the layers of a model are turned by. Kinds of layer with equal specs share tables, others share nothing."""

    def __init__(self, spec: AnyRotary, channels: int) -> None:
        self.spec = spec
        # A spec as the key, whole: two that differ in anything must never meet in one table.
        made: dict[RotarySpec, Rotary] = {}
        self._rotary = {view: made.setdefault(one, Rotary(one, channels)) for view, one in by_view(spec).items()}

    def at(self, positions_BT: Tensor) -> "dict[LayerView, Rotation]":
        """The rotation of each kind of layer for tokens at these positions."""
        rotations = {rotary: rotary.at(positions_BT) for rotary in dict.fromkeys(self._rotary.values())}
        return {view: rotations[rotary] for view, rotary in self._rotary.items()}


class Rotation:
    """Turns each head's pairs of channels: first half with second half. fp32 inside, the input's dtype outside."""

    def __init__(
        self,
        positions_BT: Tensor,
        cos_BT1P: Tensor | None,
        sin_BT1P: Tensor | None,
        attention_factor: float = 1.0,
    ) -> None:
        """attention_factor: what cos and sin are multiplied with, for who scales what is not turned as well."""
        self.positions_BT = positions_BT
        self.cos_BT1P = cos_BT1P
        self.sin_BT1P = sin_BT1P
        self.attention_factor = attention_factor

    def __call__(self, x_BTHC: Tensor) -> Tensor:
        """(B, T, H, C) to the same shape and dtype; channels behind the first 2P stay as they are."""
        if self.cos_BT1P is None:
            return x_BTHC
        return Turn.apply(x_BTHC, self.cos_BT1P, self.sin_BT1P)


class Turn(torch.autograd.Function):
    """Turn pairs; the gradient is turned back by the same tables, so nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, x_BTHC: Tensor, cos_BT1P: Tensor, sin_BT1P: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BT1P, sin_BT1P)
        return turn(x_BTHC, cos_BT1P, sin_BT1P)

    @staticmethod
    def backward(ctx: Any, grad_BTHC: Tensor) -> tuple[Tensor, None, None]:
        cos_BT1P, sin_BT1P = ctx.saved_tensors
        return turn(grad_BTHC, cos_BT1P, -sin_BT1P), None, None


def turn(x_BTHC: Tensor, cos_BT1P: Tensor, sin_BT1P: Tensor) -> Tensor:
    """(first, second, rest) -> (first cos - second sin, second cos + first sin, rest)."""
    x, pairs = x_BTHC.float(), cos_BT1P.shape[-1]
    # Written part by part into its place: four times faster on CPUs than joining them.
    turned = torch.empty_like(x)
    first, second, rest = x.tensor_split((pairs, 2 * pairs), dim=-1)
    to_first, to_second, to_rest = turned.tensor_split((pairs, 2 * pairs), dim=-1)
    to_first.copy_(first).mul_(cos_BT1P).addcmul_(second, sin_BT1P, value=-1)
    to_second.copy_(second).mul_(cos_BT1P).addcmul_(first, sin_BT1P)
    to_rest.copy_(rest)
    return turned.to(x_BTHC.dtype)
