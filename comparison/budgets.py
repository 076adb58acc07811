"""Runs of a number of FLOPs: a size sets how many tokens are left for it, and all that counts tokens goes with them."""

import tomllib
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from comparison.match import flops_of
from comparison.resize import resized
from comparison.sweep import as_name
from run.config import RunConfig
from run.scale import STAGE, changed_at
from scaling.isoflop import FEWEST
from settings import Refusal, Section, to_toml, validate

FEWEST_STEPS = 5
"""Of a run: fewer say nothing of its size."""
COUNTS = (
    f"{STAGE}.learning_rate.warmup_tokens",
    "optimizer.schedule.warmup_tokens",
    "optimizer.schedule.decay_tokens",
    "evals.every_tokens",
)
"""Tokens that stay the same share of the run."""


class IsoFlopSettings(Section):
    """At each number of FLOPs, runs of several sizes; where their loss is least is the best size for it."""

    flops: tuple[float, ...] = Field(min_length=1)
    """Budgets: the model's operations of a whole run, forward and backward, attention included."""
    sizes: tuple[int, ...] = Field(min_length=FEWEST)
    """What is varied takes these values."""
    vary: Literal["width", "inner", "depth"] = "width"
    """The model's width, with what is inside in proportion; the width inside its layers; or their number."""

    @model_validator(mode="after")
    def _are_different(self) -> "IsoFlopSettings":
        for key, values in (("flops", self.flops), ("sizes", self.sizes)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}={list(values)} names one twice; seeds are how a run is repeated")
            if min(values) <= 0:
                raise ValueError(f"{key}={list(values)} must all be above 0")
        if len({as_name(value) for value in self.flops}) < len(self.flops):
            raise ValueError(
                f"flops={list(self.flops)} has values too near each other to be told apart in a run's name, which has "
                "six digits; leave one out"
            )
        return self


@dataclass(frozen=True)
class Point:
    """One size at one budget."""

    flops: float
    vary: Literal["width", "inner", "depth"]
    size: int

    @property
    def name(self) -> str:
        return f"{as_name(self.flops)}-{self.vary}_{self.size}"

    def of(self, config: RunConfig, where: str) -> RunConfig:
        """The run at this size, as long as the budget lasts. Raises Refusal where that is too short to be a run."""
        sized = resized(config, self.vary, self.size, where)
        return lasting(sized, self.flops * sized.total_tokens / flops_of(sized), where)


def points_of(settings: IsoFlopSettings) -> list[Point]:
    return [Point(flops, settings.vary, size) for flops in settings.flops for size in settings.sizes]


def lasting(config: RunConfig, tokens: float, where: str) -> RunConfig:
    """The run over so many tokens, to the nearest whole step; its stages, warm-ups and intervals in proportion."""
    share = tokens / config.total_tokens
    table: Any = tomllib.loads(to_toml(config))
    until = 0
    for stage, own in zip(config.stages, table["context"]["stages"], strict=True):
        steps = round(stage.num_tokens * share / stage.tokens_per_step)
        if steps < 1 or tokens < FEWEST_STEPS * config.tokens_per_step:
            raise Refusal(
                f"{where}: {tokens:,.0f} tokens are left for this size, {steps} steps of {stage.key}; give more "
                "isoflop.flops, smaller isoflop.sizes, or smaller tokens_per_step"
            )
        until += steps * stage.tokens_per_step
        own["until_tokens"] = until
    table["total_tokens"] = until
    for path in COUNTS:
        table = changed_at(table, path.split("."), partial(_share, share))
    return validate(table, RunConfig, where)


def _share(share: float, value: int | float, _: str) -> int:
    return max(1, round(value * share)) if value else 0
