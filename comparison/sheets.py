"""The numbers of a comparison as CSV: a row a run, a point of a curve, a difference."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison.curves import place_of
from comparison.difference import Difference
from comparison.measures import headline, values_of
from comparison.seen import SeenRun, groups_of
from run.files import write_whole

CURVES = ("group", "arm", "seed", "step", "tokens", "flops", "seconds", "measure", "value")
"""A row a value: `loss`, or the task and length of an evaluation."""


def write_sheets(runs: Sequence[SeenRun], found: Sequence[Difference], folder: Path) -> list[Path]:
    """runs.csv, curves.csv and differences.csv in the folder; what is not known is left empty."""
    rows = {
        "runs.csv": [row for group in groups_of(runs).values() for row in run_rows(group)],
        "curves.csv": [row for run in runs for row in curve_rows(run)],
        "differences.csv": [difference_row(each) for each in found],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in rows.items():
        write_whole(folder / name, _csv(table))
    return [folder / name for name in rows]


def run_rows(runs: Sequence[SeenRun]) -> Iterable[dict[str, Any]]:
    """Every headline number of each run of a group."""
    measured = headline(runs) if len(runs) > 1 else []
    for number, run in enumerate(runs):
        end = run.end
        yield {
            **{"group": run.group, "arm": run.arm, "seed": run.seed, "folder": str(_near(run.folder))},
            "parameters": run.parameters.get("total"),
            "active_parameters": run.parameters.get("active"),
            "flops_per_token": run.mean_flops,
            "tokens": run.tokens,
            "steps": end.step if end else None,
            "flops": end.flops if end else None,
            "seconds": end.seconds if end else None,
            "tokens_per_second": run.median("tokens_per_second"),
            "mfu": run.median("mfu"),
            "padding_share": run.mean("padding_share"),
            "peak_memory_bytes": run.most("peak_memory_bytes"),
            "routing": run.routing,
            **values_of(run, measured, number),
        }


def _near(folder: Path) -> Path:
    """From where the command was given, if it lies below: a sheet that is passed on then says where to look."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def curve_rows(run: SeenRun) -> Iterable[dict[str, Any]]:
    """The training loss of each row of the metrics, and the scores of each evaluation, mean over depths."""
    named = {"group": run.group, "arm": run.arm, "seed": run.seed}
    for point in run.points:
        place = {"step": point.step, "tokens": point.tokens, "flops": point.flops, "seconds": point.seconds}
        yield {**named, **place, "measure": "loss", "value": point.row.get("loss")}
    scores: dict[tuple[int, float, str], list[float]] = {}
    for row in run.evals:
        if row["task"].partition("/")[0] in ("held_out", "needle"):
            value = math.nan if row["score"] is None else row["score"]
            scores.setdefault((row["step"], row["tokens"], f"{row['task']}@{row['length']}"), []).append(value)
    for (step, tokens, name), values in scores.items():
        place = {axis: place_of(run, axis, step, tokens) for axis in ("tokens", "flops", "seconds")}
        yield {**named, "step": step, **place, "measure": name, "value": sum(values) / len(values)}


def difference_row(each: Difference) -> dict[str, Any]:
    return {
        **{"group": each.group, "measure": each.measure.name, "arm": each.arm, "against": each.other},
        "seeds": " ".join("?" if seed is None else str(seed) for seed in each.seeds),
        **{"arm_mean": each.ours, "against_mean": each.theirs, "difference": each.mean},
        **{"student_low": each.student[0], "student_high": each.student[1]},
        **{"bootstrap_low": each.bootstrap[0], "bootstrap_high": each.bootstrap[1]},
        **{"verdict": each.verdict, "sentence": str(each)},
    }


def _csv(table: Iterable[Mapping[str, Any]]) -> bytes:
    rows = list(table)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)
    return text.getvalue().encode()


def _plain(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value
