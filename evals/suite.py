"""Which tasks a run is asked, and when."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from context.rotary import RotarySpec
from evals import held_out, needle, positions, routing
from evals.harness import Cell, Materials
from evals.held_out import HeldOutSettings
from evals.needle import NeedleSettings
from evals.positions import PositionsSettings
from evals.routing import RoutingSettings
from model.transformer import Transformer
from settings import Section, nearest


@dataclass(frozen=True)
class Task:
    """One kind of question: `run` answers it, `check` refuses beforehand what `run` could not do."""

    check: Callable[[Any, Materials], None]
    run: Callable[[nn.Module, Any, Materials, int], list[Cell]]


TASKS = {
    "held_out": Task(held_out.check, held_out.run),
    "needle": Task(needle.check, needle.run),
    "positions": Task(positions.check, positions.run),
    "routing": Task(routing.check, routing.run),
}


class EvalsSettings(Section):
    """One table a task; a task with a table is asked."""

    every_tokens: PositiveInt | None = None
    """Asked at the first step at or after each multiple of so many tokens; left out, at stage ends alone."""
    at_stage_ends: bool = True
    """Asked at the end of each stage, and of the run."""
    tasks: tuple[str, ...] | None = None
    """Which of the tables are used; left out, all of them."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    held_out: HeldOutSettings | None = None
    needle: NeedleSettings | None = None
    positions: PositionsSettings | None = None
    routing: RoutingSettings | None = None

    @model_validator(mode="after")
    def check_tasks(self) -> "EvalsSettings":
        for name in self.tasks or ():
            if name not in TASKS:
                raise ValueError(f"tasks: unknown task {name!r}{nearest(name, list(TASKS))}")
            if getattr(self, name) is None:
                raise ValueError(
                    f"tasks names {name!r}, which has no table; add [evals.{name}] or take it out of tasks"
                )
        return self


def tasks_of(settings: EvalsSettings) -> list[str]:
    """The tasks to ask, in the order they are asked."""
    if settings.tasks is not None:
        return list(settings.tasks)
    return [name for name in TASKS if getattr(settings, name) is not None]


def is_due(settings: EvalsSettings, tokens_before: int, tokens_after: int, *, is_stage_end: bool) -> bool:
    """Whether the step from so many tokens to so many is followed by evals."""
    if is_stage_end and settings.at_stage_ends:
        return True
    every = settings.every_tokens
    return every is not None and tokens_after // every > tokens_before // every


def check_suite(settings: EvalsSettings, materials: Materials) -> None:
    """Refuse at the start of a run, not hours into it, what the tasks could not be asked."""
    for name in tasks_of(settings):
        TASKS[name].check(getattr(settings, name), materials)


def run_suite(
    model: Transformer, settings: EvalsSettings, materials: Materials, next_rotary: RotarySpec | None = None
) -> list[Cell]:
    """Ask the model every task; the same settings and materials ask every model the same.

    next_rotary: at a stage's end the RoPE of the next one; what it does to the routing is then asked as well.
    """
    check_suite(settings, materials)
    cells = [
        cell
        for name in tasks_of(settings)
        for cell in TASKS[name].run(model, getattr(settings, name), materials, settings.seed)
    ]
    if next_rotary is not None and settings.routing is not None and "routing" in tasks_of(settings):
        cells += routing.shift(model, settings.routing, materials, settings.seed, next_rotary)
    return cells
