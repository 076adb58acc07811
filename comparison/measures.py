"""The headline measures of runs, each with what chance may have made of it: other text, other samples."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np

from comparison.seen import SeenRun
from evals.grid import THRESHOLD, effective_length
from evals.intervals import NORMAL, student_quantile
from evals.scoring import Cell
from run.metrics import Row

LAST_SHARE = 0.1
"""Of a run's tokens, over whose steps the training loss is taken at the end."""
Place = tuple[int, float]
"""Length and depth."""


@dataclass(frozen=True)
class Measure:
    """What arms are compared by."""

    name: str
    """For files: `held_out/python@512`."""
    words: str
    """In a sentence: `bits per byte of held-out python at length 512`."""
    form: str
    """How its numbers are written."""
    joint: str = ""
    """Between a number and the words: `tokens in the `."""
    is_low_better: bool = True
    least_seeds: int = 2
    """Paired seeds below which nothing is evidence. Scores of right answers may jump from none to all, as a coin
    falls: two seeds that fall alike by chance do so once in eight times, three once in thirty-two."""
    over: str = "text"
    """What is drawn again of one seed: "" where what comes of that would look surer than it is."""


@dataclass
class Draws:
    """So many times, other text than was read: runs that read the same text are given the same pieces of it."""

    count: int
    seed: int = 0
    _places: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def pieces(self, text: str, size: int) -> np.ndarray:
        """Which of its pieces stand in each of the texts that are drawn, X by P."""
        if (text, size) not in self._places:
            self._places[text, size] = self.rng.integers(size, size=(self.count, size))
        return self._places[text, size]


@dataclass(frozen=True)
class Sample:
    """One run's number, and the numbers it might have been (X); None: nothing is known of that."""

    value: float
    drawn: Callable[[Draws], np.ndarray] | None = None

    def values(self, draws: Draws) -> np.ndarray:
        return np.full(draws.count, self.value) if self.drawn is None else self.drawn(draws)


Found = tuple[Measure, dict[int, Sample]]
"""A measure, and the sample of each run that has it, by the run's number in the list."""


def headline(runs: Sequence[SeenRun]) -> list[Found]:
    """What of these runs can be compared, the most telling first: each on what all that have it were asked."""
    found = [*_held_out(runs), *_needles(runs)]
    if any(not run.tasks("held_out") for run in runs):
        found += _training(runs)
    return [(measure, samples) for measure, samples in found if len(samples) > 1]


def held_out_length(runs: Sequence[SeenRun], task: str) -> int | None:
    """The longest at which all that were asked a task were asked it."""
    asked = [{length for name, length, _ in run.last if name == task} for run in runs]
    return max(set.intersection(*(each for each in asked if each)), default=None) if any(asked) else None


def _held_out(runs: Sequence[SeenRun]) -> list[Found]:
    """Each source, and their mean where there are several."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks("held_out")))
    parts: dict[str, dict[int, Sample]] = {}
    found, lengths = [], {}
    for task in tasks:
        length = held_out_length(runs, task)
        if length is not None:
            lengths[task] = length
            rows = {n: run.last[task, length, None] for n, run in enumerate(runs) if (task, length, None) in run.last}
            parts[task] = {n: text_sample(row) for n, row in rows.items()}
            source = task.partition("/")[2] or "text"
            words = f"bits per byte of held-out {source} at length {length:,}"
            found.append((Measure(f"{task}@{length}", words, ".3f"), parts[task]))
    shared = [n for n in range(len(runs)) if all(n in samples for samples in parts.values())]
    if len(parts) > 1 and shared:
        mean = {n: mean_of([samples[n] for samples in parts.values()]) for n in shared}
        words = f"bits per byte of held-out text, mean of {len(parts)} sources"
        found.insert(0, (Measure("held_out", words, ".3f"), mean))
    return found


def text_sample(row: Row) -> Sample:
    """Of a row of held-out text: its score, and that of as many of its pieces, drawn again."""
    value, pieces = _number(row["score"]), row.get("pieces")
    if not pieces or len(pieces) < 2 or math.isnan(value):
        return Sample(value)
    nats_P, bytes_P = (np.array([_number(piece[n]) for piece in pieces]) for n in (0, 1))
    return Sample(value, partial(_drawn_text, nats_P, bytes_P, str(row.get("text", ""))))


def _drawn_text(nats_P: np.ndarray, bytes_P: np.ndarray, text: str, draws: Draws) -> np.ndarray:
    # Few pieces that are drawn again vary less than few others would: stretched to what Student's t has for as many.
    places_XP, size = draws.pieces(text, len(nats_P)), len(nats_P)
    drawn_X = nats_P[places_XP].sum(axis=1) / bytes_P[places_XP].sum(axis=1) / math.log(2)
    whole = nats_P.sum() / bytes_P.sum() / math.log(2)
    return np.asarray(whole + (drawn_X - whole) * _stretch(size))


@cache
def _stretch(size: int) -> float:
    """As in `evals.intervals`: sqrt(P / (P - 1)), and Student's quantile in place of the normal's."""
    return math.sqrt(size / (size - 1)) * student_quantile(0.025, size - 1) / NORMAL.inv_cdf(0.025)


def mean_of(samples: Sequence[Sample]) -> Sample:
    """Of several texts, each as much as another."""
    value = sum(sample.value for sample in samples) / len(samples)
    if all(sample.drawn is None for sample in samples):
        return Sample(value)
    return Sample(value, lambda draws: np.mean([sample.values(draws) for sample in samples], axis=0))


def _needles(runs: Sequence[SeenRun]) -> list[Found]:
    """The mean over all cells that all were asked, and the length up to which they are found."""
    found: list[Found] = []
    for task in dict.fromkeys(task for run in runs for task in run.tasks("needle")):
        cells = {n: {_place(cell): cell for cell in run.cells(task)} for n, run in enumerate(runs)}
        cells = {n: each for n, each in cells.items() if each}
        shared = sorted(set.intersection(*map(set, cells.values()))) if cells else []
        if not shared:
            continue
        chosen = {n: [each[place] for place in shared] for n, each in cells.items()}
        name = task.replace("/", " ")
        words = f"share of {name} samples found (mean of {len(shared)} cells)"
        measure = Measure(task, words, ".3f", "in the ", is_low_better=False, least_seeds=3, over="samples")
        found.append((measure, {n: needle_sample(each) for n, each in chosen.items()}))
        if len({length for length, _ in shared}) > 1:
            words = f"effective length of {name} (up to which {THRESHOLD:.0%} are found)"
            name = f"effective_length/{task}"
            measure = Measure(name, words, ",.0f", "tokens in the ", is_low_better=False, least_seeds=3, over="")
            found.append((measure, {n: reach_sample(each) for n, each in chosen.items()}))
    return found


def needle_sample(cells: Sequence[Cell]) -> Sample:
    value = sum(cell.score for cell in cells) / len(cells)
    return Sample(value) if math.isnan(value) else Sample(value, lambda draws: _drawn_cells(cells, draws).mean(axis=1))


def reach_sample(cells: Sequence[Cell]) -> Sample:
    if any(math.isnan(cell.score) for cell in cells):
        return Sample(math.nan)
    value = float(effective_length(cells, task=cells[0].task))
    return Sample(value, lambda draws: _drawn_reach(cells, draws))


def _drawn_cells(cells: Sequence[Cell], draws: Draws) -> np.ndarray:
    """Shares that samples right so often might have come from, X by cells: Jeffreys' distribution (1946).

    Arms are drawn apart, although they were asked the same: rows keep no answers, and to take them for independent
    makes the interval rather too wide.
    """
    count_C = np.array([max(cell.count, 1) for cell in cells])
    right_C = np.array([cell.score for cell in cells]) * count_C
    drawn_XC = draws.rng.beta(right_C + 0.5, count_C - right_C + 0.5, size=(draws.count, len(cells)))
    # Its mean lies nearer to a half than what was measured: its spread is wanted, around that.
    return np.asarray(drawn_XC + (right_C / count_C - (right_C + 0.5) / (count_C + 1)))


def _drawn_reach(cells: Sequence[Cell], draws: Draws) -> np.ndarray:
    scores_XC, length_C = _drawn_cells(cells, draws), np.array([cell.length for cell in cells])
    reached_X, goes_on_X = np.zeros(draws.count), np.ones(draws.count, dtype=bool)
    for length in np.unique(length_C):
        goes_on_X &= scores_XC[:, length_C == length].mean(axis=1) >= THRESHOLD
        reached_X[goes_on_X] = length
    return reached_X


def _training(runs: Sequence[SeenRun]) -> list[Found]:
    """Where no text was held out of some run: the loss of its last steps, of which no interval is known."""
    samples = {n: Sample(value) for n, run in enumerate(runs) if (value := last_loss(run)) is not None}
    words = f"training loss over the last {LAST_SHARE:.0%} of steps"
    return [(Measure("loss", words, ".4f", "nats a token in the "), samples)]


def last_loss(run: SeenRun) -> float | None:
    """NaN where a step of the last had no number."""
    if not run.metrics:
        return None
    begin = (1 - LAST_SHARE) * run.metrics[-1]["step"]
    losses = [_number(row["loss"]) for row in run.metrics if row["step"] >= begin and "loss" in row]
    return sum(losses) / len(losses) if losses else None


def values_of(run: SeenRun, found: Sequence[Found], number: int) -> Mapping[str, float]:
    """A run's numbers by the measures' names."""
    return {measure.name: samples[number].value for measure, samples in found if number in samples}


def _place(cell: Cell) -> Place:
    assert cell.depth is not None, "cells of needles have one"
    return cell.length, cell.depth


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
