"""What a sweep has shown: the final loss of each cell, and which is the best, as far as seeds can tell."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from comparison.arms import Entry
from comparison.estimate import Estimate, estimate
from comparison.final import final_loss
from comparison.seen import read_seen


@dataclass(frozen=True)
class Swept:
    """One arm of a sweep on one base."""

    base: str
    arm: str
    """The named one; "" where there is none."""
    name: str
    keys: dict[str, Any]
    """Of its cell."""
    losses: dict[int, float]
    """By seed, nats a token."""
    source: str
    """What the losses are of."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses.values())


def swept(entries: Sequence[Entry]) -> list[Swept]:
    """Of the runs that are finished, arm by arm."""
    found: dict[tuple[str, str], Swept] = {}
    for entry in (entry for entry in entries if entry.plan is not None and entry.is_finished):
        run = read_seen(entry.folder, entry.arm or "", entry.seed, entry.base)
        final = final_loss(run) if run else None
        plan = entry.plan
        if final is not None and plan is not None:
            new = Swept(entry.base, plan.arm, plan.name, dict(plan.cell_keys or {}), {}, final.source)
            found.setdefault((entry.base, plan.name), new).losses[entry.seed] = final.loss
    return list(found.values())


def rows_of(found: Sequence[Swept]) -> list[dict[str, str]]:
    """A row a cell, column title to text, the best first."""
    keys = list(dict.fromkeys(key for each in found for key in each.keys))
    has_bases, has_arms = len({each.base for each in found}) > 1, any(each.arm for each in found)
    return [
        {
            **({"base": each.base} if has_bases else {}),
            **({"arm": each.arm} if has_arms else {}),
            **{key: _shown(each.keys[key]) if key in each.keys else "" for key in keys},
            "loss": _loss(each),
            "seeds": str(len(each.losses)),
        }
        for each in sorted(found, key=lambda each: (each.base, each.mean))
    ]


def lines_of(found: Sequence[Swept]) -> Iterator[str]:
    """Which cell is the best on each base, and what is known of that."""
    for base in dict.fromkeys(each.base for each in found):
        best, *others = sorted((each for each in found if each.base == base), key=lambda each: each.mean)
        said = f"{base}: the lowest loss is {best.name}, {_loss(best)} nats a token ({best.source})"
        yield f"{said}; {_against(best, others[0])}" if others else f"{said}; nothing else is finished"


def _against(best: Swept, second: Swept) -> str:
    """What seeds say of the two lowest. They were chosen by the same numbers, so that it may look larger than it is."""
    seeds = sorted(best.losses.keys() & second.losses.keys())
    known: Estimate | None = estimate([second.losses[seed] - best.losses[seed] for seed in seeds])
    if known is None:
        return f"{second.name} has no seed in common with it"
    if known.count == 1:
        return f"one seed gives no interval: {second.name} is {known.mean:+.4f}"
    told = (
        f"{known.mean:+.4f} [{known.mean - known.half:+.4f}, {known.mean + known.half:+.4f}] over {known.count} seeds"
    )
    if known.mean > known.half:
        return f"{second.name} is {told}"
    return f"no evidence that it is better than {second.name}: {told}"


def _loss(each: Swept) -> str:
    known = estimate(list(each.losses.values()))
    assert known is not None, "only what has a loss is here"
    return f"{known.mean:.4f}" + (f" ±{known.half:.4f}" if known.count > 1 else "")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
