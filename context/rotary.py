"""What can be said of rotary position: every way to stretch a trained context, for all layers or each kind of layer.

Of each head's C channels, channel i and channel i + C/2 make a pair that turns by position * frequency_i. Nothing here
looks at how long a text is: a scaling is on because the configuration names it, and one that depends on a length
(`dynamic`, `longrope`) carries the length or the list that it is for. `context.frequencies` has the formulae.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from data.positions import LONGEST
from settings import Section

Base = Annotated[float, Field(gt=1)]
"""b: pair i turns b^(-2i/C) radians a position. RoFormer (arXiv 2104.09864), section 3.2.2, has 10000."""
Factor = Annotated[float, Field(ge=1)]
"""How many times longer the context gets."""
Length = Annotated[int, Field(ge=1, le=LONGEST)]
"""Tokens."""
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class DefaultRotary(Section):
    """RoFormer (arXiv 2104.09864): b^(-2i/C)."""

    kind: Literal["default"] = "default"
    base: Base
    share: Share | None = None
    """Only so large a share of a head's channels, its first ones, is turned; left out, all (GPT-J, GPT-NeoX). Here and
    below; Hugging Face's `partial_rotary_factor`."""


class LinearRotary(Section):
    """Position interpolation (arXiv 2306.15595): every pair turns `factor` times slower.

    A window layer has nothing to gain from it: it never sees a distance that it was not trained on.
    """

    kind: Literal["linear"] = "linear"
    base: Base
    factor: Factor
    share: Share | None = None


class NtkRotary(Section):
    """NTK-aware (bloc97, 2023; YaRN's section 3.1): a larger base, under which the fastest pair stays and the slowest
    turns exactly `factor` times slower."""

    kind: Literal["ntk"] = "ntk"
    base: Base
    factor: Factor
    share: Share | None = None


class DynamicRotary(Section):
    """Dynamic NTK (emozilla, 2023; YaRN's section 3.3) for texts of `length` tokens: the base grows with it.

    Published code takes each text's own length. Here it is one number: keys that were turned before stay right.
    """

    kind: Literal["dynamic"] = "dynamic"
    base: Base
    factor: Factor
    original_length: Length
    """The sequence length the model was trained at; Hugging Face takes `max_position_embeddings` for it."""
    length: Length
    """The length it is for; up to the original one nothing changes."""
    share: Share | None = None


class YarnRotary(Section):
    """YaRN (arXiv 2309.00071): pairs that turn often within the trained length keep their speed, slow ones are
    interpolated, and scores are sharpened."""

    kind: Literal["yarn"] = "yarn"
    base: Base
    factor: Factor
    original_length: Length
    """The sequence length the model was trained at, before it is stretched."""
    beta_fast: Positive = 32.0
    """Turns within the original length above which a pair is kept."""
    beta_slow: Positive = 1.0
    """Turns within the original length below which a pair is slowed by the whole factor."""
    ramp: Literal["index", "rotations"] = "index"
    """Between the two: linear in the pair's index, as published models do, or in its turns, as the paper writes."""
    truncate: bool = True
    """Whether the ends of the index ramp are rounded outwards to whole indices; gpt-oss has false."""
    attention_factor: Positive | None = None
    """Multiplies cos and sin, so scores by its square; left out: 0.1 ln(factor) + 1 (equation 22)."""
    mscale: Positive | None = None
    """With the next key, DeepSeek's attention factor: (0.1 mscale ln(factor) + 1) over the same with it.
    Their latent attention multiplies scores by the square of what is below the line besides; ours multiplies all of a
    score by the square of its attention factor, so give that number as attention_factor there."""
    mscale_all_dim: Positive | None = None
    share: Share | None = None

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}; were they swapped?")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim mean something together only: give both, or neither")
        if self.mscale is not None and self.attention_factor is not None:
            raise ValueError(
                f"attention_factor={self.attention_factor} leaves mscale={self.mscale} nothing to say: give one of them"
            )
        if not self.truncate and self.ramp == "rotations":
            raise ValueError('truncate=false is about the index ramp; leave it out, or use ramp = "index"')
        return self


class Llama3Rotary(Section):
    """Llama 3.1 (arXiv 2407.21783; its reference code): YaRN's ramp in turns, between 1 and 4, no attention factor."""

    kind: Literal["llama3"] = "llama3"
    base: Base
    factor: Factor
    original_length: Length
    """The sequence length the model was trained at, before it is stretched."""
    low_frequency_factor: Positive = 1.0
    """Turns within the original length below which a pair is slowed by the whole factor."""
    high_frequency_factor: Positive = 4.0
    """Turns within the original length above which a pair is kept."""
    share: Share | None = None

    @model_validator(mode="after")
    def _factors_in_order(self) -> Self:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if high <= low:
            raise ValueError(
                f"high_frequency_factor={high} must be above low_frequency_factor={low}; were they swapped?"
            )
        return self


class LongRotary(Section):
    """LongRoPE (arXiv 2402.13753): each pair is slowed by a factor of its own, that a search has found.

    Published code takes `short` for texts within the original length and `long` for others. Here the list is named.
    """

    kind: Literal["longrope"] = "longrope"
    base: Base
    factor: Factor
    """Longest length over the original one: what the attention factor is made of."""
    original_length: Annotated[int, Field(ge=2, le=LONGEST)]
    """The sequence length the model was trained at, before it is stretched."""
    short: tuple[Positive, ...] = Field(min_length=1, strict=False)  # or an array, which is what files have
    """A factor for each pair, for texts within the original length."""
    long: tuple[Positive, ...] = Field(min_length=1, strict=False)
    """A factor for each pair, for longer texts."""
    use: Literal["short", "long"]
    """Which of the two lists is used."""
    attention_factor: Positive | None = None
    """Multiplies cos and sin; left out: sqrt(1 + ln(factor) / ln(original_length)), for both lists."""
    share: Share | None = None

    @model_validator(mode="after")
    def _lists_agree(self) -> Self:
        if len(self.short) != len(self.long):
            raise ValueError(f"short has {len(self.short)} factors, long {len(self.long)}; give one a pair in both")
        return self


class AbfRotary(Section):
    """Adjusted base frequency (Llama 2 Long, arXiv 2309.16039): the default's formula with another, larger base."""

    kind: Literal["abf"] = "abf"
    base: Base
    share: Share | None = None


class ProportionalRotary(Section):
    """p-RoPE (arXiv 2410.06205): the fastest `pairs` of all pairs turn as ever, the others not at all.

    Not the others' `share`: the exponents count all channels of a head.
    """

    kind: Literal["proportional"] = "proportional"
    base: Base
    pairs: Share
    """Hugging Face's `partial_rotary_factor`."""
    factor: Factor = 1.0
    """Those that turn do so this many times slower."""


class NoRotary(Section):
    """No rotation at all (NoPE, arXiv 2305.19466); in a stage after others, DroPE."""

    kind: Literal["none"] = "none"


_Spec = (
    DefaultRotary
    | LinearRotary
    | NtkRotary
    | DynamicRotary
    | YarnRotary
    | Llama3Rotary
    | LongRotary
    | AbfRotary
    | ProportionalRotary
    | NoRotary
)

RotarySpec = Annotated[_Spec, Field(discriminator="kind")]
"""One rotation."""


class RotaryMap(Section):
    """A rotation for each kind of layer: OLMo 3 (arXiv 2512.13961) scales full layers only, Gemma 3 has two bases.

    Layers that the model's pattern calls `_nope` have none either way.
    """

    kind: Literal["by_layer"] = "by_layer"
    """May be left out where `full` and `window` are given."""
    full: RotarySpec
    """Of layers that see all tokens before them."""
    window: RotarySpec
    """Of layers that see a window."""


def _name_map(given: Any) -> Any:
    is_map = isinstance(given, dict) and {"full", "window"} & given.keys()
    return {"kind": "by_layer", **given} if is_map else given


AnyRotary = Annotated[_Spec | RotaryMap, Field(discriminator="kind"), BeforeValidator(_name_map)]
"""One rotation for all layers, or one for each kind of layer: what a stage has."""

LayerView = Literal["full", "window"]
"""Whether a layer sees all tokens before it or a window of them."""


def by_view(rotary: AnyRotary) -> dict[LayerView, RotarySpec]:
    """What each kind of layer is turned by."""
    if isinstance(rotary, RotaryMap):
        return {"full": rotary.full, "window": rotary.window}
    return {"full": rotary, "window": rotary}
