"""Lines of arms: the mean over seeds, each seed faintly, against tokens, operations, seconds or steps."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from comparison.measures import held_out_length
from comparison.seen import AXES, SeenRun, arms_of
from run.figures import COLOURS, Line, Panel, smooth
from run.metrics import Row, short

Place = tuple[float, float, float]
"""Step, place on the axis, value."""
SMOOTHED_FROM = 20
MOST_POINTS = 500
"""Of a line: more of them are not seen, and take long to smooth."""


@dataclass(frozen=True)
class Curve:
    """One arm's."""

    mean: Line
    seeds: tuple[Line, ...] = ()


def colours_of(runs: Sequence[SeenRun]) -> dict[str, str]:
    """One colour an arm, the same in all pictures."""
    return {arm: COLOURS[number % len(COLOURS)] for number, arm in enumerate(arms_of(runs))}


def axes_of(runs: Sequence[SeenRun]) -> list[str]:
    """Those that any run knows; steps too where some run counts no tokens."""
    known = [axis for axis in ("tokens", "flops", "seconds") if any(_reaches(run, axis) for run in runs)]
    return known if all(_reaches(run, "tokens") for run in runs) else [*known, "step"]


def panel(  # noqa: PLR0917 (what is drawn, of whom, against what, and how)
    title: str, runs: Sequence[SeenRun], axis: str, places_of: Callable[[SeenRun, str], list[Place]],
    y_label: str = "", is_dotted: bool = False, from_zero: bool = False, counts_y: bool = False,
) -> Panel:  # fmt: skip
    """One line an arm, also for those that have none here: a legend below several panels is then that of all."""
    curves = {arm: together([places_of(run, axis) for run in own]) for arm, own in arms_of(runs).items()}
    return Panel(
        title,
        {arm: curve.mean for arm, curve in curves.items()},
        y_label,
        AXES.get(axis, axis),
        is_dotted=is_dotted,
        y_range=(0.0, None) if from_zero else _range(curves.values()),
        counts_y=counts_y,
        faint={arm: curve.seeds for arm, curve in curves.items()},
        colours=colours_of(runs),
    )


def metric(key: str, scale: float = 1.0) -> Callable[[SeenRun, str], list[Place]]:
    """The places of a key of the metrics."""

    def places(run: SeenRun, axis: str) -> list[Place]:
        found: list[Place] = []
        for point in run.points:
            x, y = point.at(axis), point.row.get(key, math.inf)
            if x is not None and y != math.inf:
                found.append((point.step, x, math.nan if y is None else y * scale))
        return found

    return places


def held_out(runs: Sequence[SeenRun], task: str | None = None) -> Callable[[SeenRun, str], list[Place]]:
    """The places of one source's bits per byte, or of the mean over sources, at the longest length that all share."""
    tasks = [task] if task else list(dict.fromkeys(each for run in runs for each in run.tasks("held_out")))
    chosen = {(each, held_out_length(runs, each)) for each in tasks}

    def places(run: SeenRun, axis: str) -> list[Place]:
        by_step: dict[int, dict[str, Row]] = {}
        for row in run.evals:
            if (row["task"], row["length"]) in chosen:
                by_step.setdefault(row["step"], {})[row["task"]] = row
        found: list[Place] = []
        for step, rows in sorted(by_step.items()):
            x = place_of(run, axis, step, next(iter(rows.values()))["tokens"])
            if x is not None and len(rows) == len(chosen):
                scores = [math.nan if row["score"] is None else row["score"] for row in rows.values()]
                found.append((step, x, sum(scores) / len(scores)))
        return found

    return places


def place_of(run: SeenRun, axis: str, step: int, tokens: float) -> float | None:
    """Where an evaluation stands on an axis: between the rows of the metrics around its step."""
    if axis in ("tokens", "step"):
        return tokens if axis == "tokens" else step
    steps, places = run.track(axis)
    if not steps:
        return None
    begin = (run.environment.get("branched_from") or {}).get("step", 0)
    return float(np.interp(step, [begin, *steps], [0.0, *places]))


def by_length(task: str) -> Callable[[SeenRun, str], list[Place]]:
    """The mean score at each length in the last evaluation, over the length."""

    def places(run: SeenRun, axis: str) -> list[Place]:
        scores: dict[int, list[float]] = {}
        for cell in run.cells(task):
            scores.setdefault(cell.length, []).append(cell.score)
        return [(length, length, sum(found) / len(found)) for length, found in sorted(scores.items())]

    return places


def by_position(task: str) -> Callable[[SeenRun, str], list[Place]]:
    """Bits per byte at each stretch of a window in the last evaluation, over its middle."""

    def places(run: SeenRun, axis: str) -> list[Place]:
        rows = [row for (name, _, _), row in run.last.items() if name == task]
        told = sorted((row["start"], row["stop"], row["score"]) for row in rows if row["score"] is not None)
        return [(start, (start + stop) / 2, score) for start, stop, score in told]

    return places


def together(runs: Sequence[Sequence[Place]]) -> Curve:
    """The mean over the steps that all have; where they share none, each is drawn faintly and there is no mean."""
    runs = [places for places in runs if places]
    if not runs:
        return Curve(([], []))
    if len(runs) == 1:
        return Curve(_drawn(runs[0]), (_line(_thinned(runs[0])),) if len(runs[0]) > SMOOTHED_FROM else ())
    by_step = [{step: (x, y) for step, x, y in places} for places in runs]
    shared = sorted(set.intersection(*map(set, by_step)))
    mean = [(step, *_mean([each[step] for each in by_step])) for step in shared]
    return Curve(_drawn(mean), tuple(map(_drawn, runs)))


def _drawn(places: Sequence[Place]) -> Line:
    """Smoothed where there are enough of them for it."""
    x, y = _line(_thinned(places))
    return x, smooth(_gaps(y)) if len(y) > SMOOTHED_FROM else y


def _thinned(places: Sequence[Place]) -> Sequence[Place]:
    """No more than can be seen: neighbours are taken together, and a gap in one of them is passed over."""
    if len(places) <= MOST_POINTS:
        return places
    groups = np.array_split(np.array(places, dtype=np.float64), MOST_POINTS)
    return [(group[0, 0], group[:, 1].mean(), _mean_of_known(group[:, 2])) for group in groups]


def _mean_of_known(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def lengths_marked(runs: Sequence[SeenRun], task: str) -> list[tuple[float, str]]:
    """The lengths of a task, for the axis below them."""
    lengths = sorted({cell.length for run in runs for cell in run.cells(task)})
    return [(length, f"{length:,}" if length < 10_000 else short(length)) for length in lengths]


def _mean(places: Iterable[tuple[float, float]]) -> tuple[float, float]:
    x, y = zip(*places, strict=True)
    return sum(x) / len(x), sum(y) / len(y)


def _line(places: Sequence[Place]) -> tuple[list[float], list[float | None]]:
    return [x for _, x, _ in places], [y for _, _, y in places]


def _gaps(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None or math.isnan(value) else value for value in values]


def _range(curves: Iterable[Curve]) -> tuple[float | None, float | None]:
    """Limits that the first few points of a falling line do not stretch."""
    lines = [line for curve in curves for line in (curve.mean, *curve.seeds)]
    known = sorted(y for _, line in lines for y in line if y is not None and math.isfinite(y))
    late = [y for _, line in lines for y in line[len(line) // 12 :] if y is not None and math.isfinite(y)]
    if not late or known[0] == known[-1]:
        return None, None
    room = 0.06 * (max(late) - known[0]) or 0.1
    return known[0] - room, max(late) + room


def _reaches(run: SeenRun, axis: str) -> bool:
    return any(point.at(axis) is not None for point in run.points)


def arms_with(runs: Sequence[SeenRun], keys: Iterable[str]) -> list[SeenRun]:
    """Runs whose metrics have any of these keys."""
    wanted = set(keys)
    return [run for run in runs if any(wanted & row.keys() for row in run.metrics)]


Titles = Mapping[str, str]
"""Key of the metrics -> what stands above its panel."""
