"""A configuration's model, larger or smaller in the same proportions: the pattern for a budget."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from attention.attention import AttentionSettings
from model.size import count
from model.transformer import MOST_LAYERS, ModelSettings
from settings import Refusal, to_dict, validate

WIDER = 1.5
"""How far a width may be from the one that keeps the proportion."""
BESIDE = 5
"""Depths that are looked at on either side of the one that comes nearest."""
BENT = 0.05
"""What a proportion that is off counts for, beside a size that is."""


def resized(pattern: ModelSettings, vocab_size: int, active: float) -> ModelSettings:
    """The same shape with about so many parameters that a token meets: depth and width grow alike.

    Heads keep their channels and their number to a key; widths inside grow with the width; experts keep their number.
    Raises Refusal where nothing is within a tenth.
    """

    def off(model: ModelSettings) -> float:
        return abs(math.log(count(model, vocab_size).active / active))

    def bent(model: ModelSettings) -> float:
        return abs(math.log(model.width / model.num_layers / (pattern.width / pattern.num_layers)))

    best = min(_candidates(pattern, vocab_size, active), key=lambda each: off(each) + BENT * bent(each))
    if off(best) > 0.1:
        raise Refusal(
            f"no model of this shape has about {active:.3g} parameters for a token; the nearest has"
            f" {count(best, vocab_size).active:.3g}: try another budget, or a"
            " configuration with a smaller vocabulary or fewer channels a head"
        )
    return best


def _candidates(pattern: ModelSettings, vocab_size: int, active: float) -> Iterator[ModelSettings]:
    """Of every depth that comes near, the widths around what keeps the proportion."""
    unit, ratio = _unit(pattern), pattern.width / pattern.num_layers
    least = 2 if pattern.num_dense_layers and pattern.moe else 1

    def widths(depth: int) -> list[int]:
        number = depth * ratio / unit
        about = max(1, math.floor(number))
        near = (n for n in range(about - 1, about + 3) if 1 / WIDER <= n / number <= WIDER)
        return [unit * n for n in (set(near) or {about})]

    def size(depth: int) -> int:
        return count(scaled(pattern, depth, max(1, round(depth * ratio / unit)) * unit), vocab_size).active

    depths = range(least, MOST_LAYERS + 1)
    about = depths[min(bisect_left(depths, active, key=size), len(depths) - 1)]
    for depth in range(max(least, about - BESIDE), min(MOST_LAYERS, about + BESIDE) + 1):
        yield from (scaled(pattern, depth, width) for width in widths(depth))


def scaled(pattern: ModelSettings, depth: int, width: int) -> ModelSettings:
    """With so many layers of such a width, and all else in proportion; raises Refusal where that cannot be."""
    by, table = width / pattern.width, to_dict(pattern)
    table |= {"num_layers": depth, "width": width}
    attention: dict[str, Any] = table["attention"]
    for key in ("num_heads", "num_kv_heads"):
        if key in attention:
            attention[key] = max(1, round(attention[key] * by))
    for key in ("latent_rank", "query_rank"):
        if attention.get(key) is not None:
            attention[key] = _times(8, attention[key] * by)
    if "feed_forward_width" in table:
        table["feed_forward_width"] = _times(8, table["feed_forward_width"] * by)
    if "moe" in table:
        table["moe"]["expert_width"] = _times(8, table["moe"]["expert_width"] * by)
    if pattern.num_dense_layers:
        share = pattern.num_dense_layers / pattern.num_layers
        table["num_dense_layers"] = min(depth, max(1, round(share * depth)))
    return validate(table, ModelSettings, "the resized model")


def _unit(pattern: ModelSettings) -> int:
    """What a width has to be a multiple of, so that heads stay whole and as many share a key."""
    attention = pattern.attention
    group = attention.num_heads // attention.num_kv_heads if isinstance(attention, AttentionSettings) else 1
    return Fraction(pattern.width * group, attention.num_heads).numerator


def _times(unit: int, number: float) -> int:
    return max(unit, round(number / unit) * unit)
