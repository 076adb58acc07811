"""The quickstart under several seeds, and whether each of them keeps what the README promises."""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.record import keep

CONFIG = "configs/quickstart.toml"
Row = dict[str, Any]


def train(seed: int) -> tuple[Path, float]:
    """One run of the quickstart in a process of its own: its folder and its wall seconds."""
    name = f"quickstart-seed-{seed}"
    begin = time.perf_counter()
    subprocess.run([sys.executable, "train.py", CONFIG, f"seed={seed}", f"name={name}"], check=True)
    return Path("runs") / name, time.perf_counter() - begin


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mean(rows: Iterable[Row], **wanted: object) -> float:
    """Mean score of the evaluation rows that match."""
    scores = [row["score"] for row in rows if all(row[key] == value for key, value in wanted.items())]
    return sum(scores) / len(scores)


def judge(folder: Path, seed: int, seconds: float) -> Row:
    """The numbers of the promise, and each part of it as a claim that is true or not."""
    evals = read(folder / "evals.jsonl")
    short, long = 128, 512
    before, after = (max(row["tokens"] for row in evals if row["stage"] == stage) for stage in (0, 1))
    bits = [
        (row["tokens"], row["score"]) for row in evals if row["task"] == "held_out/python" and row["length"] == short
    ]
    steps = read(folder / "metrics.jsonl")
    around = json.loads((folder / "environment.json").read_text())
    numbers: dict[str, Any] = {
        "needle_128_before": mean(evals, task="needle", length=short, tokens=before),
        "needle_512_before": mean(evals, task="needle", length=long, tokens=before),
        "needle_512_after": mean(evals, task="needle", length=long, tokens=after),
        "needle_128_after": mean(evals, task="needle", length=short, tokens=after),
        "bits_per_byte_128": dict(bits),
        "bits_per_byte_512_before": mean(evals, task="held_out/python", length=long, tokens=before),
        "bits_per_byte_512_after": mean(evals, task="held_out/python", length=long, tokens=after),
    }
    rise = dict(bits)[after] - dict(bits)[before]
    claims = {
        "needle at 128 before >= 0.9": numbers["needle_128_before"] >= 0.9,
        "needle at 512 before <= 0.3": numbers["needle_512_before"] <= 0.3,
        "needle at 512 after >= 0.8": numbers["needle_512_after"] >= 0.8,
        "bits per byte at 128 fall throughout": all(b[1] < a[1] for a, b in itertools.pairwise(bits)),
        "bits per byte at 128 rise by at most 0.05 through the extension": rise <= 0.05,
        "at most 600 s": seconds <= 600,
    }
    speed = {
        "tokens_per_second": round(middle(steps, "tokens_per_second") or 0),
        "mfu": middle(steps, "mfu"),
        "padding_share": middle(steps, "padding_share"),
        "routing": around["routing"],
        "peak_flops": around["peak_flops"],
    }
    return {"seed": seed, "seconds": round(seconds), **speed, **numbers, "claims": claims}


def middle(steps: list[Row], key: str) -> float | None:
    """The median of a run's rows; None where nothing is known."""
    numbers = sorted(row[key] for row in steps if row[key] is not None)
    return numbers[len(numbers) // 2] if numbers else None


def table(rows: list[Row]) -> str:
    """The rows as the README shows them, in Markdown."""
    lines = [
        "| seed | 128 before | 512 before | 512 after | 128 after | bits per byte at 128, before and after | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        needles = (row[f"needle_{name}"] for name in ("128_before", "512_before", "512_after", "128_after"))
        before, after = list(row["bits_per_byte_128"].values())[-2:]
        cells = [row["seed"], *(f"{score:.2f}" for score in needles), f"{before:.3f}, {after:.3f}", row["seconds"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/quickstart.json")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        folder, seconds = train(seed)
        rows.append(judge(folder, seed, seconds))
        print(json.dumps(rows[-1], indent=1), flush=True)
    print(table(rows))
    if arguments.keep:
        print(keep("quickstart", rows))
    sys.exit(0 if all(all(row["claims"].values()) for row in rows) else 1)


if __name__ == "__main__":
    main()
