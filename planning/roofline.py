"""What no step can beat: operations at the best product that was measured, bytes at the best copy, what is sent at its
link.

A part's floor is the greatest of these, as if it did all at once (Williams et al. 2009); a step's floor is the greatest
of their sums, as if all of its parts did. What is greatest limits. Both are of what the configuration does: what it
computes again is in them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from planning.device import Device
from planning.forecast import Forecast
from planning.outlook import Row, seconds
from planning.step_parts import StepTime, Work


@dataclass(frozen=True)
class Floor:
    """The least time that some work can take on a device."""

    times: Mapping[str, float]
    """Seconds, by what has to do it: `compute`, `memory`, and a name of each kind of link."""

    @property
    def seconds(self) -> float:
        return max(self.times.values())

    @property
    def limit(self) -> str:
        """What takes longest; empty where there is nothing to do."""
        return max(self.times, key=lambda name: self.times[name]) if self.seconds else ""


def floor_of(work: Work, device: Device) -> Floor:
    """Of one part, or of several that are added up."""
    best, (inside, across) = device.best, device.link_names
    compute, memory = work.flops / best.product, work.moved / best.bandwidth
    return Floor({"compute": compute, "memory": memory, inside: work.inside, across: work.across})


def step_floor(step: StepTime, device: Device) -> Floor:
    """As if everything in a step could be done at a time."""
    return floor_of(reduce(add, (part.work for part in step.parts), Work()), device)


def roofline_rows(told: Sequence[Forecast], device: Device) -> Iterator[Row]:
    """Of every part and of the step: its floor, how much of the predicted time that is, and what limits."""
    title, names = "floor, what limits", [f"stage {forecast.stage.index}" for forecast in told]
    steps = [forecast.step for forecast in told]
    parts = [{part.name: part for part in step.parts} for step in steps]
    for name in dict.fromkeys(name for stage in parts for name in stage):
        found = [stage.get(name) for stage in parts]
        cells = [_in_words(floor_of(part.work, device), part.seconds) if part else "" for part in found]
        if any(cells):
            yield {title: name, **dict(zip(names, cells, strict=True))}
    floors = [step_floor(step, device) for step in steps]
    for resource in floors[0].times:
        if any(floor.times[resource] for floor in floors):
            cells = [seconds(floor.times[resource]) for floor in floors]
            yield {title: f"all {resource}", **dict(zip(names, cells, strict=True))}
    whole = (_in_words(floor, step.seconds) for floor, step in zip(floors, steps, strict=True))
    yield {title: "step", **dict(zip(names, whole, strict=True))}


def _in_words(floor: Floor, predicted: float) -> str:
    """`138 ms, 84%, compute`."""
    if not floor.seconds:
        return ""
    return f"{seconds(floor.seconds)}, {floor.seconds / predicted:.0%}, {floor.limit}"
