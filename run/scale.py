"""One number that makes a run smaller: what a configuration counts in tokens, divided by its `scale`.

A published recipe is written down in its own numbers, and tried at a size that is at hand: `scale = 64` trains rows of
128 tokens where 8192 stand, in as many steps. Like `extends`, it is gone once the file is read: the resolved
configuration, and all that a run writes down, has the smaller numbers.
"""

from collections.abc import Callable, Iterator
from functools import partial
from operator import truediv
from typing import Any

from settings import Refusal, Table

STAGE = "context.stages.*"
LENGTHS = (
    f"{STAGE}.sequence_length",
    f"{STAGE}.tokens_per_step",
    f"{STAGE}.rotary.original_length",
    f"{STAGE}.rotary.length",
    f"{STAGE}.rotary.full.original_length",
    f"{STAGE}.rotary.full.length",
    f"{STAGE}.rotary.window.original_length",
    f"{STAGE}.rotary.window.length",
    f"{STAGE}.growth.start",
    f"{STAGE}.growth.shortest",
    f"{STAGE}.growth.granularity",
    f"{STAGE}.growth.end",
    f"{STAGE}.positions.reach",
    "model.attention.window",
    "model.attention.temperature.length",
    "model.moe.balance.tokens",
    "model.moe.balance.*.tokens",
    "evals.*.length",
    "evals.*.lengths.*",
    "tokens_per_step",
    "tokens_per_microbatch",
)
"""Divided without a rest, or refused: they have to go on dividing one another."""
COUNTS = (
    "total_tokens",
    f"{STAGE}.until_tokens",
    f"{STAGE}.learning_rate.warmup_tokens",
    f"{STAGE}.buckets.*.*.from_tokens",
    "optimizer.schedule.warmup_tokens",
    "optimizer.schedule.decay_tokens",
    "evals.every_tokens",
)
"""Divided and rounded up: they only say how far."""
RATES = (f"{STAGE}.growth.rate",)
"""Tokens that a step adds: divided, and rounded nowhere."""


def scaled(table: Table, where: str) -> Table:
    """The table without its `scale`, and with all tokens divided by it. where: the file's name, for refusals.

    Raises Refusal for a scale that is no whole number, or that does not divide a length.
    """
    if "scale" not in table:
        return table
    scale = table["scale"]
    if not isinstance(scale, int) or isinstance(scale, bool) or scale < 1:
        raise Refusal(f"{where}: scale={scale!r} must be a whole number, 1 or more: what tokens are divided by")
    shrunk: Any = {key: value for key, value in table.items() if key != "scale"}
    for paths, divide in ((LENGTHS, exactly), (COUNTS, upwards), (RATES, truediv)):
        for path in paths:
            shrunk = changed_at(shrunk, path.split("."), partial(_told, divide, scale, where))
    return dict(shrunk)


def exactly(value: int | float, scale: int) -> int | float:
    """Raises ValueError where a rest is left. What is no whole number is left for the schema to refuse by name."""
    if isinstance(value, float):
        return value
    if value % scale:
        near = max(1, round(value / scale)) * scale
        raise ValueError(f"is not a multiple of scale={scale}; try a scale that divides it, or {near}")
    return value // scale


def upwards(value: int | float, scale: int) -> int | float:
    return value if isinstance(value, float) else -(-value // scale)


def _told(divide: Callable[[Any, int], Any], scale: int, where: str, value: Any, key: str) -> Any:
    try:
        return divide(value, scale)
    except (ValueError, OverflowError) as error:
        raise Refusal(f"{where}: {key}={value} {error}") from None


def changed_at(place: Any, path: list[str], change: Callable[[Any, str], Any], key: str = "") -> Any:
    """A copy of `place` in which the numbers that `path` leads to are changed; `*` stands for every key or item."""
    if not path:
        # What is no number is left for the schema to refuse by name.
        return change(place, key) if isinstance(place, int | float) and not isinstance(place, bool) else place
    if not isinstance(place, dict | list):
        return place
    copy, items = (dict(place), dict(place)) if isinstance(place, dict) else (list(place), dict(enumerate(place)))
    for name in _names(items, path[0]):
        copy[name] = changed_at(items[name], path[1:], change, f"{key}.{name}" if key else str(name))
    return copy


def _names(items: dict[Any, Any], name: str) -> Iterator[Any]:
    if name == "*":
        yield from items
    elif name in items:
        yield name
