"""Named arms crossed with what is swept and with sizes at budgets: all arms that run, each by a name of its own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from comparison.budgets import IsoFlopSettings, Point, points_of
from comparison.sweep import SweepSettings, sweep_cells
from settings import Refusal, Table, nearest

OWN = {
    "seed": "every arm runs under every seed and is held against the others of it; write seeds = [0, 1] at the top",
    "name": "runs are named for their base, seed and arm; give what their names begin with as --name",
}
"""Keys of a run that its comparison sets, and where."""


@dataclass(frozen=True)
class ArmPlan:
    """One arm that runs."""

    name: str
    arm: str
    """The named arm that it is made of; empty where a sweep needs none."""
    keys: Table
    """What that one does otherwise than its base."""
    cell: str = ""
    """Of the sweep."""
    cell_keys: Mapping[str, object] | None = None
    point: Point | None = None
    """Of isoFLOP curves."""

    @property
    def family(self) -> str:
        """Its name without the size and the budget: what one isoFLOP curve is of."""
        return "-".join(part for part in (self.arm, self.cell) if part) or "all"


def crossed(
    arms: Mapping[str, Table], sweep: SweepSettings | None, isoflop: IsoFlopSettings | None
) -> dict[str, ArmPlan]:
    """By name, in order. Raises Refusal where two would have one name, or a sweep names an arm that is none."""
    named = arms or {"": {}}
    for arm in sweep.arms if sweep else ():
        if arm not in arms:
            raise Refusal(f"sweep.arms: no arm {arm!r}{nearest(arm, list(arms))}")
    found: dict[str, ArmPlan] = {}
    for arm, keys in named.items():
        is_swept = sweep is not None and arm in (sweep.arms or named)
        cells = sweep_cells(sweep) if sweep is not None and is_swept else {"": {}}
        for cell, cell_keys in cells.items():
            for point in points_of(isoflop) if isoflop else [None]:
                name = "-".join(part for part in (arm, cell, point.name if point else "") if part)
                if name in found:
                    raise Refusal(f"two arms would be called {name!r}; give the arm {arm!r} another name")
                found[name] = ArmPlan(name, arm, keys, cell, cell_keys or None, point)
    return found


def check_own(sweep: SweepSettings | None, laid: Mapping[str, Iterable[str]]) -> None:
    """Raises ValueError for a key that the comparison sets: a run of another seed than its entry is no pair.

    laid: keys that are laid over those of runs, by where they stand; besides those of the sweep.
    """
    cells = {f"sweep.list.{number}": cell for number, cell in enumerate(sweep.list)} if sweep else {}
    swept = {"sweep.grid": sweep.grid, **cells} if sweep else {}
    for where, key in ((where, key) for where, keys in {**laid, **swept}.items() for key in keys):
        own = key.partition(".")[0]
        if own in OWN:
            raise ValueError(f"{where}.{key}: {OWN[own]}")
