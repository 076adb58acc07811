"""IsoFLOP curves of finished runs: the best size at each budget, by arm, and how it grows with the budget."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from comparison.arms import Entry
from comparison.final import final_loss
from comparison.match import flops_of, vocab_size_of
from comparison.seen import read_seen
from model.size import count
from run.config import RunConfig
from run.files import write_whole
from run.metrics import short
from run.page import ReportSection, drawn
from scaling.isoflop import Valley, exponents, valley
from settings import Refusal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("active", "total", "tokens", "flops", "loss", "expansion", "family", "base", "budget", "size", "seed")
"""Of isoflop.csv; the first six are those that `python -m scaling fit` reads."""
PANELS = 3
"""Budgets that are drawn side by side, at most."""


@dataclass(frozen=True)
class SizedRun:
    """A finished run of one size at one budget."""

    base: str
    family: str
    """The arm, whatever its size."""
    budget: float
    """FLOPs that it was to take; `flops` is what whole steps came to."""
    size: int
    seed: int
    active: int
    total: int
    tokens: int
    flops: float
    loss: float
    """Nats a token."""
    source: str
    """What the loss is of."""
    expansion: float
    """Experts over experts of a token; 1: dense."""


@dataclass(frozen=True)
class Optimum:
    """The best size of one arm at one budget."""

    base: str
    family: str
    budget: float
    runs: tuple[SizedRun, ...]
    valley: Valley | None
    note: str = ""
    """Why there is none, or what is to be said of it."""

    @property
    def expansion(self) -> float:
        return self.runs[0].expansion

    def at_best(self, name: str) -> float:
        """`tokens` or `total` at the bottom, along a line through the runs in logarithms."""
        assert self.valley is not None
        active_R = np.log([run.active for run in self.runs])
        line = np.polyfit(active_R, np.log([getattr(run, name) for run in self.runs]), 1)
        return float(np.exp(np.polyval(line, np.log(self.valley.size))))


@dataclass(frozen=True)
class Curves:
    """All that a comparison's sizes and budgets have shown: what a page needs."""

    runs: tuple[SizedRun, ...] = ()
    optima: tuple[Optimum, ...] = field(default=())


def sized_runs(entries: Sequence[Entry]) -> list[SizedRun]:
    """Of those that are finished."""
    found = []
    for entry in entries:
        if entry.plan is None or entry.plan.point is None or not entry.is_finished:
            continue
        run = read_seen(entry.folder, entry.plan.name, entry.seed, entry.base)
        final = final_loss(run) if run else None
        if final is None:
            continue
        size, point = count(entry.config.model, vocab_size_of(entry.config)), entry.plan.point
        place = (entry.base, entry.plan.family, point.flops, point.size, entry.seed, size.active, size.total)
        work = (entry.config.total_tokens, flops_of(entry.config))
        found.append(SizedRun(*place, *work, final.loss, final.source, expansion_of(entry.config)))
    return found


def expansion_of(config: RunConfig) -> float:
    """Experts over experts of a token: 1 where no layer has any."""
    moe = config.model.moe
    if moe is None or config.model.num_dense_layers == config.model.num_layers:
        return 1.0
    return moe.num_experts / moe.experts_per_token


def valleys(runs: Sequence[SizedRun]) -> Curves:
    """For each base, budget and arm the parabola through its runs, by active parameters."""
    groups: dict[tuple[str, float, str], list[SizedRun]] = {}
    for run in runs:
        groups.setdefault((run.base, run.budget, run.family), []).append(run)
    found = [_optimum(*key, tuple(sorted(group, key=lambda run: run.active))) for key, group in groups.items()]
    return Curves(tuple(runs), tuple(sorted(found, key=lambda each: (each.base, each.budget, each.expansion))))


def _optimum(base: str, budget: float, family: str, runs: tuple[SizedRun, ...]) -> Optimum:
    try:
        found = valley(budget, np.array([run.active for run in runs]), np.array([run.loss for run in runs]))
    except Refusal as refusal:
        return Optimum(base, family, budget, runs, None, str(refusal).partition(": ")[2])
    if not found.is_inside:
        place = "smaller" if found.size <= runs[0].active else "larger"
        note = f"the lowest point lies beyond the sizes that were run: add {place} ones"
        return Optimum(base, family, budget, runs, None, note)
    return Optimum(base, family, budget, runs, found)


def rows_of(curves: Curves) -> list[dict[str, str]]:
    """A row an arm and budget, those of one budget by their expansion."""
    has_bases = len({each.base for each in curves.optima}) > 1
    rows = []
    for each in curves.optima:
        row = {"base": each.base} if has_bases else {}
        row |= {"FLOPs": f"{each.budget:.3g}", "arm": each.family, "expansion": f"{each.expansion:g}"}
        row |= {"runs": str(len(each.runs))}
        if each.valley is None:
            row |= {"active": "-", "95%": "", "total": "", "tokens": "", "a parameter": "", "loss": "-"}
        else:
            tokens, (low, high) = each.at_best("tokens"), each.valley.size_interval
            row |= {"active": short(each.valley.size), "95%": f"{_bound(low)} to {_bound(high)}"}
            row |= {"total": short(each.at_best("total")), "tokens": short(tokens)}
            row |= {"a parameter": f"{tokens / each.valley.size:.3g}", "loss": f"{each.valley.loss:.4f}"}
        rows.append(row | {"note": each.note})
    return rows


def lines_of(curves: Curves) -> Iterator[str]:
    """How the best size grows with the budget, and which expansion has the least loss at each."""
    for base in dict.fromkeys(each.base for each in curves.optima):
        own = [each for each in curves.optima if each.base == base and each.valley is not None]
        for family in dict.fromkeys(each.family for each in own):
            bottoms = [each.valley for each in own if each.family == family and each.valley is not None]
            if len(bottoms) > 1:
                power, factor = exponents(bottoms)
                exact = ": two points, so no error is known" if len(bottoms) == 2 else ""
                yield f"{base}, {family}: active = {factor:.3g} C^{power:.3f} over {len(bottoms)} budgets{exact}"
        for budget in dict.fromkeys(each.budget for each in own):
            here = [each for each in own if each.budget == budget]
            best = min(here, key=lambda each: each.valley.loss if each.valley else np.inf)
            if len(here) > 1 and best.valley is not None:
                others = f"least of {len(here)} arms, expansion {best.expansion:g}"
                yield f"{base}, {budget:.3g} FLOPs: {best.family} reaches {best.valley.loss:.4f}, the {others}"


def _bound(value: float) -> str:
    return "?" if value == 0 or np.isinf(value) else short(value)


def write_csv(curves: Curves, folder: Path) -> Path:
    """isoflop.csv, a line a run, as `python -m scaling fit` reads it; returns its path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(run, name) for name in COLUMNS] for run in curves.runs)
    path = folder / "isoflop.csv"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue().encode())
    return path


def figure(curves: Curves, base: str) -> "Figure":
    """Loss by active parameters, a panel a budget, with the parabola of each arm and its bottom."""
    from run.figures import COLOURS, Panel, panels

    own = [each for each in curves.optima if each.base == base]
    budgets = list(dict.fromkeys(each.budget for each in own))[-PANELS:]
    families = list(dict.fromkeys(each.family for each in own))
    content = []
    for budget in budgets:
        lines = {each.family: _line(each) for each in own if each.budget == budget}
        lines = {family: lines.get(family, ([], [])) for family in families}
        content.append(
            Panel(
                f"{budget:.3g} FLOPs",
                lines,
                "nats a token" if budget == budgets[0] else "",
                "active parameters",
                is_log_x=True,
            )
        )
    drawing = panels(content, columns=max(1, len(content)))
    for axes, budget in zip(drawing.axes, budgets, strict=False):
        for each in (each for each in own if each.budget == budget):
            colour = COLOURS[families.index(each.family) % len(COLOURS)]
            axes.plot(*_points(each), linestyle="", marker="o", markersize=3.6, color=colour)
            if each.valley is not None:
                axes.plot([each.valley.size], [each.valley.loss], marker="D", markersize=6, color=colour, zorder=4)
    return drawing


def _points(each: Optimum) -> tuple[list[float], list[float]]:
    return [run.active for run in each.runs], [run.loss for run in each.runs]


def _line(each: Optimum) -> tuple[list[float], list[float | None]]:
    """The parabola where there is one, else the runs."""
    x, y = _points(each)
    if each.valley is None:
        return x, list(y)
    grid = np.geomspace(min(x), max(x), 40)
    bottom = each.valley
    return list(grid), [bottom.loss + bottom.curvature * float(np.log(at / bottom.size)) ** 2 for at in grid]


def section(curves: Curves) -> ReportSection | None:
    """Of a report; None where there is nothing yet."""
    if not curves.optima:
        return None
    sources = ", ".join(dict.fromkeys(run.source for run in curves.runs))
    text = (
        f"Runs of one number of FLOPs: the larger the model, the fewer its tokens. Loss is of {sources}; dots are runs,"
        " lines parabolas in the logarithm of the active parameters, diamonds their lowest points. Intervals are 95%, "
        "from what the parabola leaves. " + " ".join(f"{line}." for line in lines_of(curves))
    )
    bases = dict.fromkeys(each.base for each in curves.optima)
    pictures = [drawn(f"{base}: isoFLOP curves", figure(curves, base)) for base in bases]
    return ReportSection("IsoFLOP curves", text, pictures, rows_of(curves))
