"""Grids of scores as a picture: lengths across, depths down, the trained length marked."""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evals.colours import FAINT, INK, MISSING, RED_TO_GREEN, ink_on
from evals.grid import Grid

CELL_INCHES = (0.66, 0.52)


def png(grids: Sequence[Grid], title: str = "", dpi: int = 160) -> bytes:
    """The grids side by side as the bytes of one PNG."""
    return to_png(draw(grids, title), dpi)


def to_png(figure: Figure, dpi: int = 160) -> bytes:
    """The figure as PNG on white. No date or version inside: the same cells give the same file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def draw(grids: Sequence[Grid], title: str = "") -> Figure:
    """The grids side by side, sharing one colour bar; depths are named once if all grids have the same."""
    assert grids, "nothing to draw"
    # Wide enough for the cells, and for the titles above them at their sizes in print.
    widths = [max(len(grid.lengths) * CELL_INCHES[0], 3.0, len(grid.title) * 0.1) for grid in grids]
    height = max(len(grid.depths) for grid in grids) * CELL_INCHES[1]
    left, right, bottom, top, gap = 0.85, 0.95, 0.62, 0.72 + (0.36 if title else 0.0), 0.55
    total_width = left + sum(widths) + gap * (len(grids) - 1) + right
    total_height = bottom + height + top
    figure = Figure(figsize=(total_width, total_height))
    start = left
    for number, (grid, width) in enumerate(zip(grids, widths, strict=True)):
        box = (start / total_width, bottom / total_height, width / total_width, height / total_height)
        axes = figure.add_axes(box)
        _draw_grid(axes, grid, names_depths=number == 0 or grid.depths != grids[0].depths)
        start += width + gap
    if title:
        figure.text(left / total_width, 1 - 0.2 / total_height, title, fontsize=13, weight="bold", color=INK, va="top")
    bar = ((total_width - right + 0.22) / total_width, bottom / total_height, 0.13 / total_width, height / total_height)
    draw_bar(figure.add_axes(bar))
    return figure


def _draw_grid(axes: Axes, grid: Grid, *, names_depths: bool) -> None:
    rows, columns = grid.scores_DL.shape
    colours = np.ma.masked_invalid(grid.scores_DL)
    axes.set_facecolor(MISSING)
    axes.pcolormesh(colours, cmap=RED_TO_GREEN, vmin=0, vmax=1, edgecolors="white", linewidth=1.6)
    for row in range(rows):
        for column in range(columns):
            score = grid.scores_DL[row, column]
            if not math.isnan(score):
                place = (column + 0.5, row + 0.5)
                axes.text(*place, f"{score:.2f}", ha="center", va="center", fontsize=8.5, color=ink_on(score))
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)  # the start of the haystack on top, as it is read
    axes.set_xticks(np.arange(columns) + 0.5, [f"{length:,}" for length in grid.lengths])
    axes.set_yticks(np.arange(rows) + 0.5, [f"{depth:.0%}" for depth in grid.depths] if names_depths else [""] * rows)
    axes.tick_params(length=0, labelsize=8.5, colors=INK, pad=4)
    axes.set_xlabel("length in tokens", fontsize=9, color=FAINT, labelpad=5)
    if names_depths:
        axes.set_ylabel("depth of the needle", fontsize=9, color=FAINT, labelpad=6)
    axes.spines[:].set_visible(False)
    _draw_titles(axes, grid)
    if grid.columns_trained is not None:
        axes.axvline(
            grid.columns_trained, ymin=-0.02, ymax=1.04, color=INK, linewidth=1.6, dashes=(3.2, 1.8), clip_on=False
        )


def _draw_titles(axes: Axes, grid: Grid) -> None:
    facts = f"effective length {grid.effective_length():,}"
    if grid.trained_length is not None:
        facts = f"trained at {grid.trained_length:,} (dashed)  ·  {facts}"
    _annotate(axes, grid.title, points=24, size=11, weight="bold", color=INK)
    _annotate(axes, facts, points=9, size=8.5, weight="normal", color=FAINT)


def _annotate(axes: Axes, text: str, *, points: float, size: float, weight: str, color: str) -> None:
    """Text so many points above the upper left corner of the grid."""
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom", "ha": "left"}
    axes.annotate(text, (0, 1), xytext=(1, points), fontsize=size, weight=weight, color=color, **place)  # type: ignore[arg-type]


def draw_bar(axes: Axes) -> None:
    """The colours of scores from 0 to 1."""
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=RED_TO_GREEN, vmin=0, vmax=1, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xticks([])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_ylabel("exact match", fontsize=9, color=FAINT, labelpad=6)
    axes.tick_params(length=0, labelsize=8.5, colors=INK)
    axes.spines[:].set_visible(False)
