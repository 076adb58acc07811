"""What a run's folder says about the run: its plan, its numbers, and where its stages ended."""

import json
import math
import statistics
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from checkpoint.records import Environment, EvalsRow, MetricsRow, Planned, wrong_with
from run.files import read_text
from run.metrics import Row, read_rows, short
from settings import Refusal


@dataclass(frozen=True)
class StageFacts:
    """One stage as the configuration plans it; `until_tokens` is rounded up to a whole step, as the run does."""

    index: int
    start_tokens: int
    until_tokens: int
    sequence_length: int
    rotary: str
    mixture: str

    @property
    def name(self) -> str:
        """`stage 1 (length 512)`, counted from 0 as in the configuration."""
        return f"stage {self.index} (length {self.sequence_length})"


@dataclass(frozen=True)
class Snapshot:
    """The last evaluation of a stage."""

    stage: StageFacts
    step: int
    tokens: int
    rows: tuple[Row, ...]
    is_start: bool = False
    """Not the last evaluation but one before the stage's first step."""

    @property
    def is_stage_end(self) -> bool:
        return self.tokens >= self.stage.until_tokens

    @property
    def title(self) -> str:
        if self.is_start:
            return f"start of {self.stage.name}"
        place = "after" if self.is_stage_end else f"at {short(self.tokens)} tokens, in"
        return f"{place} {self.stage.name}"

    def mean_score(self, task: str, length: int) -> float | None:
        """Mean over depths; None when this task was not asked at this length."""
        scores = [row["score"] for row in self.rows if row["task"] == task and row["length"] == length]
        numbers = [score for score in scores if score is not None]
        return statistics.fmean(numbers) if numbers else None


@dataclass(frozen=True)
class RunFacts:
    """What lies in a run's folder."""

    folder: Path
    config: dict[str, Any]
    config_toml: str
    environment: dict[str, Any]
    metrics: list[Row]
    evals: list[Row]
    starts: list[Row] = field(default_factory=list)
    """What was asked at the beginning of a stage, before its first step: evaluations that stand apart from `evals`."""

    @cached_property
    def stages(self) -> list[StageFacts]:
        start, stages = 0, []
        for index, table in enumerate(self.config.get("context", {}).get("stages", [])):
            step = table.get("tokens_per_step", self.config.get("tokens_per_step", 1))
            until = start + math.ceil((table["until_tokens"] - start) / step) * step
            mixture = ", ".join(f"{name} {share:g}" for name, share in table.get("mixture", {}).items())
            rotary = _one_line(table.get("rotary", {}))
            stages.append(StageFacts(index, start, until, table["sequence_length"], rotary, mixture or "as weighted"))
            start = until
        return stages

    @cached_property
    def snapshots(self) -> list[Snapshot]:
        """One for each stage that was evaluated, in order."""
        found = []
        for stage in self.stages:
            inside = [row for row in self.evals if self.stage_of(row) == stage]
            step = max((row["step"] for row in inside), default=None)
            rows = tuple(row for row in inside if row["step"] == step)
            found += [Snapshot(stage, rows[0]["step"], rows[0]["tokens"], rows)] if rows else []
        return found

    @cached_property
    def moments(self) -> list[Snapshot]:
        """The snapshots, and before that of a stage what was asked when it began."""
        found = []
        for snapshot in self.snapshots:
            rows = tuple(row for row in self.starts if self.stage_of(row) == snapshot.stage)
            found += [Snapshot(snapshot.stage, rows[0]["step"], rows[0]["tokens"], rows, is_start=True)] if rows else []
            found += [snapshot]
        return found

    @property
    def origin(self) -> dict[str, Any]:
        """Of a branch: the run, the stage and the tokens that it began with; of another run, nothing."""
        return self.environment.get("branched_from") or {}

    @property
    def tokens(self) -> int:
        return max((row["tokens"] for row in (*self.metrics, *self.evals)), default=0)

    def stage_of(self, row: Row) -> StageFacts | None:
        """The stage a row was measured in; what is measured at a boundary belongs to the stage that ends there."""
        if row.get("stage") is not None and row["stage"] < len(self.stages):
            return self.stages[row["stage"]]
        return next((stage for stage in self.stages if row["tokens"] <= stage.until_tokens), None)

    def tasks(self, kind: str) -> list[str]:
        """The tasks of one kind that were asked: `held_out` finds `held_out/web` and `held_out/code`."""
        return list(dict.fromkeys(row["task"] for row in self.evals if row["task"].partition("/")[0] == kind))

    def column(self, key: str) -> tuple[list[float], list[float | None]]:
        """(tokens, values) of one key of metrics.jsonl."""
        rows = [row for row in self.metrics if key in row]
        return [row["tokens"] for row in rows], [row[key] for row in rows]

    def training_seconds(self) -> float:
        """Time in training steps, evaluations and pauses left out."""
        seconds, before = 0.0, self.origin.get("tokens", 0)
        for row in self.metrics:
            if row.get("tokens_per_second"):
                seconds += (row["tokens"] - before) / row["tokens_per_second"]
            before = row["tokens"]
        return seconds


def read_run(folder: Path) -> RunFacts:
    """What a run's folder says; only config.toml has to be there. Raises Refusal naming a file that is damaged."""
    path = folder / "config.toml"
    if not path.is_file():
        raise Refusal(f"{folder}: holds no config.toml, so it is no run; give a folder below runs/")
    config_toml, config = _read_config(path)
    described = _read_environment(folder / "environment.json")
    metrics = read_rows(folder / "metrics.jsonl", MetricsRow)
    asked = read_rows(folder / "evals.jsonl", EvalsRow)
    evals = [row for row in asked if row.get("moment") != "start"]
    starts = [row for row in asked if row.get("moment") == "start"]
    return RunFacts(folder.resolve(), config, config_toml, described, metrics, evals, starts)


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    wayout = "put a good copy back (each checkpoint holds one)"
    text = read_text(path)
    try:
        config = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: is damaged: {error}; {wayout}") from None
    if wrong := wrong_with(config, Planned):
        raise Refusal(f"{path}: is damaged: {wrong}; {wayout}")
    return text, config


def _read_environment(path: Path) -> dict[str, Any]:
    wayout = "remove it, and the report does without"
    text = read_text(path) if path.exists() else ""
    try:
        described = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: is damaged: {error}; {wayout}") from None
    if not isinstance(described, dict):
        raise Refusal(f"{path}: is damaged: it holds no JSON object; {wayout}")
    if wrong := wrong_with(described, Environment):
        raise Refusal(f"{path}: is damaged: {wrong}; {wayout}")
    return described


def _one_line(table: Any) -> str:
    if not isinstance(table, dict):
        return str(table)
    rest = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in table.items()
        if key != "kind"
    )
    return f"{table.get('kind', '')} ({rest})" if rest else str(table.get("kind", ""))
