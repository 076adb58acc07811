"""Finished runs as a law sees them, and files of them."""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from settings import Refusal

Column = np.ndarray
"""(R,) fp64, a number for each run."""
FLOPS_PER_PARAMETER = 6
"""Training operations for a parameter and a token, without attention (Kaplan et al. 2020, section 2.1)."""
LEAST, MOST = 1e-6, 1e40
"""Of any number of a run."""
NAMES: Mapping[str, tuple[str, ...]] = {
    "active": ("active", "active_parameters", "parameters", "n", "model size", "model_size", "params"),
    "total": ("total", "total_parameters"),
    "tokens": ("tokens", "d", "training tokens", "training_tokens"),
    "flops": ("flops", "c", "training flop", "training flops", "training_flops"),
    "loss": ("loss", "l"),
    "expansion": ("expansion", "experts"),
}
"""What a column may be called, in small letters."""


@dataclass(frozen=True)
class Runs:
    """Runs, one number of each in each column."""

    active_R: Column
    """Parameters that a token meets; for a dense model all of them. Which of them are counted is the file's affair."""
    tokens_R: Column
    loss_R: Column
    """Nats a token."""
    total_R: Column
    expansion_R: Column
    """Experts over experts of a token: how much larger the layers are than what a token meets. 1: dense."""

    @classmethod
    def of(
        cls,
        active: Iterable[float],
        tokens: Iterable[float],
        loss: Iterable[float],
        total: Iterable[float] | None = None,
        expansion: Iterable[float] | None = None,
    ) -> "Runs":
        """From numbers; total left out: all are active; expansion left out: all are dense."""
        active_R = np.array([*active], dtype=np.float64)
        return cls(
            active_R,
            np.array([*tokens], dtype=np.float64),
            np.array([*loss], dtype=np.float64),
            active_R if total is None else np.array([*total], dtype=np.float64),
            np.ones_like(active_R) if expansion is None else np.array([*expansion], dtype=np.float64),
        )

    def __len__(self) -> int:
        return len(self.loss_R)

    @property
    def flops_R(self) -> Column:
        """6ND, on active parameters."""
        return FLOPS_PER_PARAMETER * self.active_R * self.tokens_R

    def take(self, which: np.ndarray) -> "Runs":
        """Some of them: indices, or a mask."""
        return Runs(*(getattr(self, field.name)[which] for field in fields(self)))

    def without_highest(self, count: int) -> "Runs":
        """Without the runs of highest loss."""
        return self.take(np.argsort(self.loss_R, kind="stable")[: len(self) - count]) if count else self


def read_csv(path: Path) -> Runs:
    """Runs from a file with a head line; FLOPs may stand for tokens. Raises Refusal by file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: cannot be read as text: {error}") from None
    rows = list(csv.reader(text.splitlines()))
    if len(rows) < 2:
        raise Refusal(f"{path}: holds no runs; it needs a head line and a line for each run")
    place = _places(path, rows[0])
    table: dict[str, list[float]] = {name: [] for name in place}
    for number, row in enumerate(rows[1:], start=2):
        if not any(word.strip() for word in row):
            continue
        for name, column in place.items():
            table[name].append(_number(path, number, rows[0][column], row[column] if column < len(row) else ""))
    if "tokens" not in table:
        pairs = zip(table["flops"], table["active"], strict=True)
        table["tokens"] = [flops / (FLOPS_PER_PARAMETER * active) for flops, active in pairs]
    table.pop("flops", None)
    return Runs.of(**table)


def _places(path: Path, head: list[str]) -> dict[str, int]:
    words = [word.strip().lower() for word in head]
    place = {name: words.index(word) for name, known in NAMES.items() for word in reversed(known) if word in words}
    for name, instead in (("active", ""), ("loss", ""), ("tokens", "flops")):
        if name not in place and instead not in place:
            known = ", ".join(NAMES[name]) + (f" (or {', '.join(NAMES[instead])})" if instead else "")
            raise Refusal(f"{path}: no column of {name}; its columns are {', '.join(head)}. Call one of them {known}")
    return place


def _number(path: Path, line: int, column: str, word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not LEAST <= number <= MOST:
        if 0 < number < math.inf:
            raise Refusal(f"{path}: line {line}: {column}={word!r} lies beyond {LEAST:g} to {MOST:g}: is that a run?")
        raise Refusal(f"{path}: line {line}: {column}={word!r} has to be a number above 0; mend or remove the line")
    return number
