"""Rotary position: how fast each pair of channels turns, for every way of stretching a trained context.

Of each head's C channels, channel i and channel i + C/2 make a pair that turns by position * frequency_i.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from settings import Refusal, Section

Base = Annotated[float, Field(gt=1)]
Factor = Annotated[float, Field(ge=1)]
Length = Annotated[int, Field(ge=1)]


class DefaultRotary(Section):
    """RoFormer: base^(-2i/C)."""

    kind: Literal["default"] = "default"
    base: Base


class LinearRotary(Section):
    """Position interpolation: every pair turns `factor` times slower."""

    kind: Literal["linear"] = "linear"
    base: Base
    factor: Factor


class NtkRotary(Section):
    """NTK-aware: a larger base that leaves the fastest pair alone and slows the slowest `factor` times."""

    kind: Literal["ntk"] = "ntk"
    base: Base
    factor: Factor


class YarnRotary(Section):
    """YaRN: pairs that turn often within the trained length keep their speed, slow ones are interpolated."""

    kind: Literal["yarn"] = "yarn"
    base: Base
    factor: Factor
    original_length: Length
    """The sequence length the model was trained at, before it is stretched."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Turns within the original length above which a pair is kept."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Turns within the original length below which a pair is slowed by the whole factor."""
    ramp: Literal["index", "rotations"] = "index"
    """Between the two: linear in the pair's index, as published models do, or in its turns, as the paper writes."""
    truncate: bool = True
    """Whether the ends of the index ramp are rounded outwards to whole indices."""
    attention_factor: float | None = Field(default=None, gt=0)
    """Multiplies cos and sin; left out: 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _betas_in_order(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}; were they swapped?")
        return self


class Llama3Rotary(Section):
    """Llama 3.1: as YaRN with the ramp linear in turns, between 1 and 4 of them, and no attention factor."""

    kind: Literal["llama3"] = "llama3"
    base: Base
    factor: Factor
    original_length: Length
    """The sequence length the model was trained at, before it is stretched."""
    low_frequency_factor: float = Field(default=1.0, gt=0)
    high_frequency_factor: float = Field(default=4.0, gt=0)

    @model_validator(mode="after")
    def _factors_in_order(self) -> Self:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if high <= low:
            raise ValueError(
                f"high_frequency_factor={high} must be above low_frequency_factor={low}; were they swapped?"
            )
        return self


class AbfRotary(Section):
    """Adjusted base frequency: the same formula with another, larger base."""

    kind: Literal["abf"] = "abf"
    base: Base


class NoRotary(Section):
    """No rotation at all."""

    kind: Literal["none"] = "none"


RotarySpec = Annotated[
    DefaultRotary | LinearRotary | NtkRotary | YarnRotary | Llama3Rotary | AbfRotary | NoRotary,
    Field(discriminator="kind"),
]


def frequencies(spec: RotarySpec, channels: int) -> tuple[Tensor, float]:
    """Radians per position of each pair, fp32 (C/2,), and the factor on cos and sin. Computed in fp64, rounded once."""
    if channels < 2 or channels % 2:
        raise Refusal(f"rotary position turns pairs of channels: channels={channels} must be even; try {channels + 1}")
    speeds, attention_factor = FREQUENCIES[spec.kind](spec, channels)
    return speeds.float(), attention_factor


def powers(base: float, channels: int) -> Tensor:
    """base^(-2i/C) in fp64."""
    return base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def blend(speeds: Tensor, factor: float, kept: Tensor) -> Tensor:
    """`kept` 1: as trained; 0: slowed by the whole factor."""
    return speeds / factor * (1 - kept) + speeds * kept


def turns(speeds: Tensor, length: int) -> Tensor:
    """How many times each pair turns within `length` tokens."""
    return speeds * length / (2 * math.pi)


def _plain(spec: DefaultRotary | AbfRotary, channels: int) -> tuple[Tensor, float]:
    return powers(spec.base, channels), 1.0


def _linear(spec: LinearRotary, channels: int) -> tuple[Tensor, float]:
    return powers(spec.base, channels) / spec.factor, 1.0


def _ntk(spec: NtkRotary, channels: int) -> tuple[Tensor, float]:
    if channels == 2:
        raise Refusal("rotary kind 'ntk' needs at least 4 channels per head; use 'linear' for 2")
    return powers(spec.base * spec.factor ** (channels / (channels - 2)), channels), 1.0


def _yarn(spec: YarnRotary, channels: int) -> tuple[Tensor, float]:
    speeds = powers(spec.base, channels)
    kept = _kept_by_index(spec, channels) if spec.ramp == "index" else _kept_by_turns(spec, speeds)
    attention_factor = spec.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(spec.factor) + 1.0
    return blend(speeds, spec.factor, kept), attention_factor


def _kept_by_turns(spec: YarnRotary, speeds: Tensor) -> Tensor:
    """Equations 17 to 20 of the YaRN paper."""
    return ((turns(speeds, spec.original_length) - spec.beta_slow) / (spec.beta_fast - spec.beta_slow)).clamp(0, 1)


def _kept_by_index(spec: YarnRotary, channels: int) -> Tensor:
    """The ramp that published models were trained with; it differs from the paper's by up to a third."""
    low, high = yarn_range(spec, channels)
    ramp = (torch.arange(channels // 2, dtype=torch.float64) - low) / (high - low)
    return 1 - ramp.clamp(0, 1)


def yarn_range(spec: YarnRotary, channels: int) -> tuple[float, float]:
    """The pair indices between which the index ramp falls: where a pair turns beta_fast and beta_slow times."""
    low, high = (
        channels * math.log(spec.original_length / (2 * math.pi * beta)) / (2 * math.log(spec.base))
        for beta in (spec.beta_fast, spec.beta_slow)
    )
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    # Clamped at channels - 1, not at the last pair: models are trained so, and the slope depends on it.
    low, high = max(low, 0), min(high, channels - 1)
    return low, high + 0.001 if low == high else high


def _llama3(spec: Llama3Rotary, channels: int) -> tuple[Tensor, float]:
    speeds = powers(spec.base, channels)
    low, high = spec.low_frequency_factor, spec.high_frequency_factor
    kept = ((turns(speeds, spec.original_length) - low) / (high - low)).clamp(0, 1)
    return blend(speeds, spec.factor, kept), 1.0


def _none(spec: NoRotary, channels: int) -> tuple[Tensor, float]:
    return torch.zeros(channels // 2, dtype=torch.float64), 1.0


FREQUENCIES: dict[str, Callable[[Any, int], tuple[Tensor, float]]] = {
    "default": _plain,
    "linear": _linear,
    "ntk": _ntk,
    "yarn": _yarn,
    "llama3": _llama3,
    "abf": _plain,
    "none": _none,
}


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
        """(B, T, H, C) to the same shape and dtype."""
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
    """(first, second) -> (first cos - second sin, second cos + first sin)."""
    x = x_BTHC.float()
    # Written half by half into its place: four times faster on CPUs than joining two halves.
    turned = torch.empty_like(x)
    (first, second), (to_first, to_second) = x.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    to_first.copy_(first).mul_(cos_BT1P).addcmul_(second, sin_BT1P, value=-1)
    to_second.copy_(second).mul_(cos_BT1P).addcmul_(first, sin_BT1P)
    return turned.to(x_BTHC.dtype)
