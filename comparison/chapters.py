"""The sections of a comparison of any runs, group by group, in reading order."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from comparison import curves
from comparison.curves import Titles, arms_with, axes_of, metric, panel
from comparison.difference import Difference
from comparison.estimate import estimate
from comparison.pooled import pooled
from comparison.seen import SeenRun, arms_of, groups_of
from comparison.summary import UNKNOWN, notes_of, scores_of, settings_table, table_of, unlike
from comparison.verdicts import summary
from run.page import Picture, ReportSection, drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.grid import Grid

MOST_IN_A_ROW = 3
ROUTER: Titles = {
    "max_violation": "busiest expert (0: even)",
    "dead_experts": "experts without a token",
    "router_entropy": "router entropy (1: even)",
    "balance_loss": "balance loss (1: even)",
    "dropped_share": "share of rows dropped",
    "choice_overlap": "choices kept over a step",
}
FROM_ZERO = ("max_violation", "dead_experts", "dropped_share")
SPEED: Mapping[str, tuple[str, float]] = {
    "tokens_per_second": ("tokens a second", 1.0),
    "mfu": ("MFU, %", 100.0),
    "peak_memory_bytes": ("peak memory, GiB", 2.0**-30),
}
"""Key of the metrics -> what stands above its panel, and by what its numbers are multiplied."""


def chapters(
    runs: Sequence[SeenRun], found: Sequence[Difference], first: str | None = None, matched: Sequence[str] = ()
) -> Iterator[ReportSection]:
    """first: the arm that others are held against; matched: lines that say what was made alike."""
    groups = groups_of(runs)
    if found:
        yield _verdict(found, groups)
    for name, group in groups.items():
        head = f"{name}: " if len(groups) > 1 else ""
        if head and (table := scores_of(group)):
            yield ReportSection(f"{head}Scores", "At the end, mean over seeds ± half its 95% interval.", table=table)
        for section in _of_group(group, first, matched):
            yield ReportSection(head + section.title, *_rest(section))
        matched = ()


def _rest(section: ReportSection) -> tuple[str, list[Picture], Sequence[Mapping[str, str]], Sequence[str]]:
    return section.text, section.pictures, section.table, section.points


def _of_group(group: Sequence[SeenRun], first: str | None, matched: Sequence[str]) -> Iterator[ReportSection]:
    yield _arms(group, first, matched)
    yield from _loss(group)
    yield from _needles(group)
    yield from _positions(group)
    yield from _sources(group)
    yield from _router(group)
    yield from _speed(group)
    yield _settings(group)


def _verdict(found: Sequence[Difference], groups: Mapping[str, Sequence[SeenRun]]) -> ReportSection:
    text = (
        "Differences are taken seed by seed, on the same text. Evidence means that both 95% intervals leave out 0: a "
        "bootstrap that draws seeds again and, within them, pieces of the text or samples; and Student's t over seeds, "
        "because of few seeds a bootstrap alone is too sure. Brackets hold the hull of both. No evidence is not "
        f"evidence of no difference. {summary(found)}"
    )
    told = [f"{each.group}: {each}" if len(groups) > 1 else str(each) for each in found]
    table = scores_of(next(iter(groups.values()))) if len(groups) == 1 else []
    return ReportSection("Verdict", text, table=table, points=told)


def _arms(group: Sequence[SeenRun], first: str | None, matched: Sequence[str]) -> ReportSection:
    text = (
        "What each arm is and took, mean over its seeds; FLOPs are the model's own, forward and backward, nothing "
        "computed again, since the run or its branch began."
    )
    points = [*matched, *pooled(group), *unlike(group, first), *notes_of(group)]
    return ReportSection("Arms", text, table=table_of(group), points=points)


def _loss(group: Sequence[SeenRun]) -> Iterator[ReportSection]:
    axes = axes_of(group)
    rows = {"training loss": partial(_loss_panel, group)}
    if any(run.tasks("held_out") for run in group):
        rows["held-out text"] = partial(_held_out_panel, group)
    pictures = [
        _row(f"{title} against {', '.join(axes)}", [build(axis) for axis in axes]) for title, build in rows.items()
    ]
    if axes:
        text = "Strong lines are means over seeds, smoothed; faint ones are single runs. "
        lacking = [axis for axis in ("tokens", "flops", "seconds") if axis not in axes]
        text += f"Not known of any run: {', '.join(lacking)}." if lacking else ""
        yield ReportSection("Loss", text, pictures)


def _loss_panel(group: Sequence[SeenRun], axis: str) -> "curves.Panel":
    return panel("training loss", group, axis, metric("loss"), "nats per token")


def _held_out_panel(group: Sequence[SeenRun], axis: str) -> "curves.Panel":
    return panel("held-out text", group, axis, curves.held_out(group), "bits per byte", is_dotted=True)


def _needles(group: Sequence[SeenRun]) -> Iterator[ReportSection]:
    from evals import heatmap
    from run.figures import encode

    for task in dict.fromkeys(task for run in group for task in run.tasks("needle")):
        grids = [grid for arm, own in arms_of(group).items() for grid in _grid(own, arm, task)]
        pictures = [
            Picture(f"{task} by length and depth", encode(heatmap.png(grids[start : start + 2])), is_framed=True)
            for start in range(0, len(grids), 2)
        ]
        text = (
            "A key and its value are hidden in held-out text and asked for at its end: the share of samples whose whole"
            " value is read back, by the text's length and the needle's depth, at the end of training, mean over seeds."
            " The effective length is the longest up to which every length scores at least 0.8."
        )
        yield ReportSection(
            f"{task.capitalize()} by length and depth", text, [*pictures, _row(task, [_reach(group, task)])],
            [_reached(group, task)],
        )  # fmt: skip


def _reach(group: Sequence[SeenRun], task: str) -> "curves.Panel":
    from dataclasses import replace

    ticks = curves.lengths_marked(group, task)
    told = panel(f"{task} found by length", group, "length in tokens", curves.by_length(task), "share", is_dotted=True)
    return replace(told, y_range=(-0.03, 1.03), is_log_x=True, x_ticks=ticks)


def _reached(group: Sequence[SeenRun], task: str) -> dict[str, str]:
    from evals.grid import effective_length

    row = {"": "effective length, seed by seed"}
    for arm, own in arms_of(group).items():
        row[arm] = ", ".join(f"{effective_length(run.cells(task), task=task):,}" for run in own if run.cells(task))
    return row


def _grid(runs: Sequence[SeenRun], arm: str, task: str) -> Iterator["Grid"]:
    from evals.grid import make_grid
    from evals.scoring import Cell

    scores: dict[tuple[int, float], list[float]] = {}
    for run in runs:
        for cell in run.cells(task):
            assert cell.depth is not None, "cells have one"
            scores.setdefault((cell.length, cell.depth), []).append(cell.score)
    cells = [Cell(task, *place, sum(found) / len(found), len(found)) for place, found in scores.items()]
    if cells:
        stages = runs[0].config.get("context", {}).get("stages", [])
        trained = stages[-1].get("sequence_length") if stages else None
        title = arm if len(runs) == 1 else f"{arm}, mean of {len(runs)} seeds"
        yield make_grid(cells, title, trained, task=task)


def _positions(group: Sequence[SeenRun]) -> Iterator[ReportSection]:
    tasks = list(dict.fromkeys(task for run in group for task in run.tasks("positions")))
    panels = [
        panel(task.partition("/")[2] or task, group, "position", curves.by_position(task), "bits per byte", True)
        for task in tasks
    ]
    if panels:
        text = "Bits per byte at each place of long documents, at the end: later tokens are easier, if context is used."
        yield ReportSection("Loss by position", text, _rows("loss by position", panels))


def _sources(group: Sequence[SeenRun]) -> Iterator[ReportSection]:
    asked = list(dict.fromkeys((task, n) for run in group for task, n, _ in run.last if task.startswith("held_out/")))
    table = []
    for task, length in sorted(asked):
        row = {"source": task.partition("/")[2], "length": f"{length:,}"}
        for arm, own in arms_of(group).items():
            rows = [run.last[task, length, None] for run in own if (task, length, None) in run.last]
            told = estimate([float("nan") if each["score"] is None else each["score"] for each in rows])
            row[arm] = UNKNOWN if told is None else told.told(".3f")
        table.append(row)
    if table:
        text = "Bits per byte of each held-out source, seen through windows of so many tokens, mean over seeds."
        tasks = list(dict.fromkeys(task for task, _ in sorted(asked)))
        axis = axes_of(group)[0] if axes_of(group) else "step"
        panels = [
            panel(task.partition("/")[2], group, axis, curves.held_out(group, task), "bits per byte", True)
            for task in tasks
        ]
        pictures = _rows("held-out text by source", panels) if len(panels) > 1 else []
        yield ReportSection("Held-out text by source", text, pictures, table)


def _router(group: Sequence[SeenRun]) -> Iterator[ReportSection]:
    from run.sections import load_figures

    routed = arms_with(group, ROUTER)
    if not routed:
        return
    axis = next(iter(axes_of(routed)), "step")
    keys = [key for key in ROUTER if arms_with(routed, [key])]
    panels = [
        _coloured(group, panel(ROUTER[key], routed, axis, metric(key), from_zero=key in FROM_ZERO)) for key in keys
    ]
    pictures = _rows("router", panels)
    for arm, own in arms_of(routed).items():
        for source, figure in load_figures(list(own[0].last.values())):
            pictures.append(drawn(f"{arm}: load of each expert by layer on held-out {source}", figure))
    text = (
        f"Whether routers use all experts: {', '.join(arms_of(routed))}. The busiest expert is given as its load over "
        "the mean load, minus 1. In squares, the colour of the page is an even share, blue is less and orange is more."
    )
    yield ReportSection("Routers", text, pictures)


def _speed(group: Sequence[SeenRun]) -> Iterator[ReportSection]:
    axis = next(iter(axes_of(group)), "step")
    panels = [
        panel(title, group, axis, metric(key, scale), from_zero=True, counts_y=key == "tokens_per_second")
        for key, (title, scale) in SPEED.items()
        if any(row.get(key) is not None for run in group for row in run.metrics)
    ]
    if panels:
        text = (
            "As each run measured it, evaluations and pauses left out; runs side by side on one machine slow each "
            "other down. MFU is there where the device's peak is known."
        )
        yield ReportSection("Speed and memory", text, _rows("speed and memory", panels))


def _settings(group: Sequence[SeenRun]) -> ReportSection:
    table = settings_table(group)
    text = "Keys of the configurations that differ between arms; names and seeds are left out."
    if not any(run.config for run in group):
        text = "None of these runs brought its configuration."
    elif not table:
        text = "The arms' configurations are the same."
    return ReportSection("Settings", text, table=table)


def most_important(group: Sequence[SeenRun]) -> "Figure | None":
    """One row of three: training loss, held-out text against what it cost, and needles by length, as far as known."""
    from run.figures import panels

    axes = axes_of(group)
    if not axes:
        return None
    shared = [axis for axis in axes if all(run.track(axis)[0] for run in group if run.metrics)] or axes
    content = [_loss_panel(group, shared[0])]
    if any(run.tasks("held_out") for run in group):
        content.append(_held_out_panel(group, "flops" if "flops" in shared else shared[0]))
    task = next((task for run in group for task in run.tasks("needle")), None)
    if task:
        content.append(_reach(group, task))
    content += [_loss_panel(group, axis) for axis in shared[1:]][: MOST_IN_A_ROW - len(content)]
    return panels(content, columns=len(content))


def _coloured(group: Sequence[SeenRun], told: "curves.Panel") -> "curves.Panel":
    """In the colours that the whole group has."""
    from dataclasses import replace

    return replace(told, colours=curves.colours_of(group))


def _rows(alt: str, content: Sequence["curves.Panel"]) -> list[Picture]:
    starts, columns = range(0, len(content), MOST_IN_A_ROW), min(len(content), MOST_IN_A_ROW)
    return [_row(alt, content[start : start + columns], columns) for start in starts]


def _row(alt: str, content: Sequence["curves.Panel"], columns: int | None = None) -> Picture:
    from run.figures import panels

    return drawn(alt, panels(content, columns=columns or len(content)))
