"""Whether a broken run is, in the end, the unbroken one: its rows, its checkpoints, and the files beside them."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROWS = ("metrics.jsonl", "evals.jsonl")
MEASURED = ("_per_second", "_bytes", "_seconds", "seconds", "utilization", "mfu")
"""How the names of what a clock or an allocator measures end: no two runs agree on them."""
TOLD = ("config.toml", "materials.json")
"""The files beside the rows and the checkpoints that say what was trained."""


def differences(whole: Path, broken: Path) -> list[str]:
    """One line for each way in which the folder of a broken run is not that of the unbroken one; none if there is none.

    whole, broken: the folders that the runs were started in, with runs/<name>/ below. Every number of every row is
    compared, what was measured by a clock left out, and every byte of every checkpoint; nothing may be left over.
    """
    lines = _leftovers(whole, broken)
    for folder in sorted(path.parent for path in whole.glob("runs/*/config.toml")):
        here = broken / folder.relative_to(whole)
        for name in ROWS:
            lines += [f"{name}: {line}" for line in row_differences(read(folder / name), read(here / name))]
        saved = [path.relative_to(folder) for path in (folder / "checkpoints").rglob("*") if path.is_file()]
        for file in (*map(Path, TOLD), *sorted(saved)):
            if (here / file).exists() and digest(here / file) != digest(folder / file):
                lines.append(f"{file}: other bytes")
    return lines


def row_differences(whole: list[Row], broken: list[Row]) -> list[str]:
    """The rows that are lost, doubled, out of order, or hold another number."""
    expected, found = Counter(row.get("step") for row in whole), Counter(row.get("step") for row in broken)
    lines = [f"step {step}: {n} rows lost" for step, n in (expected - found).items()]
    lines += [f"step {step}: {n} rows too many" for step, n in (found - expected).items()]
    if lines:
        return lines
    for ours, theirs in zip(whole, broken, strict=True):
        if ours.get("step") != theirs.get("step"):
            return [f"step {theirs.get('step')} stands where step {ours.get('step')} belongs"]
        keys = [key for key in {**ours, **theirs} if not key.endswith(MEASURED) and ours.get(key) != theirs.get(key)]
        lines += [f"step {ours.get('step')}: {key} {ours.get(key)} -> {theirs.get(key)}" for key in keys]
    return lines


def read(path: Path) -> list[Row]:
    """The rows of a JSON-lines file; a line that is none of them, as a torn one, is a row of its own."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_parse(line) for line in lines if line]


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        return {"step": f"torn line {line[:40]!r}"}
    return row if isinstance(row, dict) else {"step": f"no row {line[:40]!r}"}


def _leftovers(whole: Path, broken: Path) -> list[str]:
    expected, found = ({path.relative_to(folder) for path in folder.rglob("*")} for folder in (whole, broken))
    lines = [f"{path}: left over" for path in sorted(found - expected)]
    return lines + [f"{path}: is missing" for path in sorted(expected - found)]
