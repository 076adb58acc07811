"""Keys laid over a table of a configuration: merged table by table, items of arrays reached by number."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from settings import Refusal, Table


def with_keys(table: Table, keys: Table, where: str) -> Table:
    """The table with `keys` laid over it; one in quotes is a path, and what stands under it is merged with nothing."""
    for key, value in keys.items():
        path = key.split(".")
        table = put(table, path, value, where) if len(path) > 1 else laid_over(table, {key: value}, where)
    return table


def laid_over(old: Any, new: Any, where: str) -> Any:
    """`old` with the keys of `new`: tables of one kind are merged, items of arrays are reached by number."""
    if isinstance(old, list) and isinstance(new, Mapping):
        _check_numbers(new, old, where)
        return [laid_over(item, new.get(str(n), item), f"{where}.{n}") for n, item in enumerate(old)]
    if isinstance(old, Mapping) and isinstance(new, Mapping) and new.get("kind", old.get("kind")) == old.get("kind"):
        return {**old, **{key: laid_over(old.get(key), value, f"{where}.{key}") for key, value in new.items()}}
    return new


def put(old: Any, path: Sequence[str], new: Any, where: str) -> Any:
    """`old` with `new` at the end of the path, in place of all that was there."""
    if not path:
        return new
    name, *rest = path
    if isinstance(old, list):
        _check_numbers([name], old, where)
        return [put(item, rest, new, f"{where}.{n}") if str(n) == name else item for n, item in enumerate(old)]
    table = old if isinstance(old, Mapping) else {}
    return {**table, name: put(table.get(name), rest, new, f"{where}.{name}")}


def _check_numbers(names: Iterable[str], items: list[Any], where: str) -> None:
    for name in names:
        if name not in map(str, range(len(items))):
            raise Refusal(f"{where}.{name}: is no item of an array of {len(items)}; use a number below {len(items)}")
