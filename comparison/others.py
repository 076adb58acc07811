"""Runs that exist, ours or somebody else's: `name=path` words into runs, and foreign metrics.jsonl under our names."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from checkpoint.records import Environment, EvalsRow, wrong_with
from comparison.plausible import plausible
from comparison.seen import SeenRun, read_seen
from run.files import read_text
from run.metrics import Row, read_rows
from settings import Refusal

ALIASES: Mapping[str, tuple[str, ...]] = {
    "step": ("step", "iteration", "iter", "global_step", "_step", "trainer/global_step", "train/global_step",
             "train/step", "train/iteration", "train_step", "steps", "update", "num_updates"),
    "loss": ("loss", "train_loss", "train/loss", "training_loss", "lm_loss", "train/lm_loss", "loss/train",
             "training/loss", "loss_metrics/global_avg_loss", "train/loss_metrics/global_avg_loss", "train/ce_loss",
             "train/cross_entropy_loss", "ce_loss", "language_model_loss"),
    "tokens": ("tokens", "consumed_tokens", "num_tokens", "total_tokens", "tokens_seen", "n_tokens_seen",
               "ntokens_seen", "train/tokens", "train/n_tokens_seen", "train/total_tokens", "train/tokens_seen",
               "num_input_tokens_seen", "train/num_input_tokens_seen", "throughput/total_tokens",
               "train/consumed_tokens"),
    "tokens_per_second": ("tokens_per_second", "tokens_per_sec", "tokens/s", "tok/s", "tok_per_sec", "tps",
                          "throughput(tps)", "train/tps", "train/tokens_per_second",
                          "train/tokens_per_sec", "train/throughput(tps)", "train/tok_per_sec", "perf/tps",
                          "throughput/device/tps", "train_tokens_per_second"),
    "learning_rate": ("learning_rate", "lr", "train/lr", "train/learning_rate", "optim/lr", "lr_0"),
    "gradient_norm": ("gradient_norm", "grad_norm", "train/grad_norm", "optim/total_grad_norm", "total_norm"),
    "mfu": ("mfu", "train/mfu", "mfu(%)", "train/mfu(%)"),
    "elapsed_seconds": ("elapsed_seconds", "_runtime", "elapsed", "elapsed_time", "wall_time", "wall_clock_seconds",
                        "train/elapsed_seconds"),
    "peak_memory_bytes": ("peak_memory_bytes", "max_memory_bytes", "memory/max_reserved(gib)",
                          "train/memory/max_reserved(gib)", "train/peak_memory_bytes", "max_memory_allocated"),
    "flops_per_token": ("flops_per_token", "num_flops_per_token", "train/flops_per_token"),
    "sequence_length": ("sequence_length", "seq_len", "seq_length", "train/sequence_length"),
    "balance_loss": ("balance_loss", "load_balancing_loss", "aux_loss", "train/aux_loss", "train/load_balancing_loss"),
    "max_violation": ("max_violation", "max_vio", "maxvio"),
    "router_entropy": ("router_entropy",),
    "dead_experts": ("dead_experts",),
    "padding_share": ("padding_share",),
}  # fmt: skip
"""Our key, and what others write for it: letters small, spaces and hyphens as `_`, tables and dots as `/`; the first
that is there counts. Speeds are taken as they stand: torchtitan's is that of one device. A bare `throughput` is no
speed: Megatron's counts TFLOP a second."""
UNITS = {"mfu(%)": 0.01, "train/mfu(%)": 0.01, "memory/max_reserved(gib)": 2.0**30}
UNITS["train/memory/max_reserved(gib)"] = 2.0**30
WHOLE = ("step", "tokens", "sequence_length", "peak_memory_bytes")
SPELLED = str.maketrans({" ": "_", "-": "_", ".": "/"})
LARGEST = 1e18
"""Of any number: what is beyond it no run counts, and no picture holds."""
LARGEST_LOSS = 1e6
"""A run whose loss is beyond it has gone astray: it has no number there, as where it is NaN."""
BYTE_ORDER_MARK = "\ufeff"
KEPT_EVERY = 4000
"""Rows of others' files beyond which they are thinned out."""


def read_runs(words: Sequence[str]) -> list[SeenRun]:
    """`PATH` or `LABEL=PATH`, folders or .jsonl files; those of one label are seeds of one arm. Raises Refusal."""
    named = [_split(word) for word in words]
    runs = [read_other(path, label) for label, path in named]
    if len({run.folder for run in runs}) < len(runs):
        raise Refusal("--runs: names a folder twice; a run says what it says once")
    seen: dict[tuple[str, int], Path] = {}
    for run in runs:
        if run.seed is not None and seen.setdefault((run.arm, run.seed), run.folder) != run.folder:
            raise Refusal(
                f"{run.folder}: is arm {run.arm!r} with seed {run.seed}, and so is {seen[run.arm, run.seed]}; give one "
                "of them another label: --runs LABEL=PATH"
            )
    return runs


def _split(word: str) -> tuple[str, Path]:
    label, equals, rest = word.partition("=")
    if equals and not Path(word).exists():
        if not label.strip() or not rest:
            raise Refusal(f"--runs {word!r}: write LABEL=PATH, or a path alone")
        return _label(label.strip(), word), Path(rest)
    path = Path(word)
    name = path.resolve().parent.name if path.name == "metrics.jsonl" else path.resolve().name
    return _label(name.removesuffix(".jsonl"), word), path


def _label(label: str, word: str) -> str:
    """Raises Refusal for one that a terminal could not show as it is: a line's end or an escape."""
    if not label or not label.isprintable():
        raise Refusal(f"--runs {word!r}: {label!r} cannot be shown; give it a label of letters: --runs LABEL=PATH")
    return label


def read_other(path: Path, label: str, group: str = "") -> SeenRun:
    """A run of ours by its folder, or somebody else's by its metrics.jsonl. Raises Refusal naming what is wrong."""
    file = path if path.is_file() else path / "metrics.jsonl"
    folder = file.parent
    if file.name == "metrics.jsonl" and (folder / "config.toml").is_file():
        run = read_seen(folder, label, None, group)
        if run is None:
            raise Refusal(f"{folder}: has measured nothing yet; leave it out, or train it further")
        seed = run.config.get("seed", 0)
        return replace(run, seed=seed if isinstance(seed, int) else None)
    if not file.is_file():
        raise Refusal(f"{path}: holds neither config.toml nor metrics.jsonl, so it is no run; give a run's folder")
    rows, names = read_foreign(file)
    metrics, odd = plausible(rows, lambda key: names.get(key, key))
    evals = [row for row in read_rows(folder / "evals.jsonl", EvalsRow) if row.get("moment") != "start"]
    notes = [f"somebody else's metrics: {', '.join(f'{key} from {name}' for key, name in names.items())}", *odd]
    notes += _lacking(metrics)
    environment = _environment(folder / "environment.json") if file.name == "metrics.jsonl" else {}
    return SeenRun(group, label, None, file.resolve().parent if file.name == "metrics.jsonl" else file.resolve(),
                   metrics, evals, environment=environment, notes=tuple(notes))  # fmt: skip


def _lacking(metrics: Sequence[Row]) -> Iterator[str]:
    """What cannot be drawn for want of what."""
    has = {key: any(row.get(key) is not None for row in metrics) for key in ALIASES}
    if not has["tokens"]:
        yield "no count of tokens (tokens, consumed_tokens, ...): left out of what is drawn against tokens"
    if not has["elapsed_seconds"] and not (has["tokens"] and has["tokens_per_second"]):
        lacks = "a speed alone, without a count of tokens," if has["tokens_per_second"] else "no speed"
        yield f"{lacks} and no elapsed time: left out of what is drawn against seconds"
    if not has["flops_per_token"]:
        yield "no FLOPs a token (flops_per_token): left out of what is drawn against FLOPs"


def _environment(path: Path) -> dict[str, Any]:
    """environment.json beside others' metrics; nothing where there is none. Raises Refusal where it is damaged."""
    if not path.exists():
        return {}
    text = read_text(path).removeprefix(BYTE_ORDER_MARK)
    try:
        table = json.loads(text)
        wrong = wrong_with(table, Environment) if isinstance(table, dict) else "is no JSON object"
    except (ValueError, RecursionError) as error:
        table, wrong = {}, f"is no JSON: {error}"
    if wrong:
        raise Refusal(f"{path}: {wrong}; mend the file, or move it away: a comparison does without it")
    return dict(table)


def read_foreign(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Rows under our names, by step, a step that stands twice as it stands last; those without a loss are left out.

    Beside them what each key is called in the file.
    Raises Refusal naming file, line and key where a line is no object, a step no whole number, or where no line has a
    step or a loss.
    """
    rows: dict[int, Row] = {}
    lines = [(number, flat) for number, flat in _objects(path)]
    chosen = {key: _first(names, lines) for key, names in ALIASES.items()}
    for key in ("step", "loss"):
        if chosen[key] is None:
            number, flat = lines[0] if lines else (1, {})
            raise Refusal(
                f"{path}, line {number}: {key} is not there, nor on any later line; it may be called "
                f"{', '.join(ALIASES[key][:6])}, ...; here are {', '.join(list(flat)[:12]) or 'no keys'}"
            )
    names = {key: name for key, name in chosen.items() if name is not None}
    for number, flat in lines:
        row = _row(path, number, flat, names)
        if "step" in row and "loss" in row:
            rows[row["step"]] = row
    found = [rows[step] for step in sorted(rows)]
    return found[:: max(1, len(found) // KEPT_EVERY)], names


def _first(names: Iterable[str], lines: Sequence[tuple[int, Mapping[str, Any]]]) -> str | None:
    """Of several names the first that any line has: one name for the whole file, so that meanings do not mix."""
    return next((name for name in names if any(flat.get(name) is not None for _, flat in lines)), None)


def _row(path: Path, number: int, flat: Mapping[str, Any], chosen: Mapping[str, str]) -> Row:
    row: Row = {}
    for key, name in chosen.items():
        if name not in flat:
            continue
        value = flat[name]
        if value is None and key == "loss":
            row[key] = None
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            if key in ("step", "loss", "tokens"):
                raise Refusal(f"{path}, line {number}: {name}={value!r:.40} is no number, and is read as {key}")
            continue
        row |= _numbered(f"{path}, line {number}: {name}", key, value, UNITS.get(name, 1))
    return row


def _numbered(place: str, key: str, value: float, unit: float) -> Row:
    """A key's number; nothing where it is none, and None for a loss. Raises Refusal for steps and tokens beyond sense.

    Bounds come before arithmetic: an integer may have more digits than a float holds.
    """
    if isinstance(value, float) and math.isnan(value):
        return {key: None} if key == "loss" else {}
    if key == "loss":
        return {key: float(value) if abs(value) <= LARGEST_LOSS else None}
    if abs(value) > LARGEST:
        if key in ("step", "tokens") and value not in (math.inf, -math.inf):
            raise Refusal(
                f"{place}={str(value)[:20]} is beyond {LARGEST:g}, and is read as {key}; mend or remove the line"
            )
        return {}
    if key == "step" and value != round(value):
        raise Refusal(f"{place}={value!r} is no whole number, and is read as step; number the steps 1, 2, 3, ...")
    value = value * unit
    return {key: round(value) if key in WHOLE else float(value)}


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, flat keys) of each line; one that was cut short at the end of the file is none."""
    lines = read_text(path).removeprefix(BYTE_ORDER_MARK).split("\n")
    for number, line in zip(count(1), lines, strict=False):
        if not line.strip():
            continue
        try:
            table = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                continue
            raise Refusal(f"{path}, line {number}: is no JSON object; mend the line or remove it") from None
        if not isinstance(table, dict):
            raise Refusal(f"{path}, line {number}: is no JSON object; each line has to be one step's")
        yield number, dict(_flat(table))


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = above + str(key).strip().lower().translate(SPELLED)
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}/")
        else:
            yield name, value
