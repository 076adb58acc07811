"""Mamba's table 11, row MHA-RoPE: trained for so many steps here, and printed beside what was published.

`python -m benchmarks.induction_heads --steps 4096 [section.key=value ...]`; `--steps 409600` is the published training,
`--short` another one, which takes minutes on a CPU. A run that is there goes on from its last checkpoint.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import keep
from run.start import refusing
from settings import Refusal

CONFIG = "configs/evals/induction_heads.toml"
SHORT = "configs/evals/induction_heads_short.toml"
PUBLISHED = {256: 100.0, 512: 83.6, 1024: 31.3, 2048: 18.4, 4096: 8.6}
"""Percent (arXiv 2312.00752, table 11); guessing one of fifteen tokens: 6.7."""
TOKENS_PER_STEP = 2048
STEPS = 4096
OURS = {
    "name": "is where the run is looked for afterwards; give --name instead",
    "tokens_per_step": f"is the published {TOKENS_PER_STEP}, by which steps are counted; leave it out",
}
"""Keys that no override may change, and what to do instead."""
Row = dict[str, Any]


def train(steps: int | None, name: str, overrides: list[str]) -> Path:
    """The run's folder, trained to so many steps; None: as the short configuration says. Where the training does not
    end well, so does this, with its status."""
    config, words = SHORT, [f"name={name}", *overrides]
    if steps is not None:
        tokens = steps * TOKENS_PER_STEP
        config, words = CONFIG, [f"total_tokens={tokens}", f"context.stages.0.until_tokens={tokens}", *words]
    status = subprocess.run([sys.executable, "train.py", config, *words], check=False).returncode
    if status:
        sys.exit(status if status > 0 else 128 - status)  # a signal's number is negative here
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


def check(arguments: argparse.Namespace) -> None:
    """Refuse what would be dropped in silence, or make the table say what was not trained."""
    if arguments.short and arguments.steps is not None:
        raise Refusal(f"--short --steps {arguments.steps}: {SHORT} has its own number of steps; leave one of them out")
    for override in arguments.overrides:
        key = override.partition("=")[0].strip().rpartition(".")
        if key[2] == "tokens_per_step" or "".join(key) == "name":
            raise Refusal(f"{override}: {OURS[key[2]]}")


def main(arguments: argparse.Namespace) -> None:
    """Train, print both rows, and with --keep write ours down."""
    check(arguments)
    steps = None if arguments.short else STEPS if arguments.steps is None else arguments.steps
    folder = train(steps, arguments.name or f"induction-heads-{steps or 'short'}", arguments.overrides)
    found = last_row(folder)
    print(table(found))
    if arguments.keep:
        print(keep("induction_heads", list(found.values())))


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for the training")
    parser.add_argument("--steps", type=int, help=f"left out: {STEPS}")
    parser.add_argument("--short", action="store_true", help=f"train {SHORT} in place of so many steps")
    parser.add_argument("--name", default="", help="the run's name; left out, induction-heads-STEPS or -short")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/induction_heads.json")
    return parser.parse_intermixed_args(words)


if __name__ == "__main__":
    chosen = parse_arguments()
    sys.exit(refusing(lambda: main(chosen)))
