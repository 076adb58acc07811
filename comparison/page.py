"""A comparison for a person: tables and verdicts in the terminal, and one HTML file with heatmaps and lines."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from comparison.chapters import chapters, most_important
from comparison.pooled import pooled
from comparison.results import Arm, Comparison, Verdict, moment
from comparison.seen import groups_of
from comparison.sheets import write_sheets
from comparison.summary import configs_of, table_of
from run.figures import Panel, on_white, panels
from run.files import write_whole
from run.page import Picture, ReportSection, drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.grid import Grid

GRIDS_IN_A_ROW = 4
LOG_WIDTH = 160
"""Characters of a line where no terminal says how many there are: numbers are not cut."""
Table = tuple[str, list[dict[str, str]]]
"""A title, and rows of the same columns."""


def tables(comparison: Comparison) -> list[Table]:
    """One for each base and needle length: a row an arm, a column a moment, `found ±half  bits per byte`.

    The bits per byte are those of `comparison.results.bits_at`.
    """
    return [
        (f"{base}: needle at {length:,}, bits per byte at position {length:,}", rows)
        for base in comparison.settings.chosen_bases
        for length in comparison.lengths
        if (rows := _rows(comparison, base, length))
    ]


def _rows(comparison: Comparison, base: str, length: int) -> list[dict[str, str]]:
    return [
        {"arm": name, **{moment(steps): _cell(comparison, base, name, steps, length) for steps in comparison.moments}}
        for name in comparison.settings.chosen_arms
        if comparison.of(base, name)
    ]


def _cell(comparison: Comparison, base: str, name: str, steps: int, length: int) -> str:
    found = comparison.score(base, name, steps, length)
    loss = comparison.loss(base, name, steps, length)
    return f"{found or '-'}  {f'{loss.mean:.3f}' if loss else '-'}"


def _arm_tables(comparison: Comparison) -> list[Table]:
    """What each group's arms are and took."""
    groups = groups_of(comparison.runs)
    return [(f"{name}: arms" if len(groups) > 1 else "arms", table_of(group)) for name, group in groups.items()]


def verdict_words(comparison: Comparison) -> list[str]:
    """A sentence a difference."""
    groups = groups_of(comparison.runs)
    return [f"{each.group}: {each}" if len(groups) > 1 else str(each) for each in comparison.differences]


def verdict_lines(comparison: Comparison) -> list[str]:
    """One sentence a claim, base and moment, or the one that says why there are none."""
    if not comparison.settings.claims:
        return ["The configuration claims nothing."]
    return [str(verdict) for verdict in comparison.verdicts()] or ["Nothing is measured yet of what is claimed."]


def show(comparison: Comparison) -> None:
    """Tables and verdicts, in the terminal."""
    from rich.console import Console
    from rich.table import Table as Shown
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    told = verdict_lines(comparison) if comparison.arms or not comparison.runs else []
    if comparison.runs:
        warnings = [f"warning: {line}" for group in groups_of(comparison.runs).values() for line in pooled(group)]
        told = [*warnings, *verdict_words(comparison), *told]
    for title, rows in [*_arm_tables(comparison), *tables(comparison)]:
        console.print(harmless(title), markup=False, highlight=False, soft_wrap=True)
        shown = Shown(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for column in rows[0]:
            shown.add_column(Text(harmless(column)), no_wrap=True)
        for row in rows:
            shown.add_row(*(Text(harmless(cell)) for cell in row.values()))
        console.print(shown)
        console.print()
    for line in told:
        console.print(harmless(line), markup=False, highlight=False, soft_wrap=True)


def harmless(text: str) -> str:
    """As it may be shown: whoever wrote a run's files may not tell a terminal what to do."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def write_page(comparison: Comparison, folder: Path, config_toml: str, before: Sequence[ReportSection] = ()) -> Path:
    """comparison.html in the folder, comparison.png and, where there are runs, their CSVs; returns the page's path.

    before: sections that come first, of what was swept.
    """
    from jinja2 import Environment

    from run.report import TEMPLATE

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=folder.name,
        status=_status(comparison),
        cards=[],
        sections=[*before, *sections(comparison)],
        stages=[],
        config_toml="\n".join([config_toml, *map(configs_of, groups_of(comparison.runs).values())]).strip(),
        environment=[],
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "comparison.html", html.encode(errors="replace"))
    if figure := _most_important(comparison):
        write_whole(folder / "comparison.png", on_white(figure))
    if comparison.runs:
        write_sheets(comparison.runs, comparison.differences, folder)
    return folder / "comparison.html"


def _most_important(comparison: Comparison) -> "Figure | None":
    """The curves of arms that branched, of the first base; of others the first group's loss and needles."""
    for base in comparison.settings.chosen_bases if comparison.arms else []:
        if content := _curve_panels(comparison, base):
            return panels(content, columns=len(content))
    return next((most_important(group) for group in groups_of(comparison.runs).values()), None)


def sections(comparison: Comparison) -> Iterable[ReportSection]:
    """What was claimed and found, each base's numbers, and the pictures behind them; then what any runs tell."""
    if comparison.arms or not comparison.runs:
        yield from _of_branches(comparison)
    if comparison.runs:
        yield from chapters(comparison.runs, comparison.differences, comparison.first, comparison.matched)


def _of_branches(comparison: Comparison) -> Iterable[ReportSection]:
    """Arms by the number of steps since they branched."""
    yield ReportSection(
        "Verdict on what was claimed",
        "Differences of the groups' means are taken seed by seed, on the same base weights; in brackets their 95% "
        "interval over seeds (Student's t). Seeds are few: no evidence is not evidence of no difference.",
        table=[_verdict_row(verdict) for verdict in comparison.verdicts()],
    )
    for title, rows in tables(comparison):
        text = "Share of needles found, mean over depths and seeds ± half its 95% interval over seeds; beside it the "
        text += "loss, because a needle that is found says little of the text around it."
        yield ReportSection(title, text, table=rows)
    for base in comparison.settings.chosen_bases:
        yield from _heatmaps(comparison, base)
        yield from _curves(comparison, base)


def _verdict_row(verdict: Verdict) -> dict[str, str]:
    mean, half = verdict.difference.mean, verdict.difference.half
    return {
        "base": verdict.base,
        "moment": moment(verdict.steps),
        "above": ", ".join(verdict.above),
        "below": ", ".join(verdict.below),
        "of": f"{verdict.claim.task} at {verdict.claim.length:,}",
        "difference": f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
        if math.isfinite(half)
        else f"{mean:+.2f}",
        "nearest arms": f"{verdict.nearest:+.2f}",
    }


def _heatmaps(comparison: Comparison, base: str) -> Iterable[ReportSection]:
    """Depth by length, mean over seeds: a row of arms for each moment."""
    from evals import heatmap
    from run.figures import encode

    pictures = []
    for steps in comparison.moments:
        grids = [
            grid for name in comparison.settings.chosen_arms for grid in _grid(comparison.of(base, name), name, steps)
        ]
        for start in range(0, len(grids), GRIDS_IN_A_ROW):
            row = grids[start : start + GRIDS_IN_A_ROW]
            pictures.append(Picture(f"{base} {moment(steps)}", encode(heatmap.png(row, moment(steps))), is_framed=True))
    if pictures:
        text = "Share of needles found by length and depth, mean over seeds; dashed: the length trained at until then."
        yield ReportSection(f"{base}: needles by length and depth", text, pictures)


def _grid(arms: Sequence[Arm], name: str, steps: int) -> Iterable["Grid"]:
    from evals.grid import make_grid
    from evals.scoring import Cell

    scores: dict[tuple[int, float], list[float]] = {}
    trained_length = None
    for arm in arms:
        for row in arm.rows.get(steps, []):
            if row["task"] == "needle" and row.get("depth") is not None:
                scores.setdefault((row["length"], row["depth"]), []).append(row["score"])
                trained_length = row.get("trained_length")
    cells = [
        Cell("needle", length, depth, sum(found) / len(found), len(found)) for (length, depth), found in scores.items()
    ]
    if cells:
        yield make_grid(cells, name, trained_length)


def _curves(comparison: Comparison, base: str) -> Iterable[ReportSection]:
    """Needles against steps, and loss by position at the last moment."""
    if content := _curve_panels(comparison, base):
        text = "How fast each arm finds needles, and what it predicts of text at each place of a window."
        picture = drawn(f"{base}: curves", panels(content, columns=len(content)))
        yield ReportSection(f"{base}: over steps and positions", text, [picture])


def _curve_panels(comparison: Comparison, base: str) -> list[Panel]:
    longest = max((claim.length for claim in comparison.settings.claims), default=max(comparison.lengths, default=0))
    by_steps = {}
    for name in comparison.settings.chosen_arms:
        points = [
            (steps, comparison.score(base, name, steps, longest)) for steps in _all_moments(comparison, base, name)
        ]
        known = [(float(steps), found.mean) for steps, found in points if found is not None]
        if known:
            by_steps[name] = ([steps for steps, _ in known], [score for _, score in known])
    content = [
        Panel(
            f"needle at {longest:,}", by_steps, "share found", "steps after the branch", is_dotted=True, y_range=(0, 1)
        )
    ]
    last = comparison.moments[-1] if comparison.moments else 0
    for steps in dict.fromkeys((0, last)):
        by_position = {name: _positions(comparison.of(base, name), steps) for name in comparison.settings.chosen_arms}
        found = {name: line for name, line in by_position.items() if line[0]}
        if found:
            content.append(Panel(f"loss by position, {moment(steps)}", found, "bits per byte", "position"))
    return content if by_steps else []


def _all_moments(comparison: Comparison, base: str, name: str) -> list[int]:
    return sorted({steps for arm in comparison.of(base, name) for steps in arm.rows})


def _positions(arms: Sequence[Arm], steps: int) -> tuple[list[float], list[float | None]]:
    """(middle of each stretch, mean bits per byte over seeds and sources)."""
    losses: dict[float, list[float]] = {}
    for arm in arms:
        for row in arm.rows.get(steps, []):
            if row["task"].startswith("positions/"):
                losses.setdefault((row["start"] + row["stop"]) / 2, []).append(row["score"])
    return sorted(losses), [sum(losses[place]) / len(losses[place]) for place in sorted(losses)]


def _status(comparison: Comparison) -> str:
    settings = comparison.settings
    if not comparison.arms and comparison.runs:
        return f"{len(comparison.runs)} runs of {len({(run.group, run.arm) for run in comparison.runs})} arms."
    planned = len(settings.chosen_bases) * len(settings.seeds) * len(settings.chosen_arms)
    seeds = ", ".join(map(str, settings.seeds))
    arms = f"{len(settings.chosen_arms)} arms, seeds {seeds}"
    return f"{len(comparison.arms)} of {planned} runs have something to tell: {arms}."
