"""Needle cells as a heatmap: lengths across, depths down; in the terminal, as plain text and as a PNG."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from rich.columns import Columns
from rich.console import Console
from rich.text import Text

from evals.harness import Cell

THRESHOLD = 0.8
"""Mean score from which a length counts as handled."""
RED_TO_GREEN = LinearSegmentedColormap.from_list(
    "needle", ["#c8323c", "#e8714a", "#f7b267", "#fbe28b", "#c5dd7d", "#78bd6b", "#2f9256"]
)
INK, FAINT, MISSING = "#22272e", "#6b7480", "#e6e8eb"
CELL_INCHES = (0.66, 0.52)
BORDER = "┊"


@dataclass(frozen=True)
class Grid:
    """The scores of one model at one time."""

    title: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    scores_DL: np.ndarray
    """A row a depth, a column a length, NaN where nothing was measured."""
    trained_length: int | None = None
    """The longest sequence trained on so far."""

    @property
    def columns_trained(self) -> int | None:
        """How many columns lie within the trained length."""
        return None if self.trained_length is None else sum(length <= self.trained_length for length in self.lengths)

    def effective_length(self, threshold: float = THRESHOLD) -> int:
        return _effective_length(self.lengths, [_mean(column_D) for column_D in self.scores_DL.T], threshold)


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
    of_length: dict[int, list[float]] = {}
    for cell in cells:
        if cell.task == task:
            of_length.setdefault(cell.length, []).append(cell.score)
    lengths = sorted(of_length)
    return _effective_length(lengths, [_mean(np.array(of_length[length])) for length in lengths], threshold)


def _mean(scores: np.ndarray) -> float:
    measured = scores[~np.isnan(scores)]
    return float(measured.mean()) if len(measured) else math.nan


def _effective_length(lengths: Sequence[int], means: Sequence[float], threshold: float) -> int:
    reached = 0
    for length, mean in zip(lengths, means, strict=True):
        if not mean >= threshold - 1e-9:  # a mean of sums in floating point may miss an equal threshold
            break
        reached = length
    return reached


def show(grids: Sequence[Grid], console: Console | None = None) -> None:
    """Print the grids: coloured and side by side in a terminal, plain text one below the other elsewhere."""
    console = console or Console()
    if console.is_terminal:
        console.print(Columns([coloured(grid) for grid in grids], padding=(1, 4)))
    else:
        console.print("\n".join(plain(grid) for grid in grids), markup=False, highlight=False, soft_wrap=True)


def plain(grid: Grid) -> str:
    """The grid as text: a row a depth, a column a length, a dotted line at the trained length."""
    lines = coloured(grid).plain.replace(BORDER, "|").splitlines()  # pipes and logs may know ASCII alone
    return "\n".join(line.rstrip() for line in lines) + "\n"


def coloured(grid: Grid) -> Text:
    """The grid as rich text with coloured cells."""
    text = Text(no_wrap=True).append(f"{grid.title}\n", style="bold")
    text.append(_line("length", [f"{length}" for length in grid.lengths], grid, None))
    for depth, scores_L in zip(grid.depths, grid.scores_DL, strict=True):
        numbers = ["-" if math.isnan(score) else f"{score:.2f}" for score in scores_L]
        text.append(_line(f"{depth:.0%}", numbers, grid, scores_L))
    trained = f", trained at {grid.trained_length} ({BORDER})" if grid.trained_length is not None else ""
    text.append(f"rows: depth; effective length {grid.effective_length()}{trained}\n", style="dim")
    return text


def _line(name: str, entries: Sequence[str], grid: Grid, scores_L: np.ndarray | None) -> Text:
    line = Text(f"{name:>6} ")
    for column, entry in enumerate(entries):
        if column == grid.columns_trained and column > 0:
            line.append(BORDER)
        score = math.nan if scores_L is None else scores_L[column]
        line.append(f"{entry:^7}", style="" if math.isnan(score) else f"{_ink_on(score)} on {_hex(score)}")
    if grid.columns_trained == len(entries):
        line.append(BORDER)
    return line.append("\n")


def _hex(score: float) -> str:
    red, green, blue, _ = RED_TO_GREEN(min(max(score, 0.0), 1.0), bytes=True)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _ink_on(score: float) -> str:
    """Dark or white, whichever is read more easily on the score's colour."""
    red, green, blue, _ = RED_TO_GREEN(min(max(score, 0.0), 1.0))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.52 else "#ffffff"


def save_png(grids: Sequence[Grid], path: Path | str, title: str = "", dpi: int = 160) -> None:
    """Write the grids side by side as one picture."""
    Path(path).write_bytes(png(grids, title, dpi))


def png(grids: Sequence[Grid], title: str = "", dpi: int = 160) -> bytes:
    """The grids side by side as the bytes of one PNG."""
    buffer = io.BytesIO()
    # No date or version inside: the same cells give the same file.
    draw(grids, title).savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
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
    _draw_bar(figure.add_axes(bar))
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
                axes.text(*place, f"{score:.2f}", ha="center", va="center", fontsize=8.5, color=_ink_on(score))
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


def _draw_bar(axes: Axes) -> None:
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=RED_TO_GREEN, vmin=0, vmax=1, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xticks([])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_ylabel("exact match", fontsize=9, color=FAINT, labelpad=6)
    axes.tick_params(length=0, labelsize=8.5, colors=INK)
    axes.spines[:].set_visible(False)
