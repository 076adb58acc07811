"""Sweeps: arms made of a grid or a list of keys and values, crossed with those that have names."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from settings import Refusal, Section, Table

MOST_CELLS = 1000


class SweepSettings(Section):
    """Every cell is laid over every named arm."""

    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Keys of a run's configuration, in quotes, and the values of each: a cell for each combination."""
    list: tuple[dict[str, Any], ...] = ()
    """Cells one by one: tables of such keys and a value each. They stand beside those of the grid."""
    arms: tuple[str, ...] = ()
    """The named arms that are crossed; left out, all. The others run as they are."""

    @model_validator(mode="after")
    def _has_cells(self) -> "SweepSettings":
        if not self.grid and not self.list:
            raise ValueError('names no value; give grid = { "optimizer.learning_rate" = [1e-3, 3e-3] }, or list')
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid: {key!r} has no values; give some, or leave it out")
        if not all(self.list):
            raise ValueError(
                "list: a cell without keys changes nothing; to run an arm as it is as well, give a cell one of the "
                "base's own values"
            )
        return self


def sweep_cells(settings: SweepSettings) -> dict[str, Table]:
    """Name of each cell -> keys and values. Raises Refusal for one that stands twice, and for too many."""
    keys = tuple(settings.grid)
    grid = (dict(zip(keys, values, strict=True)) for values in itertools.product(*settings.grid.values()))
    found: dict[str, Table] = {}
    for cell in itertools.chain(grid if keys else (), settings.list):
        if cell in found.values():
            raise Refusal(f"sweep: the cell {json.dumps(cell)} stands twice; it would say nothing new")
        if len(found) == MOST_CELLS:
            raise Refusal(f"sweep: has more than {MOST_CELLS} cells; take fewer values")
        name = "-".join(_words(cell))
        alike = sum(other == name or other.startswith(f"{name}-again") for other in found)
        found[f"{name}-again{alike + 1}" if alike else name] = dict(cell)
    return found


def _words(cell: Mapping[str, Any]) -> Iterator[str]:
    """`learning_rate_0_001`: the end of each key, as short as tells it from the others, and its value."""
    for key, value in cell.items():
        last = _last(key)
        path = [part for part in key.split(".") if part]
        is_alone = sum(_last(other) == last for other in cell) == 1
        yield f"{last if is_alone else '_'.join(path)}_{as_name(value)}"


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def as_name(value: Any) -> str:
    """A value as part of a folder's name: letters, digits, - and _."""
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9-]+", "_", text.replace("+", "")).strip("_") or "empty"
