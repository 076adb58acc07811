"""What a checkpoint is asked where its configuration says nothing of a task: around the length it was trained at."""

from collections.abc import Sequence
from typing import Any

from evals.scoring import Materials
from evals.suite import TASKS, EvalsSettings, tasks_of
from settings import Refusal, Table, to_dict, validate

SLOW = ("ruler",)
"""Asked by name alone: thirteen tasks that let the model write."""


def tables_around(trained: int, materials: Materials) -> dict[str, Table]:
    """A table for each task: half, once, twice and four times the trained length, as far as the held-out text goes."""
    source = max(materials.held_out, key=lambda name: len(materials.held_out[name]), default="")
    available = len(materials.held_out.get(source, ()))
    lengths = [trained // 2, trained, 2 * trained, 4 * trained]
    within = [length for length in lengths if length <= available] or [trained]
    window: Table = {"length": trained}
    return {
        "held_out": {"lengths": [trained]},
        "needle": {"lengths": within, "haystack": source},
        "many_needles": {"lengths": within, "haystack": source},
        "passkey": {"lengths": lengths[1:]},
        "ruler": {"lengths": [trained]},
        "positions": window,
        "last_tokens": window,
        "long_ppl": window,
        "mqar": {"lengths": [trained + trained % 2]},
        "induction": {"lengths": lengths},
        "copying": {"lags": [max(2, length // 2) for length in lengths]},
        "k_shot_copy": {},
        "routing": window,
        "routing_positions": window,
    }


def with_lengths(table: Table, lengths: Sequence[int]) -> Table:
    """The table at other lengths of its rows: all of them, or the longest where it has one."""
    ways: dict[str, Any] = {
        "lengths": sorted(lengths),
        "length": max(lengths),
        "lags": sorted({length // 2 for length in lengths}),
    }
    return table | {key: ways[key] for key in ways if key in table}


def choose(
    own: EvalsSettings, trained: int, materials: Materials, tasks: Sequence[str] | None, lengths: Sequence[int] | None
) -> tuple[EvalsSettings, list[str]]:
    """What to ask: the configuration's own tasks or those named, at their own lengths or those named.

    Also returned is a line for each task left out. None is that was named; where neither the configuration nor the
    command names any, all are asked that this text and length allow.
    """
    table, around = to_dict(own), tables_around(trained, materials)
    named = list(tasks or tasks_of(own))
    asked = named or [name for name in TASKS if name not in SLOW]
    for name in asked:
        if name in around:
            table.setdefault(name, around[name])
            table[name] = with_lengths(table[name], lengths) if lengths else table[name]
    if named:
        return validate(table | {"tasks": asked}, EvalsSettings, "evals"), []
    possible, left_out = [], []
    for name in asked:
        try:
            alone = validate({name: table[name]}, EvalsSettings, "evals")
            TASKS[name].check(getattr(alone, name), materials)
            possible.append(name)
        except Refusal as refusal:
            left_out.append(f"{name} is left out: {refusal}")
            del table[name]
    return validate(table | {"tasks": possible}, EvalsSettings, "evals"), left_out
