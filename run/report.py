"""A run's report: one HTML file with its pictures inside, written from what lies in the run's folder."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run.facts import RunFacts, Snapshot, read_run
from run.files import write_whole
from run.metrics import Row, clock, short
from run.speed import beside

TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Card:
    """One headline: a number, what it was before, what it is."""

    label: str
    value: str
    before: str = ""
    note: str = ""


def write_report(run_folder: Path | str) -> Path:
    """Write report.html and needle.png into a run's folder; a run that is not finished gives a shorter report.

    Returns the path of report.html.

    Raises Refusal when the folder holds no run.
    """
    # Loaded when a report is written, not when a run starts: matplotlib alone takes most of a second.
    from jinja2 import Environment

    from evals import heatmap
    from run.sections import needle_grids, sections_of

    facts = read_run(Path(run_folder))
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    html = template.render(
        name=facts.config.get("name") or facts.folder.name,
        status=status(facts),
        cards=cards(facts),
        sections=sections_of(facts),
        stages=facts.stages,
        short=short,
        config_toml=facts.config_toml,
        environment=list(_flat(facts.environment)),
    )
    path = facts.folder / "report.html"
    write_whole(path, html.encode(errors="replace"))
    if grids := needle_grids(facts, "needle"):
        write_whole(facts.folder / "needle.png", heatmap.png(grids))
    return path


def status(facts: RunFacts) -> str:
    """One sentence: how far the run is, and in what time."""
    total = facts.config.get("total_tokens") or facts.tokens
    if not facts.tokens:
        return f"Nothing measured yet of {short(total)} tokens."
    state = "Complete" if facts.tokens >= total else f"Not complete ({facts.tokens / total:.0%} of {short(total)})"
    origin = facts.origin
    since = f", from {short(origin['tokens'])} on as a branch of {origin['run']}" if origin else ""
    return f"{state}: {short(facts.tokens)} tokens{since}, in {clock(facts.training_seconds())} of training."


def cards(facts: RunFacts) -> list[Card]:
    """The headlines, the most telling first; only those there are numbers for."""
    return [
        *_needle_cards(facts),
        *_gate_cards(facts),
        *_held_out_cards(facts),
        *_skipped_cards(facts),
        *_speed_cards(facts),
        *_size_cards(facts),
    ]


def _needle_cards(facts: RunFacts) -> Iterable[Card]:
    lengths = sorted({stage.sequence_length for stage in facts.stages})
    for task in facts.tasks("needle"):
        for length in lengths:
            scores = [snapshot.mean_score(task, length) for snapshot in facts.snapshots]
            yield from _before_and_after(f"{_spoken(task)} found at length {length}", scores, "{:.0%}", facts.snapshots)


def _gate_cards(facts: RunFacts) -> Iterable[Card]:
    for snapshot in facts.snapshots:
        found = [row for row in snapshot.rows if row["task"].startswith("gate/")]
        if found:
            missed = [row["task"].removeprefix("gate/") for row in found if not row.get("is_met")]
            note = f"not met: {', '.join(missed)}" if missed else f"{len(found)} of {len(found)} demands"
            yield Card(f"gate of {snapshot.stage.name}", "not met" if missed else "met", note=note)


def _held_out_cards(facts: RunFacts) -> Iterable[Card]:
    if not facts.stages:
        return
    for task in facts.tasks("held_out")[:3]:
        asked = sorted({row["length"] for row in facts.evals if row["task"] == task})
        first = facts.stages[0].sequence_length
        length = first if first in asked else asked[0]
        scores = [snapshot.mean_score(task, length) for snapshot in facts.snapshots]
        label = f"bits per byte of held-out {task.partition('/')[2] or 'text'}, length {length}"
        yield from _before_and_after(label, scores, "{:.3f}", facts.snapshots)


def _before_and_after(
    label: str, scores: Sequence[float | None], form: str, snapshots: Sequence[Snapshot]
) -> Iterable[Card]:
    known = [(score, snapshot) for score, snapshot in zip(scores, snapshots, strict=True) if score is not None]
    if not known:
        return
    (first, start), (last, end) = known[0], known[-1]
    if start is end:
        yield Card(label, form.format(last), note=end.title)
    else:
        note = f"before and after training at length {end.stage.sequence_length}"
        yield Card(label, form.format(last), before=form.format(first), note=note)


def _skipped_cards(facts: RunFacts) -> Iterable[Card]:
    rows = [row for row in facts.metrics if row.get("skipped_steps")]
    if rows:
        reasons = dict.fromkeys(row.get("skip_reason") or "" for row in rows)
        note = "; ".join(reason for reason in reasons if reason)
        yield Card("steps skipped", str(sum(row["skipped_steps"] for row in rows)), note=note)


def _speed_cards(facts: RunFacts) -> Iterable[Card]:
    rows = [row for row in facts.metrics if row.get("tokens_per_second")]
    if not rows:
        return
    by_stage: dict[int, list[float]] = {}
    for row in rows:
        by_stage.setdefault(row.get("sequence_length", 0), []).append(row["tokens_per_second"])
    notes = [f"{short(statistics.median(speeds))} at length {length}" for length, speeds in by_stage.items() if length]
    speed = statistics.median(row["tokens_per_second"] for row in rows)
    routing = str(facts.environment.get("routing") or "")
    around = beside(_median(rows, "mfu"), routing, _median(rows, "padding_share"))
    yield Card("tokens per second", short(speed), note="; ".join(filter(None, (around, ", ".join(notes)))))
    note = f"{short(facts.tokens)} tokens, evaluations and pauses not counted"
    yield Card("training time", clock(facts.training_seconds()), note=note)
    peak = max((row.get("peak_memory_bytes") or 0 for row in rows), default=0)
    if peak:
        yield Card("peak memory", f"{peak / 2**30:.2f} GiB", note=str(facts.environment.get("device", "")))


def _median(rows: Sequence[Row], key: str) -> float | None:
    """Of the rows that have a number there; rows of older versions have none."""
    numbers = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(numbers) if numbers else None


def _size_cards(facts: RunFacts) -> Iterable[Card]:
    size = facts.environment.get("parameters")
    if size:
        active, total = size["active"], size["total"]
        note = f"{short(active)} active for each token" if active != total else "all active for each token"
        yield Card("parameters", short(total), note=note)


def _spoken(task: str) -> str:
    kind, _, rest = task.partition("/")
    return f"{kind} ({rest})" if rest else kind


def _flat(table: Any, key: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(table, dict):
        for name, value in table.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    elif isinstance(table, list) and any(isinstance(item, dict) for item in table):
        yield from _flat(dict(enumerate(table)), key)
    else:
        yield key, " ".join(map(str, table)) if isinstance(table, list) else str(table)
