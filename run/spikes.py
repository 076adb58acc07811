"""When a step's loss or gradient norm is too far above those before it: a pure judgement over a window of numbers."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from settings import Section

Measured = Literal["loss", "gradient_norm"]


class SpikeSettings(Section):
    """What counts as a spike, and what is done about it."""

    action: Literal["skip", "roll_back"] = "skip"
    """skip: the step's update is left out. roll_back: so are all since the newest good checkpoint, which is restored;
    their data is passed over (PaLM, section 5.1)."""
    window: int = Field(default=128, ge=2)
    """Steps before it that a step is compared with; it is judged once there are half as many."""
    deviations: float = Field(default=6.0, gt=0)
    """A number so many standard deviations above the window's mean is a spike."""
    of: tuple[Measured, ...] = Field(default=("loss", "gradient_norm"), min_length=1)
    """Numbers that are watched: each of them alone may be a spike."""
    most_roll_backs: int = Field(default=3, ge=1)
    """How often the run may go back before it stops."""


class History:
    """The watched numbers of the last steps that were taken, in this stage."""

    def __init__(self, settings: SpikeSettings | None) -> None:
        """settings: None: nothing is kept, and nothing is a spike."""
        self.settings = settings
        self._kept: dict[Measured, deque[float]] = {}
        if settings is not None:
            self._kept = {name: deque(maxlen=settings.window) for name in settings.of}

    def spike(self, numbers: Mapping[Measured, float]) -> str | None:
        """Why finite numbers are a spike, in one clause; None where they are none."""
        for name, kept in self._kept.items():
            if self.settings is None or len(kept) < max(2, self.settings.window // 2):
                continue
            mean, deviation = mean_and_deviation(kept)
            if numbers[name] > mean + self.settings.deviations * deviation:
                return (
                    f"the {name.replace('_', ' ')} is {numbers[name]:.4g} after a mean of {mean:.4g} +- {deviation:.2g}"
                )
        return None

    def add(self, numbers: Mapping[Measured, float]) -> None:
        """Remember the numbers of a step that was taken."""
        for name, kept in self._kept.items():
            kept.append(numbers[name])

    def forget(self) -> None:
        """Begin anew: another stage has other rows, and so another loss."""
        for kept in self._kept.values():
            kept.clear()

    def state(self) -> dict[str, Any]:
        """Plain JSON, of which `restore` makes the same numbers bit for bit."""
        return {name: list(kept) for name, kept in self._kept.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; numbers that were not kept then are missing."""
        for name, kept in self._kept.items():
            kept.clear()
            kept.extend(state.get(name, ()))


def mean_and_deviation(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, rounded once each: the same for the same numbers in any order."""
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))
