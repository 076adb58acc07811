"""The learning rate of a stage: the run's schedule goes on, or the stage has one of its own."""

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from settings import Section


class Continue(Section):
    """The run's own schedule goes on."""

    kind: Literal["continue"] = "continue"


class Rewarm(Section):
    """The stage has a schedule of its own: in a line up to `peak`, then down to a share of it when the stage ends."""

    kind: Literal["rewarm"] = "rewarm"
    peak: float = Field(gt=0)
    warmup_tokens: int = Field(ge=0)
    """Tokens of the stage after which it is at its peak."""
    final: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak that is left when the stage ends; of no meaning where the shape is constant."""
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """How it comes down; constant: not at all."""


StageRate = Annotated[Continue | Rewarm, Field(discriminator="kind")]

# From 1 at the peak to 0 at the stage's end.
SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
}


def rate_at(rate: Continue | Rewarm, done: int, num_tokens: int) -> float | None:
    """The rate of the step that ends after `done` of the stage's tokens; None where the run's own schedule goes on."""
    if isinstance(rate, Continue):
        return None
    if done < rate.warmup_tokens:
        return rate.peak * done / rate.warmup_tokens
    share = min(1.0, (done - rate.warmup_tokens) / (num_tokens - rate.warmup_tokens))
    return rate.peak * (rate.final + (1 - rate.final) * SHAPES[rate.shape](share))
