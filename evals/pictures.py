"""The pictures of one evaluation: a grid for each task with depths, and loss by position."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evals.colours import FAINT, INK
from evals.grid import Grid, make_grid
from evals.heatmap import png, to_png
from evals.scoring import Cell

LINES = ("#3f7fd0", "#e0803a", "#35a079", "#c9506a", "#8d6fd1", "#a3892e")


def grids_of(cells: Sequence[Cell], title: str, trained_length: int | None = None) -> dict[str, Grid]:
    """A grid for each task that was asked at depths, by the task's name."""
    tasks = dict.fromkeys(cell.task for cell in cells if cell.depth is not None)
    return {
        task: make_grid(cells, title if task == "needle" else f"{task}, {title}", trained_length, task)
        for task in tasks
    }


def pictures_of(cells: Sequence[Cell], grids: Mapping[str, Grid], trained_length: int | None) -> dict[str, bytes]:
    """File name to PNG: `needle.png` and its like, `positions.png`."""
    found = {f"{task.replace('/', '_')}.png": png([grid]) for task, grid in grids.items()}
    if any(cell.task.startswith("positions/") for cell in cells):
        found["positions.png"] = to_png(draw_positions(cells, trained_length))
    return found


def draw_positions(cells: Sequence[Cell], trained_length: int | None = None) -> Figure:
    """Bits per byte by position, a line a source with its 95% band; dashed at the trained length, if it lies inside."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    by_source: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.task.startswith("positions/"):
            by_source.setdefault(cell.task.partition("/")[2], []).append(cell)
    for number, (source, stretches) in enumerate(by_source.items()):
        _draw_line(axes, source, sorted(stretches, key=lambda cell: cell.extra["start"]), LINES[number % len(LINES)])
    end = max(cell.extra["stop"] for stretches in by_source.values() for cell in stretches)
    if trained_length is not None and trained_length < end:
        axes.axvline(trained_length, color=INK, linewidth=1.2, dashes=(3.2, 1.8))
        axes.annotate(
            f"trained at {trained_length:,}", (trained_length, 1), xycoords=("data", "axes fraction"),
            xytext=(4, -4), textcoords="offset points", va="top", fontsize=8.5, color=FAINT,
        )  # fmt: skip
    axes.set_xlabel("position in the document", fontsize=9, color=FAINT)
    axes.set_ylabel("bits per byte", fontsize=9, color=FAINT)
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8.5, colors=FAINT)
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK)
    return figure


def _draw_line(axes: Axes, source: str, stretches: Sequence[Cell], colour: str) -> None:
    places = [(cell.extra["start"] + cell.extra["stop"]) / 2 for cell in stretches]
    low, high = ([cell.extra.get(end, math.nan) for cell in stretches] for end in ("low", "high"))
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        places, [cell.score for cell in stretches], "o-", color=colour, markersize=3.6, linewidth=1.7, label=source
    )
