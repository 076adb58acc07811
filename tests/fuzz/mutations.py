"""Configurations that somebody may have written: real ones, damaged in ways that follow from a seed alone.

`case(number)` is one of them: the files of an empty folder, and what is written behind `train.py` there.
"""

import copy
import datetime
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import tomli_w

from run.config import RunConfig
from settings import read, read_table
from tests.fuzz.schema import Facet, Table, edges, facets, is_section, sample, walk

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/tiny.toml"
DEVICES = {*(ROOT / "configs" / "devices").glob("*.toml")}
RUNS = (TINY, *sorted(p for p in {*(ROOT / "configs").rglob("*.toml")} - DEVICES if "arms" not in p.name))
ARMS = tuple(sorted(p for p in (ROOT / "configs").rglob("*.toml") if "arms" in p.name))
SCHEMA = [Facet(RunConfig, ())]
NAME = "case.toml"
MANY = " (several keys)"

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 1000, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 10**18, 2**63 - 1, 2**63, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 5e-324, 1e-308, 1e-16, 1e16, 1e308, float("inf"), -float("inf"), float("nan")),
)
STRINGS = (
    *("", " ", "none", "auto", "0", "true", "words", "x" * 100_000, "Größe", "漢字", "𝕏", "\u202eabc", "\u200b"),
    *("\x1b[31mred", "a\nb", "\n", "\t", "'", '"', "\\", "%s{}", "..", "../..", "/", "/etc/passwd", "/dev/null", "~"),
    *("-rf", "a/b", "a" * 255, "a" * 256, "word.txt", "words.txt/x", "runs", "\x00", "a\x00b", "_", "1e3", "٣"),
)
OTHERS: tuple[Any, ...] = (
    *(True, False, [], {}, [[]], [{}], [None], {"": 1}, {"kind": "x"}, {"kind": 3}, {"kind": ["yarn"]}, [1, "a", 2.0]),
    *(datetime.date(2026, 1, 1), datetime.time(1, 2), datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)),
)


@dataclass
class Case:
    """Files of an empty folder, and a command there."""

    label: str
    words: list[str]
    """Behind `python train.py`, or `python compare.py`."""
    files: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    """What was changed, in words."""
    door: str = "train"
    ranks: int = 1

    @property
    def is_single(self) -> bool:
        """Whether one key alone was changed, so that one good value mends it."""
        return len(self.done) == 1 and not self.done[0].endswith(MANY)


Change = Callable[[Table, Random], str]


def case(number: int) -> Case:
    """The case of this number, always the same."""
    rng = Random(f"config {number}")
    kind = rng.choices(list(MAKERS), [weight for weight, _ in MAKERS.values()])[0]
    made = MAKERS[kind][1](rng)
    made.label = f"{number} {kind}"
    return made


def of_table(table: Table, done: list[str], words: list[str] | None = None) -> Case:
    """A case whose file holds a table, as far as TOML can say it."""
    return Case("", [NAME, *(words or [])], {NAME: dumped(table)}, done=done)


def dumped(table: Table) -> bytes:
    """TOML, with strings and keys as they are: tomli_w writes all of them so that they can be read."""
    return tomli_w.dumps(_sayable(table)).encode("utf-8", errors="surrogatepass")


def _sayable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _sayable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_sayable(inner) for inner in value]
    return "" if value is None else value


def base(rng: Random) -> Table:
    """A real configuration with all that it extends; the smallest run every second time, as it starts here."""
    return copy.deepcopy(read(TINY if rng.random() < 0.5 else rng.choice(RUNS), []))


# ---------------------------------------------------------------------------------------------- places in a table


def places(table: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all keys and items."""
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for name, value in items:
        yield (*path, name)
        yield from places(value, (*path, name))


def at(table: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        table = table[name]
    return table


def put(table: Any, path: tuple[Any, ...], value: Any) -> None:
    at(table, path[:-1])[path[-1]] = value


def told(path: tuple[Any, ...], value: Any = None) -> str:
    return f"{'.'.join(map(str, path))} = {str(value)[:60]!r}" + (MANY if isinstance(value, dict | list) else "")


# ---------------------------------------------------------------------------------------------- changes of a table


def misspell(table: Table, rng: Random) -> str:
    path = rng.choice([p for p in places(table) if isinstance(p[-1], str) and p[-1]])
    name, spot = path[-1], rng.randrange(len(path[-1]))
    swapped = name[:spot] + name[spot + 1 : spot + 2] + name[spot] + name[spot + 2 :]
    letter = rng.choice(string.ascii_lowercase + "_-. é")
    wrong = rng.choice([name[:spot] + name[spot + 1 :], swapped, name[:spot] + letter + name[spot:], name.upper()])
    holder = at(table, path[:-1])
    holder[wrong] = holder.pop(name)
    return f"{'.'.join(map(str, path))} spelt {wrong!r}"


def add_unknown(table: Table, rng: Random) -> str:
    tables = [(), *(p for p in places(table) if isinstance(at(table, p), dict))]
    name = rng.choice(["x", "kind", "extends", "scale", "seed", "width", "none", "", *STRINGS])
    path = (*rng.choice(tables), name)
    put(table, path, rng.choice([1, "a", {}, [], {"a": 1}, *NUMBERS]))
    return told(path, "new")


def leave_out(table: Table, rng: Random) -> str:
    path = rng.choice(list(places(table)))
    at(table, path[:-1]).pop(path[-1])
    return f"{'.'.join(map(str, path))} left out"


def odd_number(table: Table, rng: Random) -> str:
    numbers = [p for p in places(table) if isinstance(at(table, p), int | float)]
    return _odd(table, rng.choice(numbers or list(places(table))), rng.choice(NUMBERS))


def odd_string(table: Table, rng: Random) -> str:
    texts = [p for p in places(table) if isinstance(at(table, p), str)]
    return _odd(table, rng.choice(texts or list(places(table))), rng.choice(STRINGS))


def other_type(table: Table, rng: Random) -> str:
    value = rng.choice([*OTHERS, rng.choice(NUMBERS), rng.choice(STRINGS), nested(rng.choice([3, 30, 100]))])
    return _odd(table, rng.choice(list(places(table))), value)


def neighbour(table: Table, rng: Random) -> str:
    value = copy.deepcopy(at(table, rng.choice(list(places(table)))))
    return _odd(table, rng.choice(list(places(table))), value)


def rescale(table: Table, rng: Random) -> str:
    """A number that is nearly what it was: what divides no more, what is just too large."""
    numbers = [p for p in places(table) if type(at(table, p)) in (int, float)]
    if not numbers:
        return leave_out(table, rng)
    path = rng.choice(numbers)
    value = at(table, path)
    return _odd(table, path, rng.choice([value + 1, value - 1, value * 2, value * 3, value * 1000, -value, value / 2]))


def of_schema(table: Table, rng: Random) -> str:
    """Any key that the schema knows here, given a value at its bounds, of its kind, or odd."""
    path, name, alternatives = rng.choice(list(walk(table, SCHEMA)))
    facet = rng.choice(alternatives or [Facet(int, ())])
    value = sample(facet, rng)
    if rng.random() < 0.4 and facet.kind in (int, float):
        value = facet.kind(rng.choice([*edges(facet.bounds), rng.randrange(300)]))
    elif rng.random() < 0.15:
        value = rng.choice([*NUMBERS, *STRINGS, *OTHERS])
    return _odd(table, (*path, name), value)


def other_kind(table: Table, rng: Random) -> str:
    """Another section where one may be chosen among several."""
    choices = [(p, n, f) for p, n, f in walk(table, SCHEMA) if sum(is_section(each.kind) for each in f) > 1]
    path, name, alternatives = rng.choice(choices or [((), "parallel", SCHEMA)])
    return _odd(table, (*path, name), sample(rng.choice([f for f in alternatives if is_section(f.kind)]), rng))


def of_array(table: Table, rng: Random) -> str:
    """An array that is empty, turned round, twice as long, shorter, or that holds something else."""
    arrays = [p for p in places(table) if isinstance(at(table, p), list)]
    if not arrays:
        return other_type(table, rng)
    path = rng.choice(arrays)
    old = at(table, path)
    other = [*old, rng.choice([*NUMBERS, *OTHERS])]
    return _odd(table, path, rng.choice([[], old[::-1], old + old, old[:-1], other, [old], rng.choice(NUMBERS)]))


def of_stages(table: Table, rng: Random) -> str:
    """Stages out of order, or that do not fit the tokens of the run."""
    stages = table.get("context", {}).get("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages) or not stages:
        return of_array(table, rng)
    stage = rng.choice(stages)
    total = table.get("total_tokens", 4096)
    choices: list[tuple[str, Any]] = [
        ("until_tokens", rng.choice([1, 0, 100, total, total + 1])),
        ("sequence_length", rng.choice([1, 3, 96, 100, 2**20, 2**27])),
        ("tokens_per_step", rng.choice([1, 100, 1024, 2**40])),
        ("context", rng.choice([1, 2, 3, 8, 65_536])),
        ("mixture", rng.choice([{}, {"words": 0.0}, {"words": 1.0}, {"nowhere": 1.0}, {"needles": 1e12}])),
    ]
    name, value = rng.choice(choices)
    stage[name] = value
    if rng.random() < 0.3:
        rng.shuffle(stages)
    return f"a stage with {name} = {value!r}{MANY}"


def of_ranks(table: Table, rng: Random) -> str:
    """Ranks that share something, as they may or may not."""
    known = dict(facets_of("parallel"))
    names = rng.sample(sorted(known), min(len(known), rng.randrange(1, 4)))
    table["parallel"] = {n: rng.choice([1, 2, 3, 4, 5, 6, 8, 12, 64, 65_536, 0, 2**40]) for n in names}
    return told(("parallel",), table["parallel"])


def facets_of(section: str) -> Iterator[tuple[str, list[Facet]]]:
    """The whole numbers of a section of the run's configuration."""
    for alternative in facets(RunConfig.model_fields[section].annotation):
        for name, inner in alternative.kind.model_fields.items():
            found = [facet for facet in facets(inner.annotation, tuple(inner.metadata)) if facet.kind is int]
            if found:
                yield name, found


def _odd(table: Table, path: tuple[Any, ...], value: Any) -> str:
    put(table, path, value)
    return told(path, value)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


CHANGES: dict[Change, int] = {
    misspell: 8, add_unknown: 5, leave_out: 6, odd_number: 12, odd_string: 8, other_type: 10, neighbour: 8, rescale: 12,
    of_schema: 20, other_kind: 12, of_array: 5, of_stages: 8, of_ranks: 5,
}  # fmt: skip


def one(rng: Random) -> Case:
    return _changed(rng, 1)


def pair(rng: Random) -> Case:
    return _changed(rng, rng.choice([2, 2, 2, 3]))


def _changed(rng: Random, count: int) -> Case:
    table, done = base(rng), list[str]()
    for _ in range(count):
        change = rng.choices(list(CHANGES), list(CHANGES.values()))[0]
        try:
            done.append(change(table, rng))
        except (IndexError, KeyError, TypeError, AttributeError, ValueError):  # nothing is left to change
            break
    return of_table(table, done)


# ---------------------------------------------------------------------------------------------- changes of the text


def of_text(rng: Random) -> Case:
    """The bytes of a file, damaged as editors, transfers and merges damage them."""
    data = bytearray(dumped(base(rng)))
    done = []
    for _ in range(rng.choice([1, 1, 2])):
        if not data:  # all cut off already
            break
        name, damage = rng.choice(list(DAMAGES.items()))
        data = bytearray(damage(bytes(data), rng))
        done.append(name)
    return Case("", [NAME], {NAME: bytes(data)}, done=done)


def _flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 5])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _insert(data: bytes, rng: Random) -> bytes:
    pieces = (b"\x00", b"[", b"]", b"[[", b"=", b'"', b'"""', b"\r", b"{", b"#", b"\xff", b"\xe9", b".", b"_", b"\\")
    spot = rng.randrange(len(data) + 1)
    return data[:spot] + rng.choice(pieces) * rng.choice([1, 1, 2000]) + data[spot:]


def _lines(data: bytes, rng: Random) -> bytes:
    lines = data.splitlines(keepends=True)
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines.insert(b, lines[a])
        case 1:
            del lines[a]
        case 2:
            lines[a], lines[b] = lines[b], lines[a]
        case _:
            lines[a] = b"<<<<<<< HEAD\n" + lines[a] + b"=======\n" + lines[b] + b">>>>>>> branch\n"
    return b"".join(lines)


DAMAGES: dict[str, Callable[[bytes, Random], bytes]] = {
    "cut short": lambda data, rng: data[: rng.randrange(len(data) + 1)],
    "bits flipped": _flip,
    "something inserted": _insert,
    "bytes left out": lambda data, rng: data[: (a := rng.randrange(len(data)))] + data[a + rng.randrange(1, 40) :],
    "lines moved": _lines,
    "line ends of Windows": lambda data, rng: data.replace(b"\n", b"\r\n"),
    "line ends of old Macs": lambda data, rng: data.replace(b"\n", b"\r"),
    "a mark in front": lambda data, rng: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data, rng: data.decode(errors="replace").encode("utf-16"),
    "nothing at all": lambda data, rng: rng.choice([b"", b"\n", b"# no keys\n", b"\x00" * 4096]),
    "deep arrays": lambda data, rng: data + b"\ndeep = " + b"[" * (n := rng.choice([50, 900, 100_000])) + b"]" * n,
    "deep tables": lambda data, rng: data + b"\n[" + b"a." * rng.choice([50, 2000]) + b"a]\nx = 1\n",
    "a long number": lambda data, rng: data.replace(b"= ", b"= " + b"9" * rng.choice([20, 400, 5000]), 1),
    "many keys": lambda data, rng: data + b"\n[more]\n" + b"".join(b"k%d = 1\n" % n for n in range(5000)),
}


# ---------------------------------------------------------------------------------------------- the command line


def of_words(rng: Random) -> Case:
    """Overrides: right ones, wrong ones and no ones."""
    table, words, done = base(rng), list[str](), list[str]()
    for _ in range(rng.choice([1, 1, 2, 3])):
        word = _word(table, rng)
        if not word.startswith("--"):  # an option is argparse's to refuse
            words.append(word)
            done.append(word[:80])
    return of_table(table, done, words)


def _word(table: Table, rng: Random) -> str:
    known = [(*path, name) for path, name, _ in walk(table, SCHEMA)]
    path = rng.choice([rng.choice(list(places(table))), rng.choice(known)])
    key = ".".join(map(str, path))
    value = rng.choice(
        [
            *map(str, NUMBERS),
            *STRINGS,
            "{}",
            "[]",
            "[",
            "{",
            "'",
            "true",
            "none",
            "{kind='yarn'}",
            "[1, 2]",
            "1979-05-27",
        ]
    )
    shapes = (
        *[f"{key}={value}"] * 6,
        *(f"{key} = {value}", f"{key}=={value}", f"{key}", f"={value}", f"{key}.={value}", f".{key}={value}"),
        *(
            f"{key}.0={value}",
            f"{key}.-1={value}",
            f"{key}.99={value}",
            f"{key}.deeper.still={value}",
            f"{key}.٣={value}",
        ),
        *(
            f"{key.upper()}={value}",
            f"{key}={value}\nseed=3",
            f"{key}={value} # why",
            f'"{key}"={value}',
            f"{key}:{value}",
        ),
        *(f"{'a.' * 2000}a=1", f"{key}={'[' * 1000}", f"{key}={'x' * 100_000}", "", " ", "=", "..=", "\udcff=\udcff"),
        *(f"{key}=\udcff", f"scale={value}", f"extends={value}", f"name={value}", f"data.prepared={value}"),
    )
    return rng.choice(shapes).replace("\x00", "\\x00")  # no command line has a zero byte


# ---------------------------------------------------------------------------------------------- extends


def of_parents(rng: Random) -> Case:
    """A file that extends another, itself, nothing, or what is no file."""
    table, child = base(rng), base(rng)
    parent = rng.choice(
        [
            *(NAME, "parent.toml", "nowhere.toml", "parnt.toml", "", ".", "..", "/", "~/x.toml", "/dev/null"),
            *("/dev/zero", "loop.toml", "chain0.toml", "a\x00b", "x" * 5000, 3, True, [], ["parent.toml"], {}),
            *({"path": "parent.toml"}, 1.5, "parent.toml\n", "pipe", "dangling.toml", "binary.toml"),
            datetime.date(2026, 1, 1),
        ]
    )
    links = {"loop.toml": "loop.toml", "dangling.toml": "nowhere", "pipe": "|"}
    files = {"parent.toml": dumped(table), "binary.toml": bytes(range(256))}
    length = rng.choice([3, 40, 1500]) if parent == "chain0.toml" else 0
    for number in range(length):
        after = f"chain{number + 1}.toml" if number + 1 < length else "parent.toml"
        files[f"chain{number}.toml"] = f"extends = '{after}'\n".encode()
    top = {"extends": parent, **(rng.choice([{}, child, {"model": child.get("model")}]))}
    if rng.random() < 0.3:
        _odd(top, (rng.choice(list(top)),), rng.choice([*NUMBERS, *STRINGS, *OTHERS]))
    done = [told(("extends",), parent)]
    made = Case("", [NAME], {**files, NAME: dumped(top)}, links, done)
    if rng.random() < 0.15:
        made.words = [
            rng.choice(["parent.toml/x", "nowhere.toml", "cse.toml", ".", "", "pipe", "loop.toml", "/dev/zero"])
        ]
    return made


# ---------------------------------------------------------------------------------------------- ranks, comparisons


def on_ranks(rng: Random) -> Case:
    """A number of ranks that the groups of the configuration may not divide; often a step that they can share."""
    table = base(rng)
    ranks = rng.choice([1, 2, 2, 4, 4, 4, 8, 8, 3, 6, 12, 64, 512])
    done = [of_ranks(table, rng)]
    if rng.random() < 0.6:
        for holder, name in ((table, "tokens_per_step"), (table, "total_tokens")):
            holder[name] *= ranks
        for stage in table["context"]["stages"]:
            stage["until_tokens"] *= ranks
        table["parallel"] = {name: min(value, 4) for name, value in table["parallel"].items()}
        done[0] += f", at most 4, on {ranks} ranks"
    made = of_table(table, done)
    made.ranks = ranks
    return made


def of_arms(rng: Random) -> Case:
    """A comparison, damaged as a table or as text; its bases stay where they are."""
    path = rng.choice(ARMS)
    table = copy.deepcopy(read_table(path))
    table["bases"] = {name: str((path.parent / file).resolve()) for name, file in table["bases"].items()}
    done: list[str] = []
    plain = [misspell, add_unknown, leave_out, odd_number, odd_string, other_type, neighbour, rescale, of_array]
    for _ in range(rng.choice([1, 1, 2])):
        try:
            done.append(rng.choice(plain)(table, rng))
        except (IndexError, KeyError, TypeError, AttributeError, ValueError):
            break
    made = of_table(table, done, ["--small"] if rng.random() < 0.3 else [])
    if rng.random() < 0.2:
        made.files[NAME] = rng.choice(list(DAMAGES.values()))(made.files[NAME], rng)
    made.door = "compare"
    return made


MAKERS: dict[str, tuple[int, Callable[[Random], Case]]] = {
    "one change": (46, one),
    "a pair of changes": (16, pair),
    "the text": (12, of_text),
    "the command line": (12, of_words),
    "a parent": (5, of_parents),
    "ranks": (5, on_ranks),
    "a comparison": (4, of_arms),
}
