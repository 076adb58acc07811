"""Mamba's table 11, row MHA-RoPE: trained for so many steps here, and printed beside what was published.

`python -m benchmarks.induction_heads --steps 4096 [section.key=value ...]`; `--steps 409600` is the published training,
`--short` another one, which takes minutes on a CPU. A run that is there goes on from its last checkpoint.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import keep

CONFIG = "configs/evals/induction_heads.toml"
SHORT = "configs/evals/induction_heads_short.toml"
PUBLISHED = {256: 100.0, 512: 83.6, 1024: 31.3, 2048: 18.4, 4096: 8.6}
"""Percent (arXiv 2312.00752, table 11); guessing one of fifteen tokens: 6.7."""
TOKENS_PER_STEP = 2048
Row = dict[str, Any]


def train(steps: int | None, name: str, overrides: list[str]) -> Path:
    """The run's folder, trained to so many steps; None: as the short configuration says."""
    config, words = SHORT, [f"name={name}", *overrides]
    if steps is not None:
        tokens = steps * TOKENS_PER_STEP
        config, words = CONFIG, [f"total_tokens={tokens}", f"context.stages.0.until_tokens={tokens}", *words]
    subprocess.run([sys.executable, "train.py", config, *words], check=True)
    return Path("runs") / name


def last_row(folder: Path) -> dict[int, Row]:
    """The run's last evaluation, by length."""
    rows = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    asked = [row for row in rows if row["task"] == "induction"]
    newest = max(row["tokens"] for row in asked)
    return {row["length"]: row for row in asked if row["tokens"] == newest}


def table(found: dict[int, Row]) -> str:
    """Both rows in Markdown, with the interval of ours."""
    lines = ["| length | " + " | ".join(f"{length:,}" for length in found) + " |", "|---" * (len(found) + 1) + "|"]
    ours = (f"{100 * row['score']:.1f} ({100 * row['low']:.0f} to {100 * row['high']:.0f})" for row in found.values())
    steps = next(iter(found.values()))["tokens"] // TOKENS_PER_STEP
    lines.append(f"| here, {steps:,} steps | " + " | ".join(ours) + " |")
    theirs = (f"{PUBLISHED[length]:.1f}" if length in PUBLISHED else "" for length in found)
    lines.append("| Mamba's table 11, 409,600 steps | " + " | ".join(theirs) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for the training")
    parser.add_argument("--steps", type=int, default=4096)
    parser.add_argument("--short", action="store_true", help=f"train {SHORT} in place of so many steps")
    parser.add_argument("--name", default="", help="the run's name; left out, induction-heads-STEPS or -short")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/induction_heads.json")
    arguments = parser.parse_intermixed_args()
    steps = None if arguments.short else arguments.steps
    folder = train(steps, arguments.name or f"induction-heads-{steps or 'short'}", arguments.overrides)
    found = last_row(folder)
    print(table(found))
    if arguments.keep:
        print(keep("induction_heads", list(found.values())))


if __name__ == "__main__":
    main()
