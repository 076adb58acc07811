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
        "copying": {"lags": sorted({max(2, length // 2) for length in lengths})},
        "k_shot_copy": {},
        "routing": window,
        "routing_positions": window,
    }


def with_lengths(name: str, table: Table, lengths: Sequence[int]) -> tuple[Table, list[str]]:
    """A task's table at other lengths of its rows, all of them; and a line where it cannot have them all, as it has
    one length or none. Raises Refusal for a length that no row of the task has."""
    odd = [length for length in lengths if length % 2]
    if "lags" in table and odd:
        raise Refusal(
            f"--lengths {odd[0]} is odd, but a row of {name} is a block and its copy; use {max(odd[0] + 1, 4)}"
        )
    ways: dict[str, Any] = {
        "lengths": sorted(lengths),
        "length": max(lengths),
        "lags": sorted(length // 2 for length in lengths),
    }
    changes = {key: ways[key] for key in ways if key in table}
    lines: list[str] = []
    if not changes:
        lines = [f"{name} has no lengths: it is asked as it is, whatever --lengths says"]
    elif "length" in changes and len(lengths) > 1:
        others = ", ".join(str(length) for length in sorted(lengths)[:-1])
        lines = [f"{name} has one length: it is asked at {max(lengths)}, and not at {others}"]
    return table | changes, lines


def choose(
    own: EvalsSettings, trained: int, materials: Materials, tasks: Sequence[str] | None, lengths: Sequence[int] | None
) -> tuple[EvalsSettings, list[str]]:
    """What to ask: the configuration's own tasks or those named, at their own lengths or those named.

    Also returned is a line for each task, or length of one, that is left out. No task is that was named; where neither
    the configuration nor the command names any, all are asked that this text and length allow.
    """
    table, around = to_dict(own), tables_around(trained, materials)
    named = list(tasks or tasks_of(own))
    possible: list[str] = []
    left_out: list[str] = []
    for name in named or [name for name in TASKS if name not in SLOW]:
        if name not in TASKS:
            continue  # refused below, with the nearest name
        given: Table = table.pop(name, around[name])
        lines: list[str] = []
        try:
            if lengths:
                given, lines = with_lengths(name, given, lengths)
            if not named:
                alone = validate({name: given}, EvalsSettings, "evals")
                TASKS[name].check(getattr(alone, name), materials)
        except Refusal as refusal:
            if named:
                raise
            left_out.append(f"{name} is left out: {refusal}")
        else:
            table[name] = given
            possible.append(name)
            left_out += lines
    return validate(table | {"tasks": named or possible}, EvalsSettings, "evals"), left_out
