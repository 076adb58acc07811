"""What was proven equal to one process: kept by the tests that prove it, shown as the table of docs/parallel.md.

LONGMOE_TABLE=$PWD/proven.jsonl pytest --nightly tests/parallel/test_equality.py tests/parallel/test_pipeline.py
python tests/parallel/proven.py proven.jsonl
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

TOLERANCE = 1e-5


@dataclass
class Worst:
    """The largest relative difference of each kind, over all steps."""

    loss: float = 0.0
    norm: float = 0.0
    weights: float = 0.0
    where: dict[str, str] = field(default_factory=dict)

    def see(self, kind: str, where: str, ours: Tensor, theirs: Tensor) -> None:
        ours, theirs = ours.double(), theirs.double()
        assert ours.shape == theirs.shape, f"{where}: {ours.shape}, not {theirs.shape}"
        error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
        if not error <= getattr(self, kind):
            setattr(self, kind, error)
            self.where[kind] = where

    def judge(self, title: str, axes: Mapping[str, int], steps: int) -> None:
        """Nothing may be off; what is not goes to the file that was asked for."""
        for kind in ("loss", "norm", "weights"):
            error = getattr(self, kind)
            assert error <= TOLERANCE, (
                f"{title}, {dict(axes)}: {kind} ({self.where[kind]}) off by {error:.2e}, relative"
            )
        path = os.environ.get("LONGMOE_TABLE")
        if path is not None and dist.get_rank() == 0:
            row = {"title": title, "axes": dict(axes), "ranks": dist.get_world_size(), "steps": steps, **asdict(self)}
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each model, with the largest differences of all its combinations, axes of 2 ranks without a number."""
    lines = [
        "| model | combinations by number of ranks | steps | loss | gradient norm | weights |",
        "|---|---|---|---|---|---|",
    ]
    for title in dict.fromkeys(row["title"] for row in rows):
        proven = [row for row in rows if row["title"] == title]
        by_ranks = [
            f"{ranks}: {', '.join(dict.fromkeys(_named(row['axes']) for row in proven if row['ranks'] == ranks))}"
            for ranks in sorted({row["ranks"] for row in proven})
        ]
        steps = sorted({row["steps"] for row in proven})
        numbers = (f"{max(row[kind] for row in proven):.0e}" for kind in ("loss", "norm", "weights"))
        lines.append(f"| {title} | {'<br>'.join(by_ranks)} | {' and '.join(map(str, steps))} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _named(axes: Mapping[str, int]) -> str:
    names = (axis if length == 2 else f"{axis} {length}" for axis, length in axes.items() if length > 1)
    return " x ".join(names) or "replicate"


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
