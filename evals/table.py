"""Cells as lines of text: one a cell, its interval beside its score."""

from collections.abc import Iterable, Sequence

from evals.scoring import Cell

COLUMNS = ("task", "length", "depth", "score", "95% interval", "count", "")
APART = ("low", "high")
FOR_FILES = ("pieces", "text")


def table_of(cells: Sequence[Cell]) -> list[str]:
    """A line of titles and one for each cell, in columns; what else a cell says stands at its end."""
    rows = [COLUMNS, *(_entries(cell) for cell in cells)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    return ["  ".join(_aligned(row, widths)).rstrip() for row in rows]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    yield row[0].ljust(widths[0])
    yield from (entry.rjust(width) for entry, width in zip(row[1:-1], widths[1:], strict=True))
    yield row[-1]


def _entries(cell: Cell) -> tuple[str, ...]:
    low, high = (cell.extra.get(end) for end in APART)
    rest = (
        (name, value)
        for name, value in cell.extra.items()
        if name not in (*APART, *FOR_FILES) and not name.startswith("load_")
    )
    return (
        cell.task,
        f"{cell.length:,}",
        "" if cell.depth is None else f"{cell.depth:.0%}",
        number(cell.score),
        "" if low is None or high is None else f"{number(low)} to {number(high)}",
        f"{cell.count:,}",
        "  ".join(f"{name} {value:.4g}" for name, value in rest),
    )


def number(value: float) -> str:
    """Four digits after the point of what is small, none of what is a count."""
    return f"{value:,.0f}" if abs(value) >= 1000 or (float(value).is_integer() and abs(value) > 1) else f"{value:.4f}"
