"""The report's sections on how far a model reaches: effective length, the needle grid over time, loss by position."""

from collections.abc import Iterable, Sequence

from evals.grid import SHARES_RIGHT, THRESHOLD, Grid, effective_length, make_grid
from evals.heatmap import to_png
from evals.scoring import Cell
from evals.small_multiples import draw_over_steps
from run.facts import RunFacts, Snapshot
from run.figures import Panel, encode
from run.metrics import Row, short
from run.page import Picture, ReportSection, lines


def reach(facts: RunFacts) -> Iterable[ReportSection]:
    """Effective length against tokens for each task of right and wrong answers, and its grid over time."""
    pictures = []
    tasks = [task for kind in SHARES_RIGHT for task in facts.tasks(kind)]
    content = [panel for task in tasks for panel in _effective_lengths(facts, task)]
    if content:
        pictures.append(lines("effective length against tokens", content[:3], facts, len(content[:3])))
    for task in tasks:
        if len(grids := grids_over_time(facts, task)) > 2:
            pictures.append(Picture(f"{task} over time", encode(to_png(draw_over_steps(grids))), is_framed=True))
    if pictures:
        yield ReportSection(
            "How far it reaches",
            f"The effective length is the longest tested length up to which every tested length scores {THRESHOLD} or "
            "more on the mean over depths. Below it, each grid as training went on: lengths from left to right, depths "
            "from top to bottom, the dashed line at the longest sequence trained on by then.",
            pictures,
        )


def grids_over_time(facts: RunFacts, task: str) -> list[Grid]:
    """One grid for each evaluation, titled by the tokens it was asked after."""
    found = []
    for tokens, rows in _by_tokens(facts, task).items():
        stage = facts.stage_of(rows[0])
        cells = [Cell.from_row(row) for row in rows]
        if any(cell.depth is not None for cell in cells):
            title, trained = f"{short(tokens)} tokens", stage.sequence_length if stage else None
            found.append(make_grid(cells, title, trained, task=task))
    return found


def _effective_lengths(facts: RunFacts, task: str) -> Iterable[Panel]:
    """A panel whose y axis is the tested lengths, one above the other at equal steps."""
    by_tokens = _by_tokens(facts, task)
    lengths = sorted({row["length"] for rows in by_tokens.values() for row in rows})
    if len(lengths) < 2 or len(by_tokens) < 2:
        return

    def height(reached: int) -> int:
        return sum(length <= reached for length in lengths)

    cells = [[Cell.from_row(row) for row in rows] for rows in by_tokens.values()]
    handled = [height(effective_length(asked, task=task)) for asked in cells]
    ends = [
        (float(min(tokens, facts.tokens)), height(stage.sequence_length))
        for stage in facts.stages
        if stage.start_tokens < facts.tokens
        for tokens in (stage.start_tokens, stage.until_tokens)
    ]
    series = {
        "trained length": ([tokens for tokens, _ in ends], [float(at) for _, at in ends]),
        "effective length": ([float(tokens) for tokens in by_tokens], [float(at) for at in handled]),
    }
    ticks = [(0, f"below {lengths[0]}"), *((place, f"{length:,}") for place, length in enumerate(lengths, 1))]
    yield Panel(f"effective length, {task}", series, y_range=(-0.3, len(lengths) + 0.3), y_ticks=ticks, is_dotted=True)


def positions(facts: RunFacts) -> Iterable[ReportSection]:
    """Bits per byte by position in a long document, at the end of each stage."""
    content = []
    for task in facts.tasks("positions"):
        asked = {snapshot.title: rows for snapshot in facts.snapshots if (rows := _by_position(snapshot, task))}
        series = {title: (_places(rows), [row["score"] for row in rows]) for title, rows in asked.items()}
        bands = {
            title: ([row["low"] for row in rows], [row["high"] for row in rows])
            for title, rows in asked.items()
            if all(row.get("low") is not None for row in rows)
        }
        title = task.partition("/")[2] or "by position"
        place = "position in the document"
        content.append(Panel(title, series, "bits per byte", place, is_dotted=True, bands=bands))
    if content:
        pairs = [content[start : start + 2] for start in range(0, len(content), 2)]
        yield ReportSection(
            "Loss by position",
            "The same long documents, cut into stretches. The line falls as far as the model uses what came before, "
            "and rises where positions are beyond what it can handle. Bands are 95% intervals over documents; as all "
            "lines read the same ones, they lie closer to each other than bands that touch suggest.",
            [lines("bits per byte by position", pair, facts, len(pair)) for pair in pairs],
        )


def _by_tokens(facts: RunFacts, task: str) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in facts.evals:
        if row["task"] == task:
            found.setdefault(row["tokens"], []).append(row)
    return dict(sorted(found.items()))


def _by_position(snapshot: Snapshot, task: str) -> list[Row]:
    rows = [row for row in snapshot.rows if row["task"] == task and "start" in row]
    return sorted(rows, key=lambda row: row["start"])


def _places(rows: Sequence[Row]) -> list[float]:
    return [(row["start"] + row["stop"]) / 2 for row in rows]
