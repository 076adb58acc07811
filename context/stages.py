"""Stages: length, rotary position, data and learning rate of every step as a function of the tokens seen so far."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from context.growth import WindowGrowth, lengths_of, window_of
from context.lengths import Lengths, check_length
from context.rates import Continue, Rewarm, rate_at
from context.rotary import AnyRotary
from context.stage_settings import ContextSettings, StageSettings
from context.stage_table import table_of
from context.step_plan import StepPlan
from settings import Refusal

__all__ = ["ContextSettings", "Continue", "Rewarm", "Stage", "StageSettings", "Stages"]


@dataclass(frozen=True)
class Stage:
    """A stage placed in the run: it trains on tokens [start_tokens, until_tokens), both at step boundaries."""

    index: int
    start_tokens: int
    until_tokens: int
    tokens_per_step: int
    settings: StageSettings

    @property
    def sequence_length(self) -> int:
        """Of its rows; where the length changes inside the stage, the one that it leads to."""
        return self.settings.sequence_length

    @property
    def rotary(self) -> AnyRotary:
        return self.settings.rotary

    @property
    def mixture(self) -> dict[str, float]:
        """As it is written, in `settings.mixture_unit`."""
        return self.settings.mixture

    @property
    def num_tokens(self) -> int:
        return self.until_tokens - self.start_tokens

    @property
    def num_steps(self) -> int:
        return self.num_tokens // self.tokens_per_step

    @property
    def key(self) -> str:
        """Its place in the configuration."""
        return f"context.stages.{self.index}"

    @property
    def step_key(self) -> str:
        """Where its tokens_per_step was written."""
        return f"{self.key}.tokens_per_step" if self.settings.tokens_per_step else "tokens_per_step"

    @cached_property
    def lengths(self) -> Lengths:
        """Of the rows of each step."""
        return lengths_of(self.settings.growth, self.key, self.sequence_length, self.tokens_per_step, self.num_steps)

    def step(self, number: int) -> StepPlan:
        """Its step of that number, counted from 0."""
        length, earlier = self.lengths.at(number)
        return StepPlan(
            stage=self,
            start_tokens=self.start_tokens + number * self.tokens_per_step,
            num_tokens=self.tokens_per_step,
            sequence_length=length,
            first_sample=earlier * (self.tokens_per_step // length),
            window=window_of(self.settings.growth, length, number),
        )

    def first_steps(self) -> Iterator[StepPlan]:
        """The first step of each length that it has, in the order they come."""
        return (self.step(number) for number in self.lengths.first_steps())

    def longest_step(self) -> StepPlan:
        """A step of its longest rows: the first, or, where a window grows, the last, which sees farthest."""
        step = max(self.first_steps(), key=lambda step: step.sequence_length)
        return self.step(self.num_steps - 1) if isinstance(self.settings.growth, WindowGrowth) else step

    def learning_rate(self, tokens: int) -> float | None:
        """The rate of the step that ends at `tokens`, where the stage has its own schedule; None: the run's goes on."""
        return rate_at(self.settings.learning_rate, tokens - self.start_tokens, self.num_tokens)


class Stages:
    """All stages of a run; a stage begins at the step boundary that ended the last."""

    def __init__(self, stages: Sequence[StageSettings], tokens_per_step: int) -> None:
        """tokens_per_step: of the stages that do not say it themselves."""
        if not stages:
            raise Refusal("context.stages is empty; add at least one stage")
        if tokens_per_step < 1:
            raise Refusal(f"tokens_per_step={tokens_per_step} must be at least 1")
        self._stages: list[Stage] = []
        for index, settings in enumerate(stages):
            step = settings.tokens_per_step or tokens_per_step
            start = self._stages[-1].until_tokens if self._stages else 0
            until = start + -(-(settings.until_tokens - start) // step) * step
            stage = Stage(index, start, until, step, settings)
            check_stage(stage)
            self._stages.append(stage)

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

    def new_rotary(self, tokens: int) -> AnyRotary | None:
        """The RoPE that takes over exactly after `tokens` tokens, or None where none does."""
        for before, after in itertools.pairwise(self._stages):
            if after.start_tokens == tokens and after.rotary != before.rotary:
                return after.rotary
        return None

    def step(self, tokens: int) -> StepPlan:
        """The step that begins after `tokens` tokens. Raises Refusal where no step begins there."""
        stage = self.at(tokens)
        number, rest = divmod(tokens - stage.start_tokens, stage.tokens_per_step)
        if tokens < 0 or rest:
            raise Refusal(f"tokens={tokens} is not at a step boundary: steps take {stage.tokens_per_step} tokens")
        return stage.step(number)

    def first_steps(self) -> Iterator[StepPlan]:
        """The first step of each length of each stage: what has to be possible before a run starts."""
        return (step for stage in self._stages for step in stage.first_steps())

    def last_step(self, tokens: int) -> StepPlan:
        """The step that ended at `tokens` tokens; before the first one, the first."""
        stage = self.at(max(0, tokens - 1))
        return self.step(max(0, tokens - stage.tokens_per_step))

    def rows(self) -> list[dict[str, str]]:
        """The plan as a table, one row a stage, column title to text."""
        return table_of(self._stages)


def check_stage(stage: Stage) -> None:
    """Refuse what could not be trained, before anything starts."""
    check_length(f"{stage.key}.sequence_length", stage.sequence_length, stage.tokens_per_step, stage.step_key)
    if stage.num_tokens <= 0:
        raise Refusal(
            f"{stage.key}.until_tokens={stage.settings.until_tokens} leaves the stage no step: it begins at "
            f"{stage.start_tokens} tokens and a step takes {stage.tokens_per_step}; end it later, take smaller steps, "
            "or drop it"
        )
    _ = stage.lengths  # refuses a growth that cannot be
    rate = stage.settings.learning_rate
    if isinstance(rate, Rewarm) and rate.warmup_tokens >= stage.num_tokens:
        raise Refusal(
            f"{stage.key}.learning_rate.warmup_tokens={rate.warmup_tokens} must be below the stage's "
            f"{stage.num_tokens} tokens; try {stage.num_tokens // 10}"
        )
