"""Strict configuration: TOML in, one frozen tree of sections out. Knows nothing of what the sections mean."""

import difflib
import json
import stat
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails


class Refusal(ValueError):
    """Something the user can mend; entry points print the message alone and exit with status 2."""


class Section(BaseModel):
    """A table of the configuration: frozen, every key known, every value of its type."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True
    )


AnySection = TypeVar("AnySection", bound=Section)
Table = dict[str, Any]
DEEPEST = 50
"""Tables and arrays inside one another that are looked at; keys that mean something lie less than ten deep."""
MOST_PARENTS = 20
"""Files that extend one another."""


def load(path: Path | str, overrides: Sequence[str], root: type[AnySection]) -> AnySection:
    """Read a TOML file, merge what it extends, apply `section.key=value` overrides and check every key.

    Raises Refusal naming the key, its value and the nearest valid key, before anything has started.
    """
    return validate(read(path, overrides), root, str(path))


def read(path: Path | str, overrides: Sequence[str]) -> Table:
    """The plain table of a TOML file and what it extends, with `section.key=value` overrides, unchecked."""
    table = read_table(Path(path))
    for override in overrides:
        apply_override(table, override)
    return table


def validate(table: Mapping[str, Any], root: type[AnySection], where: str) -> AnySection:
    """Turn a plain table into `root`, or refuse with one line for each thing that is wrong."""
    try:
        # Through JSON: strict mode then takes arrays for tuples, as TOML has no other way to write one.
        return root.model_validate_json(json.dumps(_taken(table, [root]), default=str))
    except Refusal as refusal:
        raise Refusal(f"{where}: {refusal}") from None
    except ValidationError as error:
        lines = [describe(problem, root) for problem in _first_of(error.errors())]
        raise Refusal("\n".join(f"{where}: {line}" for line in lines)) from None


def read_table(path: Path, below: tuple[Path, ...] = ()) -> Table:
    """Read one TOML file and the parent it `extends`; keys of the child win, tables are merged, arrays replaced."""
    try:
        path = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name too long or with a zero byte
        raise Refusal(f"{str(path)[:200]}: is no path of a configuration file: {error.__class__.__name__}") from None
    if path in below:
        raise Refusal(f"{path}: extends itself through {' -> '.join(p.name for p in (*below, path))}; break the circle")
    if len(below) > MOST_PARENTS:
        raise Refusal(f"{below[0]}: extends more than {MOST_PARENTS} files, one the other; write them as one")
    table = _parsed(path)
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise Refusal(f"{path}: extends={_shown(parent)} must be the path of one TOML file, relative to this one")
    return merge(read_table(path.parent / parent, (*below, path)), table)


def _parsed(path: Path) -> Table:
    """The table of one file, as it stands there."""
    if _is_endless(path):
        raise Refusal(f"{path}: is a pipe or a device; give a TOML file")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"{path}: no such configuration file{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise Refusal(f"{path}: is a folder; give a TOML file") from None
    except PermissionError:
        raise Refusal(f"{path}: may not be read; check its permissions") from None
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except ValueError as error:  # tomllib's own, or a number of thousands of digits
        raise Refusal(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise Refusal(f"{path}: not valid TOML: arrays lie too deep inside one another") from None
    except OSError as error:
        raise Refusal(f"{str(path)[:200]}: cannot be read: {error.strerror}") from None
    _check_depth(table, str(path))
    return table


def merge(parent: Mapping[str, Any], child: Mapping[str, Any]) -> Table:
    """The child's keys over the parent's, table by table."""
    return dict(parent) | {key: replacement(parent.get(key), value) for key, value in child.items()}


def replacement(old: Any, new: Any) -> Any:
    """What stands in the place of `old`: `new`, or both merged where they are tables of the same kind."""
    if isinstance(old, Mapping) and isinstance(new, Mapping) and new.get("kind", old.get("kind")) == old.get("kind"):
        return merge(old, new)
    return new


def apply_override(table: Table, override: str) -> None:
    """Apply one `section.key=value`; the value is read as TOML, and as a plain string where it is not TOML.

    A table takes the place of the whole one that was there; one key of it is reached by its own path. Items of arrays
    are reached by number: `context.stages.0.sequence_length=256`. `none` leaves out a key that may be left out.
    """
    dotted, equals, text = override.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names):
        raise Refusal(f"override {_quoted(override)}: write section.key=value, as in optimizer.learning_rate=1e-3")
    if len(names) > DEEPEST:
        raise Refusal(f"override {_quoted(override)}: no key lies more than {DEEPEST} tables deep")
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text.strip()  # lines of their own are no part of a value
    except (ValueError, RecursionError):
        value = text.strip()
    _check_depth(value, f"override {_quoted(override)}")
    place: Any = table
    for name in names[:-1]:
        place = _step_into(place, name, override)
    last: Any = _index(place, names[-1], override) if isinstance(place, list) else names[-1]
    if not isinstance(place, dict | list):
        raise Refusal(f"override {_quoted(override)}: {'.'.join(names[:-1])[:80]} is a value, not a table")
    place[last] = value


def to_dict(section: Section) -> Table:
    """The section as plain JSON and TOML values; keys that were left out stay out."""
    return section.model_dump(mode="json", exclude_none=True)


def to_toml(section: Section) -> str:
    """The resolved section as TOML text; `load` of it gives an equal section."""
    return tomli_w.dumps(to_dict(section))


def differences(old: Section, new: Section) -> list[str]:
    """One line for each key whose value differs: `optimizer.learning_rate: 0.003 -> 0.001`."""
    before, after = dict(_leaves(to_dict(old))), dict(_leaves(to_dict(new)))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {_shown(before.get(key))} -> {_shown(after.get(key))}" for key in keys]


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` or `; known: a, b`, to end a refusal with."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def describe(problem: ErrorDetails, root: type[Section]) -> str:
    """One line for one problem that pydantic found: the dotted key, the value, the way out."""
    place, message, value = problem["loc"], problem["msg"].removeprefix("Value error, "), problem["input"]
    if not place and problem["type"] == "value_error":  # between sections: the message has the keys
        return message
    key = ".".join(_name(step) for step in _without_tags(place, root)) or "the configuration"
    if problem["type"] == "extra_forbidden":
        known = sorted({name for section in _sections_at(place[:-1], root) for name in section.model_fields})
        return f"{key}: unknown key (value {_shown(value)}){nearest(str(place[-1]), known)}"
    if problem["type"] == "missing":
        return f"{key}: is missing and has no default; add it"
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kinds = [str(section.model_fields["kind"].default) for section in _sections_at(place, root)]
        if problem["type"] == "union_tag_not_found":
            return f"{key}: needs a kind; known: {', '.join(sorted(kinds))}"
        tag = problem.get("ctx", {}).get("tag")
        return f"{key}.kind: unknown kind {_quoted(str(tag))}{nearest(str(tag), kinds)}"
    if problem["type"] == "value_error" and isinstance(value, Mapping):
        return f"{key}: {message}"
    return f"{key}={_shown(value)}: {message}"


def _shown(value: object) -> str:
    text = json.dumps(value, default=str) if value is not None else "(left out)"
    return text if len(text) <= 80 else text[:77] + "..."


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _name(step: str | int) -> str:
    """A step of a key as a line can hold it."""
    text = str(step)
    return text if text.isprintable() and len(text) <= 80 else _quoted(text)


def _first_of(problems: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """The problems, without those that only follow: an array lacks items when one of them is wrong."""
    places = [problem["loc"] for problem in problems]
    return [
        problem
        for problem, place in zip(problems, places, strict=True)
        if problem["type"] != "too_short" or not any(len(p) > len(place) and p[: len(place)] == place for p in places)
    ]


def _check_depth(value: Any, where: str) -> None:
    """Refuse tables and arrays that lie deeper inside one another than what looks at them can go."""
    level, depth = [value], 0
    while level := [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]:
        depth += 1
        if depth > DEEPEST:
            raise Refusal(f"{where}: tables and arrays lie more than {DEEPEST} deep inside one another; no key does")


def _leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{number}")
    else:
        yield key, value


def _step_into(place: Any, name: str, override: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, name, override)]
    if not isinstance(place, dict):
        raise Refusal(f"override {_quoted(override)}: {name[:80]} lies below a value, not below a table")
    return place.setdefault(name, {})


def _index(items: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise Refusal(
            f"override {_quoted(override)}: {_quoted(name)} must be a number below {len(items)}, as it is of an array"
        )
    return int(name)


def _taken(value: Any, kinds: Sequence[object], key: str = "") -> Any:
    """The value without the keys that say "none" where they may be left out: so a child or an override takes one back.

    Raises Refusal for a whole number beyond 64 bits: TOML has none, and as a float it would be infinite.
    """
    if isinstance(value, list):
        return [_taken(item, _inside(kinds, number), f"{key}.{number}") for number, item in enumerate(value)]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise Refusal(f"{key}={_shown(value)}: is beyond 64 bits; use a smaller number")
    if not isinstance(value, Mapping):
        return value
    taken = {}
    for name, inner in value.items():
        fields = [section.model_fields[name] for section in _sections_of(kinds) if name in section.model_fields]
        if inner == "none" and any(field.default is None for field in fields):
            continue
        taken[name] = _taken(inner, _inside(kinds, name), f"{key}.{_name(name)}" if key else _name(name))
    return taken


def _is_endless(path: Path) -> bool:
    """Whether reading may wait, or go on, for ever: a pipe or a device."""
    try:
        mode = path.stat().st_mode
    except OSError:  # reading says it better
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _nearest_file(path: Path) -> str:
    siblings = [sibling.name for sibling in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    return nearest(path.name, siblings) if siblings else ""


def _kinds_in(annotation: object) -> Iterator[object]:
    """The types that an annotation allows, one by one."""
    if typing.get_origin(annotation) is typing.Annotated:
        yield from _kinds_in(typing.get_args(annotation)[0])
    elif typing.get_origin(annotation) in (typing.Union, UnionType):
        for inner in typing.get_args(annotation):
            yield from _kinds_in(inner)
    else:
        yield annotation


def _sections_of(kinds: Sequence[object]) -> list[type[Section]]:
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]


def _inside(kinds: Sequence[object], step: str | int) -> list[object]:
    """The types of what a key of a section, an item of an array or an entry of a dictionary may be."""
    fields = [section.model_fields.get(str(step)) for section in _sections_of(kinds)]
    annotations = [field.annotation for field in fields if field is not None]
    for kind in kinds:
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin is tuple or origin is list:
            annotations.append(inner[0])
        elif origin is dict:
            annotations.append(inner[1])
    return [kind for annotation in annotations for kind in _kinds_in(annotation)]


def _walk(place: Sequence[str | int], root: type[Section]) -> Iterator[tuple[str | int, bool, list[object]]]:
    """For each step of an error's path: the step, whether it is only a union's tag, and the types it leads to."""
    kinds: list[object] = [root]
    for step in place:
        sections = _sections_of(kinds)
        tagged = [s for s in sections if "kind" in s.model_fields and s.model_fields["kind"].default == step]
        is_tag = bool(tagged) and len(sections) > 1
        kinds = list(tagged) if is_tag else _inside(kinds, step)
        yield step, is_tag, kinds


def _without_tags(place: Sequence[str | int], root: type[Section]) -> list[str | int]:
    return [step for step, is_tag, _ in _walk(place, root) if not is_tag]


def _sections_at(place: Sequence[str | int], root: type[Section]) -> list[type[Section]]:
    return _sections_of([root] if not place else [kinds for _, _, kinds in _walk(place, root)][-1])


__all__ = ["Refusal", "Section", "differences", "load", "nearest", "to_dict", "to_toml", "validate"]
