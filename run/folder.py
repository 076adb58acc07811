"""The folder of a run: which one it is, that one process alone writes there, and what describes it."""

import fcntl
import json
from pathlib import Path
from typing import IO, Any

from checkpoint.identity import changed, read_recorded
from checkpoint.records import Environment, Record, wrong_with
from run.config import RunConfig
from run.files import read_text, write_whole
from run.metrics import read_rows
from settings import Refusal, to_toml

RUNS = Path("runs")
WAY_OUT = "use --fresh to start anew beside it, or name=... for a run of its own"
"""Of a folder that is taken, where one run is started."""
_held: dict[Path, IO[str]] = {}  # flock knows open files, not processes: opened twice, we would lock ourselves out


def choose_name(config: RunConfig, fresh: bool) -> str:
    """The name of the run: its own, or with `fresh` the next free <name>-<number>.

    Raises Refusal when runs/<name> may not be continued under this configuration.
    """
    name, number = config.name, 2
    while fresh and (RUNS / name).exists():
        name, number = f"{config.name}-{number}", number + 1
    refuse_other_run(RUNS / name, config)
    return name


def refuse_other_run(folder: Path, config: RunConfig, way_out: str = WAY_OUT) -> None:
    """Raise Refusal, with the way out, when a folder holds something else than a run of this configuration.

    A run that has neither a checkpoint nor a row of metrics has nothing to lose: its folder is free.
    """
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    recorded = folder / "config.toml"
    if not recorded.exists():
        raise Refusal(f"{folder}: is not empty and holds no config.toml, so it is no run; {way_out}")
    if not has_progress(folder):
        return
    lines = changed(_load_recorded(recorded, way_out), config)
    if lines:
        listed = "\n  ".join(lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else []))
        raise Refusal(f"{folder}: holds a run of another configuration:\n  {listed}\n{way_out}")


def has_progress(folder: Path) -> bool:
    """Whether a run's folder holds a checkpoint or a row of metrics."""
    return any((folder / "checkpoints").glob("step_*")) or bool(read_rows(folder / "metrics.jsonl"))


def hold(folder: Path) -> None:
    """Create the folder and keep it for this process until `let_go`; Refusal when another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / ".lock").resolve()
    if path in _held:
        return
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Refusal(
            f"{folder}: another process is training in this folder; "
            f"wait for it, stop it, or use --fresh or another name=..."
        ) from None
    _held[path] = file


def let_go(folder: Path) -> None:
    """Let other processes write in the folder."""
    file = _held.pop((folder / ".lock").resolve(), None)
    if file is not None:
        file.close()


def describe(folder: Path, config: RunConfig, materials: dict[str, str], around: dict[str, Any]) -> None:
    """Write config.toml, materials.json (what the data is, by digest) and environment.json (versions and machine).

    environment.json keeps the facts of the first start; what is new at a later one is added to `restarts`.
    Raises Refusal, with nothing written, when the data of a run that continues is not what it was.
    """
    continues = has_progress(folder)
    if continues:
        _refuse_other_materials(folder, materials)
        around = _with_restart(folder, config, around)
    write_whole(folder / "config.toml", to_toml(config).encode())
    write_whole(folder / "materials.json", f"{json.dumps(materials, indent=2)}\n".encode())
    write_whole(folder / "environment.json", f"{json.dumps(around, indent=2)}\n".encode())


def described(folder: Path) -> dict[str, Any]:
    """environment.json of a run's folder; nothing where there is none. Raises Refusal where it is damaged."""
    return read_table(folder / "environment.json", Environment)


def read_table(path: Path, kind: type[Record] = Record) -> dict[str, Any]:
    """One object of a kind in a JSON file; nothing where there is no file. Raises Refusal where it is damaged."""
    if not path.exists():
        return {}
    try:
        table = json.loads(read_text(path))
    except Refusal as refusal:
        raise Refusal(f"{refusal}, or use --fresh to start anew") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: is damaged: {error}; put a good copy back, or use --fresh to start anew") from None
    if not isinstance(table, dict):
        raise Refusal(f"{path}: is damaged: no JSON object; put a good copy back, or use --fresh to start anew")
    if wrong := wrong_with(table, kind):
        raise Refusal(f"{path}: is damaged: {wrong}; put a good copy back, or use --fresh to start anew")
    return table


def _load_recorded(path: Path, way_out: str) -> RunConfig:
    try:
        return read_recorded(read_text(path), RunConfig, str(path))
    except ValueError as error:
        raise Refusal(
            f"{error}\n{path} is damaged or of another version: put a good copy back (each checkpoint holds one); "
            f"or {way_out}"
        ) from None


def _refuse_other_materials(folder: Path, now: dict[str, str]) -> None:
    path = folder / "materials.json"
    before = read_table(path) if path.exists() else now
    others = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if others:
        raise Refusal(
            f"{folder}: cannot continue, its data has changed: {', '.join(sorted(others))}; "
            f"put the old data back, or use --fresh to start anew"
        )


def _with_restart(folder: Path, config: RunConfig, now: dict[str, Any]) -> dict[str, Any]:
    """The facts of the first start, and what is new since the last one, unless the run has nothing left to do."""
    first = described(folder) or now
    restarts = first.get("restarts", [])
    last = dict(first)
    for restart in restarts:
        last |= restart
    different = {key: value for key, value in now.items() if last.get(key) != value}
    tokens = max((row["tokens"] for row in read_rows(folder / "metrics.jsonl")), default=0)
    if tokens >= config.total_tokens or not different:
        return first
    return first | {"restarts": [*restarts, different]}
