"""The learning rate as a pure function of tokens seen."""

import math
from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from settings import Section


class ConstantSchedule(Section):
    """Linear warm-up, then the peak for good."""

    kind: Literal["constant"] = "constant"
    warmup_tokens: int = Field(default=0, ge=0)


class CosineSchedule(Section):
    """Linear warm-up, then half a cosine down to `final` of the peak at the run's end."""

    kind: Literal["cosine"] = "cosine"
    warmup_tokens: int = Field(default=0, ge=0)
    final: float = Field(default=0.1, ge=0, le=1)


class LinearSchedule(Section):
    """Linear warm-up, then a straight line down to `final` of the peak at the run's end."""

    kind: Literal["linear"] = "linear"
    warmup_tokens: int = Field(default=0, ge=0)
    final: float = Field(default=0.0, ge=0, le=1)


class WSDSchedule(Section):
    """Warm-up, stable, decay: the peak until the last stretch, then down to `final` of it (MiniCPM, section 4)."""

    kind: Literal["wsd"] = "wsd"
    warmup_tokens: int = Field(default=0, ge=0)
    decay_tokens: int | None = Field(default=None, gt=0)
    """Length of the decay; give this or decay_share."""
    decay_share: float | None = Field(default=None, gt=0, le=1)
    """Length of the decay as a share of the whole run; 0.2 when decay_tokens is left out too."""
    final: float = Field(default=0.0, ge=0, le=1)
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """How it decays; sqrt is 1 - sqrt(progress)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.decay_tokens is not None and self.decay_share is not None:
            raise ValueError(
                f"decay_tokens={self.decay_tokens} and decay_share={self.decay_share} say the same thing; leave one out"
            )
        return self


ScheduleSettings = Annotated[
    ConstantSchedule | CosineSchedule | LinearSchedule | WSDSchedule, Field(discriminator="kind")
]

DEFAULT_DECAY_SHARE = 0.2

# From 1 at progress 0 to 0 at progress 1.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


def learning_rate(settings: ScheduleSettings, tokens: int, total_tokens: int) -> float:
    """What to multiply the peak learning rate with, from 0 to 1, once `tokens` of `total_tokens` are seen.

    It is 0 at token 0 of a warm-up: pass the tokens at a step's end, or the first step changes nothing.
    """
    if tokens < settings.warmup_tokens:
        return tokens / settings.warmup_tokens
    if isinstance(settings, ConstantSchedule):
        return 1.0
    start, shape = settings.warmup_tokens, str(settings.kind)
    if isinstance(settings, WSDSchedule):
        start, shape = total_tokens - decay_length(settings, total_tokens), settings.shape
    progress = min(max((tokens - start) / max(total_tokens - start, 1), 0.0), 1.0)
    return settings.final + (1.0 - settings.final) * SHAPES[shape](progress)


def decay_length(settings: WSDSchedule, total_tokens: int) -> int:
    """Tokens that the decay at the end of a run of `total_tokens` takes."""
    if settings.decay_tokens is not None:
        return settings.decay_tokens
    return round(total_tokens * (DEFAULT_DECAY_SHARE if settings.decay_share is None else settings.decay_share))


def check_schedule(settings: ScheduleSettings, total_tokens: int) -> None:
    """Raise ValueError where a run of `total_tokens` is too short for its warm-up and decay."""
    decay = decay_length(settings, total_tokens) if isinstance(settings, WSDSchedule) else 0
    if settings.warmup_tokens + decay > total_tokens:
        parts = f"optimizer.schedule.warmup_tokens={settings.warmup_tokens}"
        parts += f" and a decay of {decay} tokens" if decay else ""
        raise ValueError(f"{parts} do not fit into total_tokens={total_tokens}; shorten them or train for longer")
