"""Which tasks a run is asked, and when."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from context.rotary import AnyRotary
from evals import (
    copying,
    held_out,
    induction,
    k_shot_copy,
    last_tokens,
    long_ppl,
    many_needles,
    mqar,
    needle,
    passkey,
    positions,
    routing,
    routing_positions,
)
from evals.copying import CopyingSettings
from evals.grid import effective_cells
from evals.held_out import HeldOutSettings
from evals.induction import InductionSettings
from evals.k_shot_copy import KShotCopySettings
from evals.last_tokens import LastTokensSettings
from evals.long_ppl import LongPplSettings
from evals.many_needles import ManyNeedlesSettings
from evals.mqar import MqarSettings
from evals.needle import NeedleSettings
from evals.passkey import PasskeySettings
from evals.positions import PositionsSettings
from evals.routing import RoutingSettings
from evals.routing_positions import RoutingPositionsSettings
from evals.ruler import asking as ruler
from evals.ruler.asking import RulerSettings
from evals.scoring import Cell, Materials
from model.transformer import Transformer
from settings import Section, nearest


@dataclass(frozen=True)
class Task:
    """One kind of question: `run` answers it, `check` refuses beforehand what `run` could not do, and may return a
    line that says which part of it is left out."""

    check: Callable[[Any, Materials], str | None]
    run: Callable[[nn.Module, Any, Materials, int], list[Cell]]


TASKS = {
    "held_out": Task(held_out.check, held_out.run),
    "needle": Task(needle.check, needle.run),
    "many_needles": Task(many_needles.check, many_needles.run),
    "passkey": Task(passkey.check, passkey.run),
    "ruler": Task(ruler.check, ruler.run),
    "positions": Task(positions.check, positions.run),
    "last_tokens": Task(last_tokens.check, last_tokens.run),
    "long_ppl": Task(long_ppl.check, long_ppl.run),
    "mqar": Task(mqar.check, mqar.run),
    "induction": Task(induction.check, induction.run),
    "copying": Task(copying.check, copying.run),
    "k_shot_copy": Task(k_shot_copy.check, k_shot_copy.run),
    "routing": Task(routing.check, routing.run),
    "routing_positions": Task(routing_positions.check, routing_positions.run),
}


class EvalsSettings(Section):
    """One table a task; a task with a table is asked."""

    every_tokens: PositiveInt | None = None
    """Asked at the first step at or after each multiple of so many tokens; left out, at stage ends alone."""
    share: float | None = Field(default=None, gt=0, le=1)
    """In place of every_tokens: asked as often as it may be to cost this share of the training's operations, at stage
    ends beyond that (evals/cost.py)."""
    at_stage_ends: bool = True
    """Asked at the end of each stage, and of the run."""
    at_stage_starts: bool = False
    """Asked at the beginning of each stage after the first: its RoPE has taken over, and no step is made yet."""
    tasks: tuple[str, ...] | None = None
    """Which of the tables are used; left out, all of them; []: none, a run is asked nothing."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    held_out: HeldOutSettings | None = None
    needle: NeedleSettings | None = None
    many_needles: ManyNeedlesSettings | None = None
    passkey: PasskeySettings | None = None
    ruler: RulerSettings | None = None
    positions: PositionsSettings | None = None
    last_tokens: LastTokensSettings | None = None
    long_ppl: LongPplSettings | None = None
    mqar: MqarSettings | None = None
    induction: InductionSettings | None = None
    copying: CopyingSettings | None = None
    k_shot_copy: KShotCopySettings | None = None
    routing: RoutingSettings | None = None
    routing_positions: RoutingPositionsSettings | None = None

    @model_validator(mode="after")
    def check_interval(self) -> "EvalsSettings":
        if self.share is not None and self.every_tokens is not None:
            raise ValueError(f"share={self.share} and every_tokens={self.every_tokens} both say how often; give one")
        return self

    @model_validator(mode="after")
    def check_tasks(self) -> "EvalsSettings":
        for number, name in enumerate(self.tasks or ()):
            if name in (self.tasks or ())[:number]:
                raise ValueError(f"tasks: {name!r} stands twice; give it once")
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


def check_suite(settings: EvalsSettings, materials: Materials) -> list[str]:
    """Refuse at the start of a run, not hours into it, what the tasks could not be asked; a line for each that leaves
    a part of itself out."""
    lines = [TASKS[name].check(getattr(settings, name), materials) for name in tasks_of(settings)]
    return [line for line in lines if line is not None]


def run_suite(
    model: Transformer,
    settings: EvalsSettings,
    materials: Materials,
    next_rotary: AnyRotary | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[Cell]:
    """Ask the model every task; the same settings and materials ask every model the same.

    next_rotary: at a stage's end the RoPE of the next one; what it does to the routing is then asked as well.
    say: is told beforehand what is left out.
    """
    for line in check_suite(settings, materials):
        say(line)
    cells = [
        cell
        for name in tasks_of(settings)
        for cell in TASKS[name].run(model, getattr(settings, name), materials, settings.seed)
    ]
    return cells + effective_cells(cells) + shift_routing(model, settings, materials, next_rotary)


def shift_routing(
    model: Transformer, settings: EvalsSettings, materials: Materials, next_rotary: AnyRotary | None
) -> list[Cell]:
    """What the next stage's RoPE does to the routing; nothing where none takes over or routing is not asked."""
    if next_rotary is None or settings.routing is None or "routing" not in tasks_of(settings):
        return []
    return routing.shift(model, settings.routing, materials, settings.seed, next_rotary)
