"""Arms made as large as one of them: by active parameters, operations, all parameters, or the time of training.

One number of the model is moved, in steps that kernels like, until the measure is as near as it comes. All four
measures grow with each of these numbers, so that a search by halves finds the nearest.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from comparison.resize import LARGEST, Vary, least, number_of, numbers_of, resized, unit_of
from data.tokenizer import AnyTokenizerSettings, build_tokenizer
from model.size import count, multiplied_weights
from planning.device import Device
from planning.forecast import Forecast, attention_of_stage, forecasts, whole_rows
from run.config import RunConfig
from run.metrics import clock, short
from settings import Refusal, Section

Measure = Literal["active", "flops", "total", "seconds"]
MEASURES: Mapping[Measure, str] = {
    "active": "parameters that a token meets",
    "flops": "operations of all tokens",
    "total": "parameters",
    "seconds": "seconds of training",
}
FORMS: Mapping[Measure, Callable[[float], str]] = {
    "active": short,
    "flops": "{:.3g}".format,
    "total": short,
    "seconds": clock,
}
Pace = tuple[float, ...]
"""For each stage, a step's measured time over the planned one; empty: the plan is taken at its word."""


class MatchSettings(Section):
    """To which arm the others are made comparable, and by what."""

    to: str
    """The arm that keeps its size."""
    by: Measure = "active"
    """What is made alike: parameters that a token meets (embedding and head among them, as model cards count),
    operations of the whole run, all parameters, or the time of training, for which a few steps of each arm are timed
    on the device that is here."""
    vary: Vary | dict[str, Vary] = "inner"
    """What is changed for it: the width inside experts and dense feed-forward layers, the model's width (with what is
    inside, in proportion), its layers, or how many experts there are. A table says it by arm."""
    arms: tuple[str, ...] = ()
    """Those that are made alike; left out, all others."""
    multiple_of: PositiveInt = 8
    """Of widths: what they have to be a multiple of."""
    tolerance: float | None = Field(default=None, gt=0, lt=1)
    """How far from alike the measure may be; farther is refused. Left out, 0.02; of seconds, which are timed, 0.05."""

    @model_validator(mode="after")
    def _grows_with_it(self) -> Self:
        varied = self.vary.values() if isinstance(self.vary, dict) else (self.vary,)
        if "experts" in varied and self.by != "total":
            raise ValueError(f"vary='experts' hardly moves by={self.by!r}; vary 'inner', or set by='total'")
        return self

    @property
    def most_off(self) -> float:
        """The tolerance."""
        return self.tolerance or (0.05 if self.by == "seconds" else 0.02)

    def varied(self, arm: str) -> Vary:
        """What is changed of an arm."""
        return self.vary.get(arm, "inner") if isinstance(self.vary, dict) else self.vary


class Measures(Section):
    """What a run is and takes, by arithmetic."""

    active: float
    flops: float
    total: float
    seconds: float

    def of(self, name: Measure) -> float:
        return float(getattr(self, name))


def measure(config: RunConfig, device: Device, pace: Pace = ()) -> Measures:
    """Raises Refusal where the run could not be planned."""
    size = count(config.model, vocab_size_of(config))
    seconds = planned_seconds(config, device, pace)
    return Measures(active=size.active, flops=flops_of(config), total=size.total, seconds=seconds)


def flops_of(config: RunConfig) -> float:
    """The model's operations over the whole run, forward and backward, each row taken for one document."""
    weights = multiplied_weights(config.model, vocab_size_of(config))
    return sum(
        stage.num_tokens * (6 * weights + attention_of_stage(config, stage, tuple(whole_rows(stage))))
        for stage in config.stages
    )


def planned_seconds(config: RunConfig, device: Device, pace: Pace = ()) -> float:
    """Of all steps, as planned for one rank, each stage at its pace."""
    seconds = stage_seconds(config, device)
    return sum(each * times for each, times in zip(seconds, pace or (1.0,) * len(seconds), strict=True))


def stage_seconds(config: RunConfig, device: Device) -> list[float]:
    """Of each stage, as planned."""
    told: Iterator[Forecast] = forecasts(config, vocab_size_of(config), 1, device, whole_rows)
    return [each.seconds for each in told]


def vocab_size_of(config: RunConfig) -> int:
    return _vocab_size(config.data.tokenizer)


@lru_cache
def _vocab_size(settings: AnyTokenizerSettings) -> int:
    return build_tokenizer(settings).vocab_size


@dataclass(frozen=True)
class Matched:
    """One arm's run, as large as was asked."""

    config: RunConfig
    to: str
    by: Measure
    changed: Mapping[str, tuple[int, int]]
    """Keys of the model: what they were, and are."""
    measures: Measures
    other: Measures
    """Of the arm that kept its size."""
    notes: tuple[str, ...] = ()
    """How it was found, where it was not by arithmetic alone."""

    def lines(self, name: str) -> Iterator[str]:
        """What was matched, how nearly, and what is left unlike."""
        moved = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in self.changed.items() if old != new)
        yield f"{name}, beside {self.to}: {moved or 'as it was'}"
        for measure_name in MEASURES:
            ours, theirs = self.measures.of(measure_name), self.other.of(measure_name)
            mark = "matched  " if measure_name == self.by else "unmatched"
            if measure_name != self.by and abs(ours / theirs - 1) < 5e-4:
                mark = "alike    "
            form = FORMS[measure_name]
            told = f"{form(ours):>8} to {form(theirs):>8}  {ours / theirs - 1:+.1%}"
            seconds = ", as timed" if self.notes else ", as planned"
            how = {"seconds": seconds, "flops": ", each row as one document"}.get(measure_name, "")
            yield f"  {mark} {MEASURES[measure_name] + how:<50} {told}"
        yield from (f"  {note}" for note in self.notes)


def match(config: RunConfig, other: RunConfig, settings: MatchSettings, device: Device, where: str) -> Matched:
    """`config` with its size moved until it measures as `other`; raises Refusal where nothing comes near enough.

    where: what the arm is called, in messages.
    """
    search = Search(config, settings, device, where)
    measures = measure(other, device)
    found = search.nearest(measures.of(settings.by))
    search.check(found, measures.of(settings.by))
    return search.matched(found, measures)


@dataclass(frozen=True)
class Search:
    """Looks for the size of one arm."""

    config: RunConfig
    settings: MatchSettings
    device: Device
    where: str
    pace: Callable[[RunConfig], Pace] = lambda _: ()

    @property
    def vary(self) -> Vary:
        return self.settings.varied(self.where)

    def value_of(self, config: RunConfig) -> float:
        """The one measure alone: time takes longest to plan."""
        by = self.settings.by
        if by == "seconds":
            return planned_seconds(config, self.device, self.pace(config))
        if by == "flops":
            return flops_of(config)
        size = count(config.model, vocab_size_of(config))
        return size.active if by == "active" else size.total

    def nearest(self, target: float, within: tuple[float, float] = (0, math.inf)) -> RunConfig:
        """The run whose measure is nearest, of numbers within these."""
        config, vary = self.config, self.vary
        unit = unit_of(config, vary, self.settings.multiple_of)
        low = max(least(config, vary, unit), math.ceil(within[0] / unit))
        high = max(low, min(LARGEST[vary], within[1]) // unit)

        def at(number: int) -> RunConfig:
            return resized(config, vary, number * unit, self.where)

        return at(_nearest(lambda number: self.value_of(at(number)), target, low, int(high)))

    def check(self, found: RunConfig, target: float) -> None:
        """Raises Refusal where it is farther off than it may be."""
        off = self.value_of(found) / target - 1
        if abs(off) > self.settings.most_off:
            raise Refusal(f"{self.told(found, off)}; {self.ways_out(abs(off))}")

    def told(self, found: RunConfig, off: float) -> str:
        """How far off the nearest is."""
        return (
            f"{self.where}: with {self.vary} {number_of(found, self.vary)}, the nearest, its "
            f"{MEASURES[self.settings.by]} are {off:+.1%} off those of {self.settings.to!r}"
        )

    def ways_out(self, off: float) -> str:
        """What can be set where the nearest is so far off, of what may be set."""
        needed, by = math.ceil(off * 1000 + 1e-6) / 1000, self.settings.by
        ways = [f"match.tolerance={needed:g}"] if needed < 1 else []
        if self.settings.multiple_of > 1 and self.vary in {"inner", "width"}:
            ways.append("a smaller match.multiple_of")
        model = self.config.model
        has_experts = model.moe is not None and model.num_dense_layers < model.num_layers
        others = [each for each in LARGEST if each != self.vary]
        allowed = [repr(each) for each in others if each != "experts" or (by == "total" and has_experts)]
        return f"set {', '.join([*ways, f'match.vary={allowed[0]}'])}{''.join(f' or {each}' for each in allowed[1:])}"

    def matched(self, found: RunConfig, other: Measures) -> Matched:
        before, after = numbers_of(self.config), numbers_of(found)
        changed = {key: (before[key], after[key]) for key in after}
        measures = measure(found, self.device, self.pace(found))
        return Matched(found, self.settings.to, self.settings.by, changed, measures, other)


def _nearest(value_of: Callable[[int], float], target: float, low: int, high: int) -> int:
    """The number whose value is nearest to the target; values grow with numbers."""
    if value_of(low) >= target:
        return low
    reach = low
    while reach < high and value_of(reach) < target:  # no further than needed: large models are slow to plan
        low, reach = reach, min(2 * reach, high)
    high = reach
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value_of(middle) < target else (low, middle)
    return min((low, high), key=lambda number: abs(value_of(number) - target))
