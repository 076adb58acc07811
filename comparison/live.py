"""A table of all runs while they train: what each has come to, as their own rows of metrics say; lines in a log."""

import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from comparison.arms import Entry
from moe.words import routing_in_words
from run.metrics import Row, clock, short

TAIL = 1 << 16
"""Bytes of a file of metrics that are looked at: a row has some hundreds of them, or thousands with many layers."""
SECONDS = 1.0
"""Between two looks."""
QUIET_SECONDS = 60.0
"""Between two reports where no terminal shows the table."""
STYLES = {"trains": "bold", "failed": "red", "finished": "green", "waits": "dim"}


@dataclass(frozen=True)
class Standing:
    """How far one run is."""

    name: str
    arm: str
    state: str
    tokens: int
    """Until now, those of the run that it branches from among them."""
    left: int
    row: Row
    """Its last; empty where there is none."""
    routing: str
    """How its model routes, in words."""

    @property
    def speed(self) -> float | None:
        """Tokens a second."""
        return self.row.get("tokens_per_second")


class Live:
    """Shows all runs of a comparison in a terminal, and elsewhere says now and then how those that train are doing."""

    def __init__(
        self, entries: Sequence[Entry], jobs: int, say: Callable[[str], None], console: Console | None = None
    ) -> None:
        """jobs: runs that train at a time; say: takes the lines that stay."""
        self.entries, self.jobs, self.say = entries, jobs, say
        self._console = console or Console()
        self._screen = Screen(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._looked = self._told = time.monotonic()

    def __enter__(self) -> Self:
        if self._screen is not None:
            self._screen.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._screen is not None:
            self._screen.stop()

    def update(self, running: Collection[str], failed: Collection[str]) -> None:
        """Look again, if it is time. The names are those of runs; what is neither waits or is finished."""
        now = time.monotonic()
        if now - self._looked < SECONDS or (self._screen is None and now - self._told < QUIET_SECONDS):
            return
        self._looked = self._told = now
        standings = [standing_of(entry, running, failed) for entry in self.entries]
        if self._screen is not None:
            self._screen.update(Group(table_of(standings), Text(summary(standings, self.jobs))), refresh=True)
            return
        for standing in standings:
            if standing.state == "trains":
                self.say(line_of(standing))
        self.say(summary(standings, self.jobs))


def standing_of(entry: Entry, running: Collection[str], failed: Collection[str]) -> Standing:
    """What the folder of a run says of it now."""
    name, branch = entry.config.name, entry.config.branch
    state = "trains" if name in running else "finished" if entry.is_finished else "waits"
    state = "failed" if name in failed else state
    row = last_row(entry.folder / "metrics.jsonl")
    begin = 0 if branch is None else entry.config.stages[branch.stage].start_tokens
    tokens = entry.config.total_tokens if state == "finished" else max(row.get("tokens", 0), begin)
    left = entry.config.stages.total_tokens - tokens if state != "finished" else 0
    routing = routing_in_words(entry.config.model.routed)
    return Standing(name, entry.arm or "", state, tokens, max(0, left), row, routing)


def last_row(path: Path) -> Row:
    """The last whole row of a JSON-lines file, which may be written to meanwhile; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            return row
    return {}


def seconds_left(standings: Sequence[Standing], jobs: int) -> float:
    """Until all that trains or waits is done, by the speed of each run, its arm's, or the mean; NaN: not known.

    Evaluations are not in it.
    """
    speeds = {each.name: each.speed for each in standings}
    by_arm: dict[str, list[float]] = {}
    for each in standings:
        if each.speed:
            by_arm.setdefault(each.arm, []).append(each.speed)
    known = [speed for group in by_arm.values() for speed in group]
    if not known:
        return math.nan
    seconds = []
    for each in standings:
        group = by_arm.get(each.arm, known)
        if each.state in ("trains", "waits"):
            seconds.append(each.left / (speeds[each.name] or sum(group) / len(group)))
    return max(sum(seconds) / jobs, max(seconds, default=0.0))


def table_of(standings: Sequence[Standing]) -> Table:
    """A row a run; what no run knows has no column."""
    cells = [cells_of(each) for each in standings]
    columns = [title for title in cells[0] if title in ("run", "") or any(row[title] for row in cells)] if cells else []
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in columns:
        table.add_column(title, no_wrap=True, justify="left" if title in ("run", "") else "right")
    for each, row in zip(standings, cells, strict=True):
        table.add_row(*(Text(row[title]) for title in columns), style=STYLES[each.state])
    return table


def cells_of(standing: Standing) -> dict[str, str]:
    """What is shown of a run, title to text; empty: not known."""
    row, speed, whole = standing.row, standing.speed, standing.tokens + standing.left
    is_training = standing.state == "trains"
    return {
        "run": standing.name,
        "": standing.state,
        "tokens": f"{short(standing.tokens)} / {short(whole)}" if row else short(whole),
        "loss": _number(row.get("loss"), ".3f"),
        "bits/byte": _number(row.get("bits_per_byte"), ".3f"),
        "tokens/s": short(speed) if speed else "",
        "MFU": _number(row.get("mfu"), ".1%"),
        "routing": standing.routing.replace(",", "") if speed else "",
        "padding": _number(row.get("padding_share"), ".1%"),
        "left": clock(standing.left / speed) if speed and is_training else "",
    }


def line_of(standing: Standing) -> str:
    """The same in one line of a log."""
    told = [f"{title} {text}" for title, text in cells_of(standing).items() if text and title not in ("run", "")]
    return f"{standing.name}: {', '.join(told)}"


def summary(standings: Sequence[Standing], jobs: int) -> str:
    """`2 of 6 finished, 2 train, 1:20 left`."""
    number = {state: sum(each.state == state for each in standings) for state in STYLES}
    told = [f"{number['finished']} of {len(standings)} finished", f"{number['trains']} train"]
    told += [f"{number['failed']} failed"] if number["failed"] else []
    left = seconds_left(standings, jobs)
    return ", ".join([*told, *([] if math.isnan(left) else [f"{clock(left)} left"])])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
