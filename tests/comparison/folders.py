"""Run folders made by hand: metrics and evaluations whose means are known."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STEPS, TOKENS_A_STEP = 40, 100
TEXT_BYTES = 1000


def held_out(score: float | None, source: str = "a", length: int = 128, *, wobble: Sequence[float] = ()) -> Row:
    """A row of held-out text in 32 pieces, whose bits per byte lie around the score as `wobble` says."""
    value = math.nan if score is None else score
    bits = [value + (wobble[n] if n < len(wobble) else 0.0) for n in range(32)]
    pieces = [[None if math.isnan(each) else each * math.log(2) * TEXT_BYTES, TEXT_BYTES] for each in bits]
    mean = None if score is None else sum(bits) / 32
    row = {"task": f"held_out/{source}", "length": length, "depth": None, "score": mean, "count": 9}
    return {**row, "text": source, "pieces": pieces}


def needles(scores: dict[int, float | None], count: int = 8) -> list[Row]:
    """The same score at two depths of each length."""
    return [
        {"task": "needle", "length": length, "depth": depth, "score": score, "count": count}
        for length, score in scores.items()
        for depth in (0.0, 1.0)
    ]


def write_run(
    folder: Path, rows: Sequence[Row], seed: int = 0, loss: float = 2.0, *, config: str = "", **metrics: Any
) -> Path:
    """A finished run that asked these at its end; metrics: further keys of each of its rows."""
    folder.mkdir(parents=True)
    total = STEPS * TOKENS_A_STEP
    stages = f"[[context.stages]]\nuntil_tokens = {total}\nsequence_length = 128\n"
    head = f'name = "{folder.name}"\nseed = {seed}\ntokens_per_step = {TOKENS_A_STEP}\ntotal_tokens = {total}\n'
    (folder / "config.toml").write_text(head + config + stages)
    (folder / "environment.json").write_text(json.dumps({"parameters": {"total": 3000, "active": 2000}}))
    steps = range(1, STEPS + 1)
    told = [
        {"step": n, "tokens": n * TOKENS_A_STEP, "loss": loss + 1 / n, "tokens_per_second": 50.0, **metrics}
        for n in steps
    ]
    _write(folder / "metrics.jsonl", told)
    _write(folder / "evals.jsonl", [{"step": STEPS, "tokens": total, **row} for row in rows])
    return folder


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
