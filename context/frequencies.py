"""How fast each pair of channels turns: the formula of every kind of rotary position.

Below, C is the number of turned channels of a head and P = C/2 that of its pairs; a formula gives radians per position
in fp64, (P,), and the factor on cos and sin.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from context.rotary import (
    AbfRotary,
    DefaultRotary,
    DynamicRotary,
    LinearRotary,
    Llama3Rotary,
    LongRotary,
    NoRotary,
    NtkRotary,
    ProportionalRotary,
    RotarySpec,
    YarnRotary,
)
from settings import Refusal


def frequencies(spec: RotarySpec, channels: int) -> tuple[Tensor, float]:
    """Radians per position of each pair, fp32 (P,), and the factor on cos and sin. Computed in fp64, rounded once.

    channels: of a head, all of them; with a `share` P is half of the turned ones. Raises Refusal where they do not fit,
    and for numbers so large or small that a frequency or the factor is none.
    """
    turned = turned_channels(spec, channels)
    try:
        speeds_P, attention_factor = FREQUENCIES[spec.kind](spec, turned)
        is_finite = bool(torch.tensor([*speeds_P.tolist(), attention_factor]).isfinite().all())
    except ArithmeticError:
        is_finite = False
    if not is_finite:
        numbers = spec.model_dump(exclude={"kind", "short", "long"}, exclude_defaults=True)
        told = ", ".join(f"{name}={value}" for name, value in numbers.items())
        raise Refusal(f"rotary kind {spec.kind!r} cannot be computed with {told}; use numbers nearer to 1")
    return speeds_P.float(), attention_factor


def turned_channels(spec: RotarySpec, channels: int) -> int:
    """How many of a head's channels, its first ones, are turned."""
    share = getattr(spec, "share", None)
    turned = channels if share is None else int(channels * share)
    if turned < 2 or turned % 2:
        what, way_out = f"channels={channels}", f"try model.attention.channels={channels + 1}"
        if share is not None:
            near = max(2, 2 * round(channels * share / 2))
            what, way_out = f"share={share} of channels={channels}, {turned},", f"try share={near / channels:g}"
        raise Refusal(f"rotary position turns pairs of channels: {what} must be even; {way_out}")
    return turned


def powers(base: float, channels: int) -> Tensor:
    """base^(-2i/C) in fp64."""
    return base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def blend(speeds_P: Tensor, factor: float, kept_P: Tensor) -> Tensor:
    """`kept` 1: as trained; 0: slowed by the whole factor."""
    return speeds_P / factor * (1 - kept_P) + speeds_P * kept_P


def turns(speeds_P: Tensor, length: int) -> Tensor:
    """How many times each pair turns within `length` tokens."""
    return speeds_P * length / (2 * math.pi)


def sharpening(factor: float, mscale: float = 1.0) -> float:
    """YaRN's equation 22, with DeepSeek's coefficient."""
    return 0.1 * mscale * math.log(factor) + 1.0


def _plain(spec: DefaultRotary | AbfRotary, channels: int) -> tuple[Tensor, float]:
    return powers(spec.base, channels), 1.0


def _linear(spec: LinearRotary, channels: int) -> tuple[Tensor, float]:
    return powers(spec.base, channels) / spec.factor, 1.0


def _ntk(spec: NtkRotary, channels: int) -> tuple[Tensor, float]:
    return powers(ntk_base(spec, channels), channels), 1.0


def ntk_base(spec: NtkRotary | DynamicRotary, channels: int) -> float:
    """The base with which the slowest pair turns so many times slower."""
    if channels == 2:
        raise Refusal(f"rotary kind {spec.kind!r} needs at least 4 channels per head; use 'linear' for 2")
    factor = spec.factor
    if isinstance(spec, DynamicRotary):
        factor = factor * max(spec.length, spec.original_length) / spec.original_length - (factor - 1)
    return spec.base * factor ** (channels / (channels - 2))


def _yarn(spec: YarnRotary, channels: int) -> tuple[Tensor, float]:
    speeds_P = powers(spec.base, channels)
    kept_P = _kept_by_index(spec, channels) if spec.ramp == "index" else _kept_by_turns(spec, speeds_P)
    return blend(speeds_P, spec.factor, kept_P), yarn_factor(spec)


def yarn_factor(spec: YarnRotary) -> float:
    """What is on cos and sin: given, DeepSeek's quotient, or the paper's."""
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale is not None and spec.mscale_all_dim is not None:
        return sharpening(spec.factor, spec.mscale) / sharpening(spec.factor, spec.mscale_all_dim)
    return sharpening(spec.factor)


def _kept_by_turns(spec: YarnRotary, speeds_P: Tensor) -> Tensor:
    """Equations 17 to 20 of the YaRN paper."""
    return ((turns(speeds_P, spec.original_length) - spec.beta_slow) / (spec.beta_fast - spec.beta_slow)).clamp(0, 1)


def _kept_by_index(spec: YarnRotary, channels: int) -> Tensor:
    """The ramp that published models were trained with; it differs from the paper's by up to a third."""
    low, high = yarn_range(spec, channels)
    ramp_P = (torch.arange(channels // 2, dtype=torch.float64) - low) / (high - low)
    return 1 - ramp_P.clamp(0, 1)


def yarn_range(spec: YarnRotary, channels: int) -> tuple[float, float]:
    """The pair indices between which the index ramp falls: where a pair turns beta_fast and beta_slow times."""
    low, high = (
        channels * math.log(spec.original_length / (beta * 2 * math.pi)) / (2 * math.log(spec.base))
        for beta in (spec.beta_fast, spec.beta_slow)
    )
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    # Clamped at channels - 1, not at the last pair: models are trained so, and the slope depends on it.
    low, high = max(low, 0), min(high, channels - 1)
    return low, high + 0.001 if low == high else high


def _llama3(spec: Llama3Rotary, channels: int) -> tuple[Tensor, float]:
    speeds_P = powers(spec.base, channels)
    low, high = spec.low_frequency_factor, spec.high_frequency_factor
    kept_P = ((turns(speeds_P, spec.original_length) - low) / (high - low)).clamp(0, 1)
    return blend(speeds_P, spec.factor, kept_P), 1.0


def _longrope(spec: LongRotary, channels: int) -> tuple[Tensor, float]:
    slower = spec.long if spec.use == "long" else spec.short
    if len(slower) != channels // 2:
        raise Refusal(
            f"rotary kind 'longrope' has {len(slower)} factors, but a head has {channels // 2} pairs of channels that "
            "turn; give one factor a pair"
        )
    return powers(spec.base, channels) / torch.tensor(slower, dtype=torch.float64), longrope_factor(spec)


def longrope_factor(spec: LongRotary) -> float:
    """What is on cos and sin, whichever list is used."""
    if spec.attention_factor is not None:
        return spec.attention_factor
    return math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_length))


def _proportional(spec: ProportionalRotary, channels: int) -> tuple[Tensor, float]:
    speeds_P = powers(spec.base, channels) / spec.factor
    speeds_P[int(spec.pairs * channels // 2) :] = 0
    return speeds_P, 1.0


def _none(spec: NoRotary, channels: int) -> tuple[Tensor, float]:
    return torch.zeros(channels // 2, dtype=torch.float64), 1.0


FREQUENCIES: dict[str, Callable[[Any, int], tuple[Tensor, float]]] = {
    "default": _plain,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _ntk,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "abf": _plain,
    "proportional": _proportional,
    "none": _none,
}
