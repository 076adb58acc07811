"""Arms made as large as one of them: by active parameters, operations, all parameters, or the time of a step.

One number of the model is moved, in steps that kernels like, until the measure is as near as it comes. All four
measures grow with each of these numbers, so that a search by halves finds the nearest.
"""

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from data.tokenizer import build_tokenizer
from model.size import count
from planning.device import Device
from planning.forecast import forecasts, whole_rows
from run.config import RunConfig
from run.metrics import short
from settings import Refusal, Section, to_toml, validate

Measure = Literal["active", "flops", "total", "seconds"]
MEASURES: Mapping[Measure, str] = {
    "active": "parameters that a token meets",
    "flops": "operations of all tokens, attention included",
    "total": "parameters",
    "seconds": "seconds of training, as planned",
}
Vary = Literal["inner", "width", "depth", "experts"]
LARGEST = {"inner": 1 << 17, "width": 1 << 15, "depth": 512, "experts": 4096}


class MatchSettings(Section):
    """To which arm the others are made comparable, and by what."""

    to: str
    """The arm that keeps its size."""
    by: Measure = "active"
    """What is made alike: parameters that a token meets (embedding and head among them, as model cards count),
    operations of the whole run, all parameters, or the planned time of the run on its device."""
    vary: Vary = "inner"
    """What is changed for it: the width inside experts and dense feed-forward layers, the model's width (with what is
    inside, in proportion), its layers, or how many experts there are."""
    multiple_of: PositiveInt = 8
    """Of widths: what they have to be a multiple of."""
    tolerance: float = Field(default=0.02, gt=0, lt=1)
    """How far from alike the measure may be; farther is refused."""

    @model_validator(mode="after")
    def _grows_with_it(self) -> Self:
        if self.vary == "experts" and self.by != "total":
            raise ValueError(f"vary='experts' hardly moves by={self.by!r}; vary 'inner', or set by='total'")
        return self


@dataclass(frozen=True)
class Measures:
    """What a run is and takes, by arithmetic."""

    active: float
    flops: float
    total: float
    seconds: float

    def of(self, name: Measure) -> float:
        return float(getattr(self, name))


def measure(config: RunConfig, device: Device) -> Measures:
    """Raises Refusal where the run could not be planned."""
    vocab_size = build_tokenizer(config.data.tokenizer).vocab_size
    size = count(config.model, vocab_size)
    told = list(forecasts(config, vocab_size, 1, device, whole_rows))
    return Measures(size.active, sum(each.flops for each in told), size.total, sum(each.seconds for each in told))


@dataclass(frozen=True)
class Matched:
    """One arm's run, as large as was asked."""

    config: RunConfig
    changed: Mapping[str, tuple[int, int]]
    """Keys of the model: what they were, and are."""
    measures: Measures

    def lines(self, name: str, other: Measures, by: Measure) -> Iterator[str]:
        """What was matched, how nearly, and what is left unlike."""
        moved = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in self.changed.items() if old != new)
        yield f"{name}: {moved or 'as it was'}"
        for measure_name in MEASURES:
            ours, theirs = self.measures.of(measure_name), other.of(measure_name)
            mark = "matched" if measure_name == by else "       "
            told = f"{short(ours):>8} to {short(theirs):>8}  {ours / theirs - 1:+.1%}"
            yield f"  {mark} {MEASURES[measure_name]:<45} {told}"


def match(config: RunConfig, other: RunConfig, settings: MatchSettings, device: Device, where: str) -> Matched:
    """`config` with its size moved until it measures as `other`; raises Refusal where nothing comes near enough.

    where: what the arm is called, in messages.
    """
    target = measure(other, device).of(settings.by)
    at = partial(_resized, config, settings.vary, where)
    unit = settings.multiple_of if settings.vary in ("inner", "width") else 1

    def value_of(number: int) -> float:
        return measure(at(number * unit), device).of(settings.by)

    number = _nearest(value_of, target, _least(config, settings.vary, unit), LARGEST[settings.vary] // unit)
    found = at(number * unit)
    measures = measure(found, device)
    off = measures.of(settings.by) / target - 1
    if abs(off) > settings.tolerance:
        others = " or ".join(repr(each) for each in LARGEST if each != settings.vary)
        raise Refusal(
            f"{where}: with {settings.vary} {number * unit}, the nearest, its {MEASURES[settings.by]} are {off:+.1%}"
            f" off those of {settings.to!r}; set match.tolerance={abs(off) * 1.01:.3f}, a smaller match.multiple_of, or"
            f" vary {others} instead"
        )
    before, after = _numbers(config), _numbers(found)
    return Matched(found, {key: (before[key], after[key]) for key in after}, measures)


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


def _least(config: RunConfig, vary: Vary, unit: int) -> int:
    moe = config.model.moe
    if vary == "experts":
        if moe is None or config.model.num_dense_layers == config.model.num_layers:
            raise Refusal("match.vary='experts': this arm has no experts; vary 'inner', 'width' or 'depth'")
        return moe.experts_per_token
    return max(config.model.num_dense_layers, 1) if vary == "depth" else 1


def _numbers(config: RunConfig) -> dict[str, int]:
    """The keys that may be moved."""
    model, found = config.model, {"model.width": config.model.width, "model.num_layers": config.model.num_layers}
    if model.feed_forward_width is not None:
        found["model.feed_forward_width"] = model.feed_forward_width
    if model.moe is not None:
        found |= {"model.moe.expert_width": model.moe.expert_width, "model.moe.num_experts": model.moe.num_experts}
    return found


def _resized(config: RunConfig, vary: Vary, where: str, value: int) -> RunConfig:
    """The run with one number of its model set; of `inner` and `width`, those that go with it in proportion."""
    model = config.model
    table: dict[str, Any] = tomllib.loads(to_toml(config))
    own = table["model"]
    inner = _inner(config)
    scale = value / (model.width if vary == "width" else inner)
    if vary == "depth":
        own["num_layers"] = value
        if model.num_dense_layers == model.num_layers:
            own["num_dense_layers"] = value
    elif vary == "experts":
        own["moe"] = {**own["moe"], "num_experts": value}
    else:
        if vary == "width":
            own["width"] = value
        if model.feed_forward_width is not None:
            own["feed_forward_width"] = max(1, round(model.feed_forward_width * scale))
        if model.moe is not None:
            own["moe"] = {**own["moe"], "expert_width": max(1, round(model.moe.expert_width * scale))}
    return validate(table, RunConfig, where)


def _inner(config: RunConfig) -> int:
    """The width inside that a token meets in most layers."""
    model = config.model
    is_dense = model.moe is None or model.num_dense_layers == model.num_layers
    if is_dense:
        assert model.feed_forward_width is not None, "a dense model has one"
        return model.feed_forward_width
    assert model.moe is not None
    return model.moe.expert_width
