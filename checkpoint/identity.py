"""What makes two configurations the same run: everything but where it is computed and how it is watched.

A recorded configuration is read as today's: keys that it lacks take their defaults, so a key that is added needs a
default that means what was done before there was one. A key that is renamed or removed needs a row of MIGRATIONS.
"""

import tomllib
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from settings import AnySection, Refusal, Section, Table, differences, validate

MAY_CHANGE = (
    *("name", "device", "log", "checkpoint", "profile", "threads", "parallel", "trial"),
    *("recompute", "offload", "watchdog"),
)
"""The keys under which a run may continue with other values; its folder may be renamed and copied."""
MAY_CHANGE_INSIDE = (
    *("model.moe.router.at_eval", "context.stages.*.context"),
    *("guard.most_skipped", "guard.spike.most_roll_backs"),
)
"""Keys further down that no trained number depends on; * is any number."""


def different(recorded_toml: str, config: Section) -> list[str]:
    """One line for each key of a recorded configuration, `MAY_CHANGE` left out, that differs or is known no more."""
    try:
        return changed(read_recorded(recorded_toml, type(config), "recorded"), config)
    except Refusal as refusal:
        return str(refusal).splitlines()


def changed(before: Section, now: Section) -> list[str]:
    """One line for each key, `MAY_CHANGE` left out, whose value differs: `optimizer.learning_rate: 0.003 -> 0.001`."""
    free = {key: getattr(now, key) for key in MAY_CHANGE if key in type(now).model_fields}
    lines = differences(before.model_copy(update=free), now)
    return [line for line in lines if not may_change(line)]


def may_change(line: str) -> bool:
    """Whether this line of differences is about a key further down that may change."""
    return any(fnmatchcase(line.partition(":")[0], key) for key in MAY_CHANGE_INSIDE)


def read_recorded(text: str, root: type[AnySection], where: str) -> AnySection:
    """The configuration that this or an older version wrote down, as this version means it.

    Raises Refusal naming what is no TOML, unknown, missing or impossible.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Refusal(f"{where}: not valid TOML: {error}") from None
    for path, migrate in MIGRATIONS.items():
        *names, last = path.split(".")
        place: Any = table
        for name in names:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict) and last in place:
            place[last] = migrate(place[last])
    return validate(table, root, where)


def _list_of_rules(balance: Any) -> Any:
    """One rule was a table, and kind "bias" had a loss beside it: now a list, the bias first."""
    if not isinstance(balance, dict):
        return balance
    rule: Table = dict(balance)
    coefficient = rule.pop("coefficient", 0.0) if rule.get("kind") == "bias" else 0.0
    return [rule, {"kind": "loss", "coefficient": coefficient}] if coefficient else [rule]


MIGRATIONS: dict[str, Callable[[Any], Any]] = {"model.moe.balance": _list_of_rules}
"""For each key whose meaning has changed: its old value to today's. A value of today must pass unchanged."""
