"""Stages: length, rotary position, mixture and learning rate as a function of the tokens seen so far."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from context.rotary import RotarySpec
from settings import Refusal, Section


class Continue(Section):
    """The run's own schedule goes on."""

    kind: Literal["continue"] = "continue"


class Rewarm(Section):
    """The stage has a schedule of its own: up to `peak`, then down a cosine until the stage ends."""

    kind: Literal["rewarm"] = "rewarm"
    peak: float = Field(gt=0)
    warmup_tokens: int = Field(ge=0)
    final: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak that is left when the stage ends."""


class StageSettings(Section):
    """One stretch of training at one sequence length."""

    until_tokens: int = Field(ge=1)
    """Tokens of the whole run at which it ends; it ends with the step that reaches them."""
    sequence_length: int = Field(ge=1)
    rotary: RotarySpec
    mixture: dict[str, float] = Field(default_factory=dict)
    """Source to share of tokens; left out: the sources' own weights."""
    learning_rate: Annotated[Continue | Rewarm, Field(discriminator="kind")] = Continue()

    @model_validator(mode="after")
    def _shares_make_sense(self) -> Self:
        below = [name for name, share in self.mixture.items() if share < 0]
        if below:
            raise ValueError(f"mixture.{below[0]}={self.mixture[below[0]]} must not be negative; use 0 to leave it out")
        if self.mixture and not any(self.mixture.values()):
            raise ValueError("mixture gives every source the share 0; give one of them more, or leave the table out")
        return self


class ContextSettings(Section):
    """How the context grows: one stage after the other."""

    stages: tuple[StageSettings, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for number, (before, after) in enumerate(zip(self.stages, self.stages[1:], strict=False), start=1):
            if after.until_tokens <= before.until_tokens:
                raise ValueError(
                    f"stages.{number}.until_tokens={after.until_tokens} must be above stages.{number - 1}.until_tokens="
                    f"{before.until_tokens}: it counts the tokens of the whole run"
                )
        return self


@dataclass(frozen=True)
class Stage:
    """A stage placed in the run: it trains on tokens [start_tokens, until_tokens), both at step boundaries."""

    index: int
    start_tokens: int
    until_tokens: int
    settings: StageSettings

    @property
    def sequence_length(self) -> int:
        return self.settings.sequence_length

    @property
    def rotary(self) -> RotarySpec:
        return self.settings.rotary

    @property
    def mixture(self) -> dict[str, float]:
        return self.settings.mixture

    @property
    def num_tokens(self) -> int:
        return self.until_tokens - self.start_tokens

    def learning_rate(self, tokens: int) -> float | None:
        """The rate of the step that ends at `tokens`, where the stage has its own schedule; None: the run's goes on."""
        rate = self.settings.learning_rate
        if isinstance(rate, Continue):
            return None
        done = tokens - self.start_tokens
        if done < rate.warmup_tokens:
            return rate.peak * done / rate.warmup_tokens
        share = min(1.0, (done - rate.warmup_tokens) / (self.num_tokens - rate.warmup_tokens))
        return rate.peak * (rate.final + (1 - rate.final) * 0.5 * (1 + math.cos(math.pi * share)))


class Stages:
    """All stages of a run. Tokens per step stay the same; a stage begins at the step boundary that ended the last."""

    def __init__(self, stages: Sequence[StageSettings], tokens_per_step: int) -> None:
        if not stages:
            raise Refusal("context.stages is empty; add at least one stage")
        if tokens_per_step < 1:
            raise Refusal(f"tokens_per_step={tokens_per_step} must be at least 1")
        self.tokens_per_step = tokens_per_step
        self._stages: list[Stage] = []
        for index, settings in enumerate(stages):
            check_length(index, settings.sequence_length, tokens_per_step)
            start = self._stages[-1].until_tokens if self._stages else 0
            until = -(-settings.until_tokens // tokens_per_step) * tokens_per_step
            if until <= start:
                raise Refusal(
                    f"context.stages.{index}.until_tokens={settings.until_tokens} leaves the stage no step: it begins "
                    f"at {start} tokens and a step takes {tokens_per_step}; use {start + 1} or more, or drop the stage"
                )
            self._stages.append(Stage(index, start, until, settings))
            check_warmup(self._stages[-1])

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, index: int) -> Stage:
        return self._stages[index]

    @property
    def total_tokens(self) -> int:
        """Where the last stage ends."""
        return self._stages[-1].until_tokens

    def at(self, tokens: int) -> Stage:
        """The stage of the step that begins after `tokens` tokens; past the end, the last stage."""
        return next((stage for stage in self._stages if tokens < stage.until_tokens), self._stages[-1])

    def new_rotary(self, tokens: int) -> RotarySpec | None:
        """The RoPE that takes over exactly after `tokens` tokens, or None where none does."""
        for before, after in itertools.pairwise(self._stages):
            if after.start_tokens == tokens and after.rotary != before.rotary:
                return after.rotary
        return None

    def first_sample(self, tokens: int) -> int:
        """How many samples the current stage has used after `tokens` tokens: the number of its next one."""
        if tokens < 0 or tokens % self.tokens_per_step:
            raise Refusal(f"tokens={tokens} is not at a step boundary: steps take {self.tokens_per_step} tokens")
        stage = self.at(tokens)
        return (tokens - stage.start_tokens) // stage.sequence_length

    def rows(self) -> list[dict[str, str]]:
        """The plan as a table, one row a stage, column title to text."""
        return [
            {
                "stage": str(stage.index),
                "tokens": f"{stage.start_tokens:,} to {stage.until_tokens:,}",
                "steps": f"{stage.num_tokens // self.tokens_per_step:,}",
                "sequence length": f"{stage.sequence_length:,}",
                "samples a step": f"{self.tokens_per_step // stage.sequence_length:,}",
                "rotary": in_words(stage.rotary),
                "learning rate": in_words(stage.settings.learning_rate),
                "mixture": ", ".join(f"{name} {share:g}" for name, share in stage.mixture.items())
                or "as the sources say",
            }
            for stage in self._stages
        ]


def check_length(index: int, sequence_length: int, tokens_per_step: int) -> None:
    """Refuse a length of which a step cannot hold a whole number."""
    if tokens_per_step % sequence_length == 0:
        return
    below, above = nearest_divisors(tokens_per_step, sequence_length)
    lengths = " or ".join(str(length) for length in (below, above) if length)
    down = tokens_per_step // sequence_length * sequence_length
    steps = " or ".join(str(tokens) for tokens in (down, down + sequence_length) if tokens)
    raise Refusal(
        f"context.stages.{index}.sequence_length={sequence_length} must divide tokens_per_step={tokens_per_step}; "
        f"try sequence_length {lengths}, or tokens_per_step {steps}"
    )


def nearest_divisors(number: int, value: int) -> tuple[int | None, int | None]:
    """The nearest divisors of `number` below and above `value`."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    below = [d for d in divisors if d < value]
    above = [d for d in divisors if d > value]
    return below[-1] if below else None, above[0] if above else None


def check_warmup(stage: Stage) -> None:
    """Refuse a warm-up that leaves its stage nothing to come down in."""
    rate = stage.settings.learning_rate
    if isinstance(rate, Rewarm) and rate.warmup_tokens >= stage.num_tokens:
        raise Refusal(
            f"context.stages.{stage.index}.learning_rate.warmup_tokens={rate.warmup_tokens} must be below the stage's "
            f"{stage.num_tokens} tokens; try {stage.num_tokens // 10}"
        )


def in_words(section: Section) -> str:
    """`yarn base=10000 factor=4`: the kind and what was set."""
    fields = section.model_dump(exclude_none=True, exclude_defaults=True)
    kind = getattr(section, "kind", "")
    return " ".join([kind, *(f"{name}={value:g}" for name, value in fields.items() if isinstance(value, int | float))])
