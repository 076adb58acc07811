"""Runs of one label whose configurations differ in more than the seed: they are no seeds of one arm."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from comparison.seen import SeenRun, arms_of

OF_A_SEED = ("name", "seed", "branch.run")
"""What differs between seeds of one arm."""
OF_A_PLACE = ("device", "threads", "trial", "log", "watchdog", "checkpoint", "profile")
"""Keys and tables that say where and how a run is watched and kept, and not what is trained."""
MOST_KEYS = 8


def pooled(runs: Sequence[SeenRun]) -> Iterator[str]:
    """A warning an arm whose runs differ in what is trained, with the keys."""
    for arm, own in arms_of(runs).items():
        flats = [dict(leaves(run.config)) for run in own if run.config]
        keys = [key for key in differing(flats) if key.partition(".")[0] not in OF_A_PLACE]
        if keys:
            more = f" and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else ""
            yield (
                f"{arm}: its {len(own)} runs are no seeds of one arm, as their configurations differ in "
                f"{', '.join(keys[:MOST_KEYS])}{more}; means and intervals over them mix different things: give "
                "each a label of its own"
            )


def differing(flats: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys, in order, that are not the same in all; those of a seed are left out."""
    keys = dict.fromkeys(key for each in flats for key in each if key not in OF_A_SEED)
    return [key for key in keys if len({each.get(key) for each in flats}) > 1]


def every(told: Sequence[str]) -> str:
    """All that runs of one arm say, each once; those that say nothing are passed over."""
    return " / ".join(dict.fromkeys(each for each in told if each))


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of all that is no table."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield from leaves(dict(enumerate(value)), key)
    else:
        yield key, str(value)
