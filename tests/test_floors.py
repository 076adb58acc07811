"""Imports point down: a room imports only from rooms on lower floors, and its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"settings"},
    {"attention", "moe", "data", "optim", "scaling"},
    {"context"},
    {"model"},
    {"parallel"},
    {"evals"},
    {"checkpoint"},
    {"run"},
    {"planning"},
    {"comparison"},
    {"train", "plan", "compare"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DOOR = "__main__.py"  # the command line of a room: it stands on the top floor, whatever the room
FORBIDDEN_ROOMS = {"utils", "common", "core", "helpers", "misc"}


def imported_rooms(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def sources() -> list[Path]:
    files = [ROOT / f"{name}.py" for name in ("settings", "train", "plan", "compare")]
    return files + [
        path for room in sorted(FLOOR_OF) if (ROOT / room).is_dir() for path in sorted((ROOT / room).rglob("*.py"))
    ]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    floor = len(FLOORS) if path.name == DOOR else FLOOR_OF[room]
    for other in imported_rooms(path):
        if other in FLOOR_OF and other != room:
            assert FLOOR_OF[other] < floor, f"{path.relative_to(ROOT)} imports {other}, which is not below it"


def test_every_room_has_a_floor() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert rooms <= set(FLOOR_OF)
    assert not rooms & FORBIDDEN_ROOMS
