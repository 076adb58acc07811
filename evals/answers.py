"""Rows in which some tokens are asked for, made into scores a row and cells: the end of every task of that kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from evals.intervals import bounds
from evals.scoring import Cell, Materials, Rows, score_rows

Rows_S = slice | np.ndarray


@dataclass(frozen=True)
class RowAnswers:
    """What the model answered to each of S rows, teacher-forced: given the right answers before.

    Right at every answer token is the same as right when generated greedily, in one forward pass.
    """

    is_exact_S: np.ndarray
    """Whether every asked token was the model's first choice."""
    accuracy_S: np.ndarray
    """Share of the asked tokens that were."""
    logprob_S: np.ndarray
    """Mean log-probability of an asked token, in nats."""

    def cell(
        self,
        task: str,
        length: int,
        depth: float | None = None,
        *,
        rows: Rows_S = slice(None),
        by: Literal["exact", "accuracy"] = "exact",
        extra: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> Cell:
        """Some of the rows as one cell: score is the mean of what `by` names, `low` to `high` its 95% interval.

        Extra: `answer_logprob`, `token_accuracy`, and `exact` where it is not the score.
        """
        scores_S = {"exact": self.is_exact_S, "accuracy": self.accuracy_S}[by][rows].astype(np.float64)
        scores = {
            "answer_logprob": float(self.logprob_S[rows].mean()),
            "token_accuracy": float(self.accuracy_S[rows].mean()),
            **({} if by == "exact" else {"exact": float(self.is_exact_S[rows].mean())}),
            **bounds(scores_S, seed),
        }
        return Cell(task, length, depth, float(scores_S.mean()), len(scores_S), {**scores, **(extra or {})})


def answer_rows(model: nn.Module, materials: Materials, rows: Rows) -> RowAnswers:
    """Read the rows and compare what the model puts first with what is asked; every row must ask for something."""
    is_asked_BT = rows.is_asked_BT
    count_B = is_asked_BT.sum(axis=1)
    assert count_B.all(), "a row that asks for nothing has no score"
    greedy_BT, logprob_BT = score_rows(model, materials, rows)
    right_B = ((greedy_BT == rows.labels_BT) & is_asked_BT).sum(axis=1)
    sum_B = np.where(is_asked_BT, logprob_BT, 0).sum(axis=1, dtype=np.float64)
    return RowAnswers(right_B == count_B, right_B / count_B, sum_B / count_B)
