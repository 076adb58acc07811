"""A configuration's model, larger or smaller in the same proportions: the pattern for a budget."""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from attention.attention import AttentionSettings
from model.size import count
from model.transformer import MOST_LAYERS, ModelSettings
from settings import Refusal, to_dict, validate

NEAR = 1.25
"""How far width over depth may be from the pattern's, where it can be kept at all."""


def resized(pattern: ModelSettings, vocab_size: int, active: float) -> ModelSettings:
    """The same shape with about so many parameters that a token meets: depth and width grow alike.

    Heads keep their channels and their number to a key; widths inside grow with the width; experts keep their number.
    Raises Refusal where nothing is within a tenth.
    """

    def off(model: ModelSettings) -> float:
        return abs(math.log(count(model, vocab_size).active / active))

    candidates = list(_candidates(pattern, vocab_size, active))
    best = min(candidates, key=lambda each: (off(each), each.num_layers), default=None)
    if best is None or off(best) > 0.1:
        near = "" if best is None else f"; the nearest has {count(best, vocab_size).active:.3g}"
        raise Refusal(
            f"no model of this shape has about {active:.3g} parameters for a token{near}: try another budget, or a"
            " configuration with a smaller vocabulary or fewer channels a head"
        )
    return best


def _candidates(pattern: ModelSettings, vocab_size: int, active: float) -> Iterator[ModelSettings]:
    """Of every depth, the widths around what keeps the proportion, as far as they keep it about."""
    unit, ratio = _unit(pattern), pattern.width / pattern.num_layers
    least = 2 if pattern.num_dense_layers and pattern.moe else 1
    for depth in range(least, MOST_LAYERS + 1):
        number = depth * ratio / unit
        for times in sorted({max(1, math.floor(number)), math.ceil(number)}):
            if not 1 / NEAR <= times / number <= NEAR and depth > least:
                continue
            yield scaled(pattern, depth, times * unit)
        if count(scaled(pattern, depth, max(1, math.floor(number)) * unit), vocab_size).active > 2 * active:
            return


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
