"""Judges a stage by its gate: pure functions of what was measured before the stage and at its end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from context.gate import GateSettings
from context.stages import StageSettings
from evals.scoring import Cell
from evals.suite import EvalsSettings, tasks_of

ROUNDING = 1e-9
"""Of a mean of shares: 90 of 100 over five depths may sum to a hair below 0.9."""


@dataclass(frozen=True)
class Finding:
    """One demand of a gate, and what was measured."""

    task: str
    """`needle`, or `held_out/` and a source."""
    length: int
    measured: float
    """Share of needles found, or bits per byte."""
    limit: float
    """The least share of needles, or the most bits per byte, that meets the demand."""
    count: int
    """Samples or tokens that were asked."""
    before: float | None = None
    """Bits per byte when the stage began."""

    @property
    def is_met(self) -> bool:
        """Whether the demand is met; a number that is none meets nothing, and the last bit of a sum decides nothing."""
        above = self.measured - self.limit
        return above >= -ROUNDING if self.task == "needle" else above <= ROUNDING

    def __str__(self) -> str:
        if self.before is None:
            return f"{self.task} at length {self.length}: {self.measured:.3g}, at least {self.limit:.3g} is asked for"
        change, allowed = self.measured - self.before, self.limit - self.before
        return (
            f"{self.task} at length {self.length}: {self.before:.4f} -> {self.measured:.4f} bits per byte, "
            f"{change:+.4f}, at most {allowed:+.4f} is allowed"
        )


@dataclass(frozen=True)
class Verdict:
    """What the gate of a stage found."""

    stage: int
    sequence_length: int
    findings: tuple[Finding, ...]

    @property
    def is_met(self) -> bool:
        return all(finding.is_met for finding in self.findings)

    def __str__(self) -> str:
        """One line: the stage, whether its gate is met, and every finding or those that were not met."""
        told = [finding for finding in self.findings if self.is_met or not finding.is_met]
        what = "is met" if self.is_met else "is not met"
        return f"the gate of context.stages.{self.stage} {what}: {'; '.join(map(str, told))}"

    def cells(self) -> list[Cell]:
        """A row of evals.jsonl for each finding: task `gate/…`, what was measured as the score."""
        cells = []
        for found in self.findings:
            extra = {"limit": found.limit, "is_met": int(found.is_met)}
            extra |= {} if found.before is None else {"before": found.before}
            cells.append(Cell(f"gate/{found.task}", found.length, None, found.measured, found.count, extra))
        return cells

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> "Verdict":
        """What `to_json` gave; a number that was none comes back as NaN."""
        findings = [{key: _number(value) for key, value in found.items()} for found in table["findings"]]
        for found in findings:
            found["before"] = None if found["task"] == "needle" else found["before"]
        return cls(table["stage"], table["sequence_length"], tuple(Finding(**found) for found in findings))


def judge(
    gate: GateSettings, stages: Sequence[StageSettings], index: int, before: Sequence[Cell], after: Sequence[Cell]
) -> Verdict:
    """The verdict on stage `index`: `before` was asked when it began, under the RoPE before it, and `after` at its end.

    What was not measured on one of the two sides counts as not met.
    """
    findings, length = [], stages[index].sequence_length
    if gate.needle is not None:
        cells = [cell for cell in after if cell.task == "needle" and cell.length == length]
        findings.append(Finding("needle", length, _mean(cells), gate.needle, sum(cell.count for cell in cells)))
    if gate.max_short_loss_increase is not None:
        short = stages[index - 1].sequence_length
        ours, theirs = _held_out(after, short), _held_out(before, short)
        for task in sorted(ours.keys() | theirs.keys()) or ["held_out"]:
            start, end = _score(theirs.get(task)), _score(ours.get(task))
            count = ours[task].count if task in ours else 0
            findings.append(Finding(task, short, end, start + gate.max_short_loss_increase, count, start))
    return Verdict(index, length, tuple(findings))


def check_gates(stages: Sequence[StageSettings], evals: EvalsSettings) -> None:
    """Raise ValueError where a gate asks for what the run's evaluations do not measure."""
    for index, stage in enumerate(stages):
        if stage.gate is None:
            continue
        key = f"context.stages.{index}.gate"
        if not evals.at_stage_ends:
            raise ValueError(f"{key} is asked at the stage's end; set evals.at_stage_ends=true or leave the gate out")
        if stage.gate.needle is not None:
            _check_asked(f"{key}.needle={stage.gate.needle}", "needle", stage.sequence_length, evals)
        if stage.gate.max_short_loss_increase is not None:
            demand = f"{key}.max_short_loss_increase={stage.gate.max_short_loss_increase}"
            if index == 0:
                raise ValueError(f"{demand} compares with the stage before, and there is none; leave it out")
            _check_asked(demand, "held_out", stages[index - 1].sequence_length, evals)


def _check_asked(demand: str, task: str, length: int, evals: EvalsSettings) -> None:
    table = getattr(evals, task)
    if table is None:
        raise ValueError(f"{demand} needs evals.{task}, which has no table; add [evals.{task}] with length {length}")
    if task not in tasks_of(evals):
        raise ValueError(f"{demand} needs {task}, which evals.tasks leaves out; add it there")
    if length not in table.lengths:
        lengths = ", ".join(str(known) for known in sorted({*table.lengths, length}))
        raise ValueError(f"{demand} needs {task} at length {length}; set evals.{task}.lengths=[{lengths}]")


def _held_out(cells: Sequence[Cell], length: int) -> dict[str, Cell]:
    return {cell.task: cell for cell in cells if cell.task.startswith("held_out/") and cell.length == length}


def _mean(cells: Sequence[Cell]) -> float:
    return sum(_score(cell) for cell in cells) / len(cells) if cells else math.nan


def _score(cell: Cell | None) -> float:
    return math.nan if cell is None or cell.score is None else cell.score


def _number(value: Any) -> Any:
    return math.nan if value is None else value
