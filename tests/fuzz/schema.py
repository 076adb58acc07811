"""The schema as the fuzzer sees it: every key with its bounds, and values that fit or just do not."""

import typing
from collections.abc import Iterator
from random import Random
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt, MinLen

from settings import Section

Table = dict[str, Any]
Path = tuple[str | int, ...]
NAMES = ("words", "needles")
"""Sources of the smallest run: what a dictionary's keys and most strings may well be."""


class Facet(NamedTuple):
    """One way to fill a key: a type, and what bounds it."""

    kind: Any
    bounds: tuple[Any, ...]


def facets(annotation: Any, bounds: tuple[Any, ...] = ()) -> Iterator[Facet]:
    """Every alternative of an annotation, `None` left out."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        yield from facets(inner, (*bounds, *more))
    elif origin in (typing.Union, UnionType):
        for inner in typing.get_args(annotation):
            yield from facets(inner, bounds)
    elif annotation is not NoneType:
        yield Facet(annotation, bounds)


def fields(section: type[Section]) -> dict[str, list[Facet]]:
    """The alternatives of each key of a section."""
    return {name: list(facets(f.annotation, tuple(f.metadata))) for name, f in section.model_fields.items()}


def kind_of(section: type[Section]) -> str | None:
    """The word that chooses this section among others."""
    return str(section.model_fields["kind"].default) if "kind" in section.model_fields else None


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def edges(bounds: tuple[Any, ...]) -> list[float]:
    """The numbers where a bound begins to hold, and their neighbours."""
    found: list[float] = []
    for bound in bounds:
        for meaning, name in ((Ge, "ge"), (Gt, "gt"), (Le, "le"), (Lt, "lt")):
            if isinstance(bound, meaning):
                edge = getattr(bound, name)
                found += [edge - 1, edge, edge + 1]
        found += edges(tuple(getattr(bound, "metadata", ())))  # pydantic keeps some in a FieldInfo
    return found


def numbers_of(facet: Facet) -> list[float]:
    """The edges of a number's bounds; beyond what is not bounded, very large ones."""
    found = edges(facet.bounds) or [-1, 0, 1]
    huge: list[float] = [10**6, 2**40, 2**63 - 1] if facet.kind is int else [1e-300, 1e30, 1e308]
    return [facet.kind(number) for number in dict.fromkeys([*found, *(huge if max(found) < 10**6 else [])])]


def sample(facet: Facet, rng: Random, depth: int = 0) -> Any:
    """A value of the facet's type, more often than not within its bounds."""
    kind, bounds = facet
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if is_section(kind):
        return grown(kind, rng, depth + 1)
    if origin is Literal:
        return rng.choice(inner)
    if origin is tuple and (len(inner) == 2 and inner[1] is Ellipsis):
        least = max((bound.min_length for bound in bounds if isinstance(bound, MinLen)), default=0)
        return [_any(inner[0], rng, depth) for _ in range(max(least, rng.randrange(1, 4)))]
    if origin is tuple:
        return [_any(each, rng, depth) for each in inner]
    if origin is dict:
        return {rng.choice(NAMES): _any(inner[1], rng, depth) for _ in range(rng.randrange(1, 3))}
    if kind is bool:
        return rng.random() < 0.5
    if kind in (int, float):
        return _number(kind, bounds, rng)
    if kind is str:
        return rng.choice([*NAMES, "words.txt", "runs/other", "auto", "x"])
    return rng.choice([1, "words", 0.5])  # Any


def _any(annotation: Any, rng: Random, depth: int) -> Any:
    alternatives = list(facets(annotation))
    if depth > 4:  # sections that hold sections: come to an end
        alternatives = [facet for facet in alternatives if not is_section(facet.kind)] or alternatives
    return sample(rng.choice(alternatives), rng, depth)


def _number(kind: type, bounds: tuple[Any, ...], rng: Random) -> float:
    chosen = rng.choice([1, 2, 4, 8, 16, 64, 128, 512, 0.5, 0.25, 1e-3, 10_000.0, *edges(bounds)])
    return int(chosen) if kind is int else float(chosen)


def grown(section: type[Section], rng: Random, depth: int = 0) -> Table:
    """A table for the section: what it needs, and some of what it may have."""
    table: Table = {}
    for name, alternatives in fields(section).items():
        if name == "kind":
            table[name] = kind_of(section)
        elif alternatives and (section.model_fields[name].is_required() or rng.random() < 0.2 / (depth + 1)):
            table[name] = sample(rng.choice(alternatives), rng, depth)
    return table


def sections_at(facet_list: list[Facet], table: Any) -> list[type[Section]]:
    """The sections among alternatives that a table there may stand for."""
    found = [facet.kind for facet in facet_list if is_section(facet.kind)]
    kind = table.get("kind") if isinstance(table, dict) else None
    return [section for section in found if len(found) == 1 or kind_of(section) == kind]


def walk(table: Any, alternatives: list[Facet], path: Path = ()) -> Iterator[tuple[Path, str, list[Facet]]]:
    """Every key that the schema knows within a table, there or not: the path of its section, its name, its facets."""
    for section in sections_at(alternatives, table):
        for name, inner in fields(section).items():
            yield path, name, inner
            if isinstance(table, dict) and name in table:
                yield from walk(table[name], inner, (*path, name))
    for facet in alternatives:
        origin, inner_types = typing.get_origin(facet.kind), typing.get_args(facet.kind)
        if origin is tuple and isinstance(table, list):
            for number, item in enumerate(table):
                yield from walk(item, list(facets(inner_types[0])), (*path, number))
        if origin is dict and isinstance(table, dict):
            for name, item in table.items():
                yield from walk(item, list(facets(inner_types[1])), (*path, name))


def names(section: type[Section]) -> set[str]:
    """Every key that stands somewhere below a section, whatever kinds are chosen."""
    found: set[str] = set()
    waiting, seen = [section], set[type[Section]]()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        found |= set(current.model_fields)
        waiting += [s for alternatives in fields(current).values() for facet in alternatives for s in _below(facet)]
    return found


def _below(facet: Facet) -> Iterator[type[Section]]:
    if is_section(facet.kind):
        yield facet.kind
    for inner in typing.get_args(facet.kind):
        if inner is not Ellipsis:
            for each in facets(inner):
                yield from _below(each)


def numbers(root: type[Section], table: Table, rng: Random) -> Iterator[tuple[Path, Table, float]]:
    """For every numeric key of the schema the numbers at its bounds and beside them, and the changes that lead there.

    Yields the path, a table in which the sections on the way there exist, and the number.
    """
    yield from _numbers([Facet(root, ())], table, (), lambda value: value, rng, ())


def _numbers(  # noqa: PLR0917 (a walk that carries where it is)
    alternatives: list[Facet], here: Any, path: Path, into: Any, rng: Random, seen: tuple[type, ...]
) -> Iterator[tuple[Path, Table, float]]:
    for facet in alternatives:
        origin, inner = typing.get_origin(facet.kind), typing.get_args(facet.kind)
        if facet.kind in (int, float):
            for number in numbers_of(facet):
                yield path, into(number), number
        elif is_section(facet.kind) and facet.kind not in seen:
            fits = isinstance(here, dict) and facet.kind in sections_at(alternatives, here)
            base = here if fits else grown(facet.kind, Random(0), 9)
            for name, below in fields(facet.kind).items():

                def inside(value: Any, name: str = name, base: Table = base) -> Table:
                    return into({**base, name: value})

                yield from _numbers(below, base.get(name), (*path, name), inside, rng, (*seen, facet.kind))
        elif origin is tuple:
            items = here if isinstance(here, list) and here else [None]

            def first(value: Any, items: list[Any] = items) -> Table:
                return into([value, *items[1:]])

            yield from _numbers(list(facets(inner[0])), items[0], (*path, 0), first, rng, seen)
        elif origin is dict:
            taken = here if isinstance(here, dict) and here else {NAMES[0]: None}
            name = next(iter(taken))

            def one(value: Any, name: str = name, taken: dict[str, Any] = taken) -> Table:
                return into({**taken, name: value})

            yield from _numbers(list(facets(inner[1])), taken[name], (*path, name), one, rng, seen)
