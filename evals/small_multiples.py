"""One grid after the other as training goes on: small, without numbers, on one scale."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evals.colours import FAINT, INK, MISSING, RED_TO_GREEN
from evals.grid import Grid
from evals.heatmap import draw_bar

CELL_INCHES = (0.2, 0.17)
WIDTH = 9.6
"""Of the picture, at most: that of a report's page, in inches."""
AT_MOST = 24
"""Grids in a picture: of more, some are left out evenly, never the first or the last."""


def draw_over_steps(grids: Sequence[Grid], title: str = "") -> Figure:
    """The grids in reading order, their titles above them; the dashed line is each one's trained length."""
    assert grids, "nothing to draw"
    grids = thin_out(grids)
    columns, depths = max(len(grid.lengths) for grid in grids), max(len(grid.depths) for grid in grids)
    size = (max(columns * CELL_INCHES[0], 1.15), max(depths * CELL_INCHES[1], 0.75))
    left, right, top, bottom, gap, between = 0.55, 0.95, 0.26 + (0.32 if title else 0.0), 0.28, 0.22, 0.36
    per_row = min(len(grids), max(1, int((WIDTH - left - right + gap) / (size[0] + gap))))
    num_rows = math.ceil(len(grids) / per_row)
    width = left + per_row * (size[0] + gap) - gap + right
    height = top + num_rows * (size[1] + between) - between + bottom
    figure = Figure(figsize=(width, height))
    for number, grid in enumerate(grids):
        row, column = divmod(number, per_row)
        corner = (left + column * (size[0] + gap), height - top - row * (size[1] + between) - size[1])
        axes = figure.add_axes((corner[0] / width, corner[1] / height, size[0] / width, size[1] / height))
        is_last_below = number + per_row >= len(grids)
        _draw_small(axes, grid, names_depths=column == 0, names_lengths=is_last_below)
    if title:
        figure.text(left / width, 1 - 0.1 / height, title, fontsize=11, weight="bold", color=INK, va="top")
    bar_height = min(size[1] * num_rows + between * (num_rows - 1), 1.6)
    bar = (width - right + 0.16, height - top - bar_height, 0.11, bar_height)
    draw_bar(figure.add_axes((bar[0] / width, bar[1] / height, bar[2] / width, bar[3] / height)))
    return figure


def thin_out(grids: Sequence[Grid], at_most: int = AT_MOST) -> list[Grid]:
    """At most so many of the grids, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(grids) - 1, min(len(grids), at_most)).round().astype(int)
    return [grids[place] for place in places]


def _draw_small(axes: Axes, grid: Grid, *, names_depths: bool, names_lengths: bool) -> None:
    rows, columns = grid.scores_DL.shape
    axes.set_facecolor(MISSING)
    scores = np.ma.masked_invalid(grid.scores_DL)
    axes.pcolormesh(scores, cmap=RED_TO_GREEN, vmin=0, vmax=1, edgecolors="white", linewidth=0.7)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    shown = sorted({0, columns - 1})
    labels = [f"{grid.lengths[place]:,}" for place in shown] if names_lengths else [""] * len(shown)
    axes.set_xticks([place + 0.5 for place in shown], labels)
    shown = sorted({0, rows - 1})
    axes.set_yticks(
        [place + 0.5 for place in shown], [f"{grid.depths[place]:.0%}" if names_depths else "" for place in shown]
    )
    axes.tick_params(length=0, labelsize=7.5, colors=FAINT, pad=2)
    axes.spines[:].set_visible(False)
    axes.set_title(grid.title, loc="left", fontsize=8, color=INK, pad=4)
    if grid.columns_trained is not None:
        axes.axvline(grid.columns_trained, ymin=-0.03, color=INK, linewidth=1.1, dashes=(2.4, 1.4), clip_on=False)
