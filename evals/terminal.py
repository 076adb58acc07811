"""Grids of scores in the terminal, in colour and side by side, and as plain text for pipes and logs."""

import math
from collections.abc import Sequence

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.text import Text

from evals.colours import colour_of, ink_on
from evals.grid import Grid

BORDER = "┊"


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
        line.append(f"{entry:^7}", style="" if math.isnan(score) else f"{ink_on(score)} on {colour_of(score)}")
    if grid.columns_trained == len(entries):
        line.append(BORDER)
    return line.append("\n")
