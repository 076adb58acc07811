"""Dense against a mixture of experts of the same active parameters: `make compare`, and its numbers kept.

python -m benchmarks.dense_moe            what `make compare` does; runs that are finished are not trained again
python -m benchmarks.dense_moe --keep     and write benchmarks/results/dense_moe.json, with the runs' own commit
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import keep

CONFIG = Path("configs/compare/dense_moe.toml")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A row a run, with the commit that it was trained at, and a row a difference."""
    runs = _read(folder / "runs.csv")
    for run in runs:
        run["commit"] = json.loads((Path(run["folder"]) / "environment.json").read_text())["commit"]
    return [*runs, *_read(folder / "differences.csv")]


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> float | int | str | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/dense_moe.json")
    arguments = parser.parse_args()
    status = subprocess.run([sys.executable, "compare.py", str(CONFIG)], check=False).returncode
    if status == 0 and arguments.keep:
        print(f"kept in {keep('dense_moe', rows_of(Path('runs') / CONFIG.stem))}")
    sys.exit(status)
