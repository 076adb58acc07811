"""One run as its folder tells it, whoever trained it: its rows, what was spent until each, and its numbers."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from checkpoint.identity import read_recorded
from data.tokenizer import build_tokenizer
from evals.scoring import Cell
from model.size import count, flops_per_token
from moe.words import routing_in_words
from run.config import RunConfig
from run.facts import RunFacts, read_run
from run.metrics import Row
from settings import Refusal

AXES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training", "step": "steps"}
"""Against what curves are drawn, and what stands under them."""


@dataclass(frozen=True)
class Point:
    """A row of metrics.jsonl and where in the run it stands; None: not known."""

    row: Row
    step: int
    tokens: float | None
    flops: float | None
    """Of the model, since the run (or its branch) began."""
    seconds: float | None
    """In training steps, evaluations and pauses left out."""

    def at(self, axis: str) -> float | None:
        value: float | None = getattr(self, axis)
        return value


@dataclass(frozen=True)
class SeenRun:
    """What lies in a run's folder, under the names of our files."""

    group: str
    """Runs are compared inside a group alone: a base of a comparison; "" where there is one."""
    arm: str
    seed: int | None
    """None: not known."""
    folder: Path
    metrics: list[Row]
    evals: list[Row] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    config_toml: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What is not known of it, and why."""

    @property
    def name(self) -> str:
        return self.arm if self.seed is None else f"{self.arm} (seed {self.seed})"

    @cached_property
    def settings(self) -> RunConfig | None:
        """The configuration as this version reads it; None where it cannot."""
        if not self.config_toml:
            return None
        try:
            return read_recorded(self.config_toml, RunConfig, str(self.folder / "config.toml"))
        except Refusal:
            return None

    @cached_property
    def points(self) -> list[Point]:
        """The rows in order, with what has been spent until then; a sum that lacks a part is known no more."""
        origin = self.environment.get("branched_from") or {}
        before: float | None = origin.get("tokens", 0)
        flops: float | None = 0.0
        seconds = 0.0 if any(map(_has_clock, self.metrics)) else None
        found = []
        for row in self.metrics:
            tokens, speed = row.get("tokens"), row.get("tokens_per_second")
            new = None if tokens is None or before is None else tokens - before
            each = self.flops_of(row)
            flops = None if flops is None or new is None or each is None else flops + new * each
            if row.get("elapsed_seconds") is not None:
                seconds = row["elapsed_seconds"]
            elif new is not None and speed and seconds is not None:
                seconds += new / speed  # a row without a speed is passed over, as in the report of a run
            before = tokens
            found.append(Point(row, row["step"], tokens, flops, seconds))
        return found

    @cached_property
    def _tracks(self) -> dict[str, tuple[list[float], list[float]]]:
        return {}

    def track(self, axis: str) -> tuple[list[float], list[float]]:
        """(steps, places on the axis) of the rows that have one."""
        if axis not in self._tracks:
            known = [(float(point.step), x) for point in self.points if (x := point.at(axis)) is not None]
            self._tracks[axis] = [step for step, _ in known], [x for _, x in known]
        return self._tracks[axis]

    def flops_of(self, row: Row) -> float | None:
        """Operations a token in this row's step: as measured, else by arithmetic as if each row were one document."""
        told: float | None = row.get("flops_per_token")
        return told if told is not None else self._flops_at(row.get("sequence_length") or 0)

    @cached_property
    def _flops_at(self) -> Callable[[int], float | None]:
        config = self.settings
        if config is None:
            return lambda length: None
        try:
            vocab_size = build_tokenizer(config.data.tokenizer).vocab_size
        except Refusal:
            return lambda length: None
        return cache(lambda length: flops_per_token(config.model, vocab_size, length) if length else None)

    @property
    def end(self) -> Point | None:
        return self.points[-1] if self.points else None

    @property
    def tokens(self) -> int | None:
        """That were trained on; those of the run that it branches from are among them."""
        known = [row["tokens"] for row in (*self.metrics, *self.evals) if row.get("tokens") is not None]
        return max(known, default=None)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """`total` and `active`; nothing where they are not known."""
        told: dict[str, int] | None = self.environment.get("parameters")
        if told:
            return told
        config = self.settings
        if config is None:
            return {}
        try:
            size = count(config.model, build_tokenizer(config.data.tokenizer).vocab_size)
        except Refusal:
            return {}
        return {"total": size.total, "active": size.active}

    @property
    def mean_flops(self) -> float | None:
        """Operations a token, mean over the run."""
        end, origin = self.end, self.environment.get("branched_from") or {}
        if end is None or end.flops is None or not end.tokens:
            return None
        trained = end.tokens - origin.get("tokens", 0)
        return end.flops / trained if trained > 0 else None

    @property
    def routing(self) -> str:
        """How tokens find experts, in words."""
        told = self.environment.get("routing")
        if isinstance(told, str):
            return told
        return "" if self.settings is None else routing_in_words(self.settings.model.routed)

    def median(self, key: str) -> float | None:
        """Of one key of the metrics, over rows that have it."""
        known = [row[key] for row in self.metrics if row.get(key) is not None]
        return statistics.median(known) if known else None

    def mean(self, key: str) -> float | None:
        known = [row[key] for row in self.metrics if row.get(key) is not None]
        return statistics.fmean(known) if known else None

    def most(self, key: str) -> float | None:
        return max((row[key] for row in self.metrics if row.get(key) is not None), default=None)

    @cached_property
    def last(self) -> dict[tuple[str, int, Any], Row]:
        """The last row of each cell of the evaluations: by task, length, and depth, layer or place."""
        return {(row["task"], row["length"], _place(row)): row for row in self.evals}

    def cells(self, task: str) -> list[Cell]:
        """The last of a task's cells that have a depth."""
        rows = (row for (name, _, _), row in self.last.items() if name == task and row.get("depth") is not None)
        return [Cell.from_row(row) for row in rows]

    def tasks(self, kind: str) -> list[str]:
        """Those of one kind that were asked: `held_out` finds `held_out/web`."""
        return list(dict.fromkeys(row["task"] for row in self.evals if row["task"].partition("/")[0] == kind))


def read_seen(folder: Path, arm: str, seed: int | None, group: str = "") -> SeenRun | None:
    """A run of ours; None where it has not begun. Raises Refusal naming a file that is damaged."""
    if not (folder / "config.toml").is_file():
        return None
    facts = read_run(folder)
    return of_facts(facts, arm, seed, group) if facts.metrics or facts.evals else None


def of_facts(facts: RunFacts, arm: str, seed: int | None, group: str) -> SeenRun:
    own = SeenRun(
        *(group, arm, seed, facts.folder, facts.metrics, facts.evals),
        *(facts.config, facts.config_toml, facts.environment),
    )
    notes = []
    if facts.metrics and "flops_per_token" not in facts.metrics[-1]:
        if own.settings is None:
            notes.append("its configuration is not one of this version: no FLOPs")
        else:
            notes.append("FLOPs by arithmetic from its configuration, each row taken as one document")
    total = facts.config.get("total_tokens") or 0
    if facts.tokens < total:
        notes.append(f"not complete: {facts.tokens:,} of {total:,} tokens")
    return replace(own, notes=tuple(notes))


def groups_of(runs: Sequence[SeenRun]) -> dict[str, list[SeenRun]]:
    """Runs by group, in order."""
    found: dict[str, list[SeenRun]] = {}
    for run in runs:
        found.setdefault(run.group, []).append(run)
    return found


def arms_of(runs: Sequence[SeenRun]) -> dict[str, list[SeenRun]]:
    """Runs by arm, in order: those of one arm are its seeds."""
    found: dict[str, list[SeenRun]] = {}
    for run in runs:
        found.setdefault(run.arm, []).append(run)
    return found


def _has_clock(row: Row) -> bool:
    """Whether it says how long steps took: a speed does so of counted tokens alone."""
    is_counted = row.get("tokens") is not None and bool(row.get("tokens_per_second"))
    return is_counted or row.get("elapsed_seconds") is not None


def _place(row: Row) -> Any:
    return next((row[key] for key in ("depth", "layer", "start") if row.get(key) is not None), None)
