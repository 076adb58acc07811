"""What sweeps and isoFLOP curves have shown: said in the terminal, kept beside the runs, and handed to the report."""

from collections.abc import Callable, Sequence
from pathlib import Path

from comparison import isoflop, swept
from comparison.arms import ArmsSettings, Entry
from planning.outlook import table
from run.figures import png
from run.files import write_whole
from run.page import ReportSection


def findings(
    settings: ArmsSettings, entries: Sequence[Entry], folder: Path, say: Callable[[str], None]
) -> list[ReportSection]:
    """Sections of the report; nothing where nothing was swept, or nothing of it is finished."""
    sections = []
    if settings.sweep is not None and settings.isoflop is None:
        sections += _sweep(entries, say)
    if settings.isoflop is not None:
        sections += _isoflop(entries, folder, say)
    return sections


def _sweep(entries: Sequence[Entry], say: Callable[[str], None]) -> list[ReportSection]:
    found = swept.swept(entries)
    if not found:
        return []
    rows, lines = swept.rows_of(found), list(swept.lines_of(found))
    for line in (*table(rows), *lines):
        say(line)
    text = "The loss of each cell at its end, nats a token, mean over seeds ± half its 95% interval (Student's t). "
    return [ReportSection("Sweep", text + " ".join(f"{line}." for line in lines), table=rows)]


def _isoflop(entries: Sequence[Entry], folder: Path, say: Callable[[str], None]) -> list[ReportSection]:
    curves = isoflop.valleys(isoflop.sized_runs(entries))
    section = isoflop.section(curves)
    if section is None:
        return []
    for line in (*table(isoflop.rows_of(curves)), *isoflop.lines_of(curves)):
        say(line)
    say(f"runs: {isoflop.write_csv(curves, folder)} (python -m scaling fit reads it)")
    for base in dict.fromkeys(each.base for each in curves.optima):
        write_whole(folder / f"isoflop-{base}.png", png(isoflop.figure(curves, base)))
    return [section]
