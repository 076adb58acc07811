"""Scores by length and depth, and how far they reach: the longest length that a model handles, by a named threshold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evals.scoring import Cell

THRESHOLD = 0.8
"""Mean score from which a length counts as handled, in tasks whose score is a share of right answers."""
SHARES_RIGHT = ("needle", "many_needles", "passkey", "induction", "copying", "mqar")
"""Those tasks, by what stands before the slash in their names; RULER has a threshold of its own."""


@dataclass(frozen=True)
class Grid:
    """The scores of one model at one time."""

    title: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    scores_DL: np.ndarray
    """A row a depth, a column a length, NaN where nothing was measured."""
    trained_length: int | None = None
    """The longest sequence that the last stage has trained on so far."""

    @property
    def columns_trained(self) -> int | None:
        """How many columns lie within the trained length."""
        return None if self.trained_length is None else sum(length <= self.trained_length for length in self.lengths)

    def effective_length(self, threshold: float = THRESHOLD) -> int:
        return _reached(self.lengths, [_mean(column_D) for column_D in self.scores_DL.T], threshold)


def make_grid(cells: Sequence[Cell], title: str, trained_length: int | None = None, task: str = "needle") -> Grid:
    """The grid of one task's cells; of a cell that was measured twice, the last counts."""
    scores = {(cell.depth, cell.length): cell.score for cell in cells if cell.task == task and cell.depth is not None}
    lengths = sorted({length for _, length in scores})
    depths = sorted({depth for depth, _ in scores if depth is not None})
    if not scores:
        raise ValueError(f"no cells of task {task!r} for the heatmap {title!r}")
    scores_DL = np.array([[scores.get((depth, length), math.nan) for length in lengths] for depth in depths])
    return Grid(title, tuple(lengths), tuple(depths), scores_DL, trained_length)


def effective_length(cells: Sequence[Cell], threshold: float = THRESHOLD, task: str = "needle") -> int:
    """The longest tested length up to which every tested length scores at least `threshold` on the mean over depths.

    0 if the shortest already fails. RULER takes the longest length that passes; here a hole below it ends the count.
    """
    means = means_by_length(cells, task)
    return _reached(list(means), list(means.values()), threshold)


def effective_cells(cells: Sequence[Cell]) -> list[Cell]:
    """`effective_length/TASK` for every task of right and wrong answers that was asked at two lengths or more.

    score: tokens; length: the longest that was tested; count: how many were. Extra: `threshold`.
    """
    found = []
    for task in dict.fromkeys(cell.task for cell in cells if cell.task.partition("/")[0] in SHARES_RIGHT):
        means = means_by_length(cells, task)
        if len(means) > 1:
            reached = _reached(list(means), list(means.values()), THRESHOLD)
            extra = {"threshold": THRESHOLD}
            found.append(Cell(f"effective_length/{task}", max(means), None, float(reached), len(means), extra))
    return found


def means_by_length(cells: Sequence[Cell], task: str) -> dict[int, float]:
    """The task's mean score at each length, shortest first."""
    scores: dict[int, list[float]] = {}
    for cell in cells:
        if cell.task == task:
            scores.setdefault(cell.length, []).append(cell.score)
    return {length: _mean(np.array(scores[length])) for length in sorted(scores)}


def _mean(scores: np.ndarray) -> float:
    measured = scores[~np.isnan(scores)]
    return float(measured.mean()) if len(measured) else math.nan


def _reached(lengths: Sequence[int], means: Sequence[float], threshold: float) -> int:
    reached = 0
    for length, mean in zip(lengths, means, strict=True):
        if not mean >= threshold - 1e-9:  # a mean of sums in floating point may miss an equal threshold
            break
        reached = length
    return reached
