"""Arms that take as long as one of them, by steps that are timed: a plan knows too little of what is here."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from comparison.match import Matched, MatchSettings, Pace, Search, measure, planned_seconds, stage_seconds
from comparison.resize import number_of
from planning.device import Device
from run.config import RunConfig
from settings import Refusal

REACH = 2.0
"""How many times larger or smaller the next size that is timed may be."""


def timed_match(  # noqa: PLR0917 (as match, and the clock)
    config: RunConfig,
    other: RunConfig,
    settings: MatchSettings,
    device: Device,
    where: str,
    time_steps: Callable[[RunConfig], Sequence[float]],
    rounds: int = 4,
) -> Matched:
    """As `match`, by plans held against timed steps: each size that is found is timed, and mends what the plan says.

    time_steps: a step's seconds in each stage. Ends with a size that was timed within the tolerance; raises Refusal
    where none was after so many rounds.
    """
    vary, there = settings.varied(where), time_steps(other)
    measures = measure(other, device, _pace(other, device, there))
    paces = {number_of(config, vary): _pace(config, device, time_steps(config))}
    search = Search(config, settings, device, where, lambda run: _pace_at(number_of(run, vary), paces))
    found, off, turn, paces_there = config, math.inf, 0, [1.0]
    while abs(off) > settings.most_off and turn < rounds:
        turn, last = turn + 1, number_of(found, vary)
        # The plan may be far from the truth far from what was timed.
        found = search.nearest(measures.seconds, (last / REACH, last * REACH))
        again, beside = time_steps(found), time_steps(other)
        # Both are timed in turn: a machine that others slow down for a while slows both.
        slower = planned_seconds(other, device, _pace(other, device, beside)) / measures.seconds
        paces_there.append(slower)
        paces[number_of(found, vary)] = tuple(each / slower for each in _pace(found, device, again))
        off = search.value_of(found) / measures.seconds - 1
    if abs(off) > settings.most_off:
        spread = max(paces_there) / min(paces_there) - 1
        raise Refusal(
            f"{search.told(found, off)}, as timed in round {turn} of {rounds}, and steps of {settings.to!r} itself "
            f"differ by {spread:.1%} from one timing to another; {search.ways_out(abs(off))}, or time them where "
            "nothing else runs"
        )
    notes = (
        f"seconds are measured: median steps of {_told(beside)} ({settings.to}) and {_told(again)} ({where}), by stage",
        f"timed again at the size that was found, in round {turn}: {off:+.1%} off",
    )
    return replace(search.matched(found, measures), notes=notes)


def _pace(config: RunConfig, device: Device, steps: Sequence[float]) -> Pace:
    planned = stage_seconds(config, device)
    return tuple(step * stage.num_steps / each for step, each, stage in zip(steps, planned, config.stages, strict=True))


def _pace_at(number: int, paces: Mapping[int, Pace]) -> Pace:
    """Between numbers that were timed in proportion, beyond them that of the last."""
    known = sorted(paces)
    return tuple(
        float(np.interp(number, known, [paces[each][stage] for each in known])) for stage in range(len(paces[known[0]]))
    )


def _told(steps: Sequence[float]) -> str:
    return ", ".join(f"{step * 1000:.3g} ms" for step in steps)
