"""Ask a checkpoint: `python -m evals CHECKPOINT [--tasks needle,held_out] [--lengths 128,512] [--out DIR]`."""

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from context.rotary import RotarySpec
from context.stages import Stage, Stages
from data.batches import Batches
from evals.harness import Cell, Materials
from evals.heatmap import Grid, make_grid, save_png, show
from evals.suite import TASKS, EvalsSettings, run_suite, tasks_of
from model.initialize import initialize
from model.transformer import Transformer, build_model
from run.checkpoint import read_checkpoint
from run.config import RunConfig
from run.identity import read_recorded
from run.start import choose_device, choose_dtype, refusing
from settings import Refusal, Section, apply_override, to_dict, validate


class RotaryChoice(Section):
    """What --rotary may say."""

    rotary: RotarySpec


@dataclass(frozen=True)
class Loaded:
    """A checkpoint brought back to life."""

    model: Transformer
    config: RunConfig
    materials: Materials
    stage: Stage
    """The stage that its last step belonged to: its length was trained, its rotary is used."""
    step: int
    tokens: int


def main(arguments: argparse.Namespace) -> None:
    """Ask what the checkpoint's own configuration asks, changed by the command line; print, and write with --out."""
    loaded = load_checkpoint(arguments.checkpoint, arguments.device, arguments.at_eval)
    if arguments.rotary is not None:
        loaded.model.use_rotary(read_rotary(arguments.rotary))
    settings = choose(loaded, arguments.tasks, arguments.lengths)
    cells = run_suite(loaded.model, settings, loaded.materials)
    title = f"{loaded.config.name} at step {loaded.step:,}" + (f", {arguments.rotary}" if arguments.rotary else "")
    needles = [cell for cell in cells if cell.task == "needle"]
    grids = [make_grid(needles, title, loaded.stage.sequence_length)] if needles else []
    say(cells, grids)
    if arguments.out is not None:
        write(arguments.out, cells, grids, loaded)


def load_checkpoint(path: Path, device_name: str, at_eval: str | None = None) -> Loaded:
    """The model of a checkpoint, and the held-out text of the run that made it. Raises Refusal.

    at_eval: what an expert-choice router does here, in place of what its configuration says.
    """
    state, config_toml, weights = read_checkpoint(path)
    config = read_recorded(config_toml, RunConfig, f"{path}: config.toml")
    if at_eval is not None:
        table = to_dict(config)
        apply_override(table, f"model.moe.router.at_eval={at_eval}")
        config = validate(table, RunConfig, "--at-eval")
    device = choose_device(device_name)
    dtype = choose_dtype(config.precision, device)
    batches = Batches(config.data, seed=config.seed)
    model = build_model(config.model, batches.tokenizer.vocab_size)
    initialize(model, config.seed, device)
    model.load_state_dict(weights)
    stage = Stages(config.context.stages, config.tokens_per_step).at(max(0, state["tokens"] - config.tokens_per_step))
    model.use_rotary(stage.rotary)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    materials = Materials(batches.tokenizer, batches.all_held_out(), device, autocast)
    return Loaded(model, config, materials, stage, state["step"], state["tokens"])


def read_rotary(text: str) -> RotarySpec:
    """The rotation written as an inline table of TOML."""
    try:
        table = tomllib.loads(f"rotary = {text}")
    except tomllib.TOMLDecodeError as error:
        raise Refusal(
            f"--rotary {text!r}: not a TOML table: {error}; write '{{ kind = \"default\", base = 1e4 }}'"
        ) from None
    return validate(table, RotaryChoice, "--rotary").rotary


def choose(loaded: Loaded, tasks: Sequence[str] | None, lengths: Sequence[int] | None) -> EvalsSettings:
    """The checkpoint's own tasks, or those named, at its own lengths, or those named.

    A task that the configuration has no table for is asked around the trained length, of the first source.
    """
    table = to_dict(loaded.config.evals)
    named = list(tasks or tasks_of(loaded.config.evals) or TASKS)
    trained = loaded.stage.sequence_length
    around: dict[str, dict[str, Any]] = {
        "held_out": {"lengths": [trained]},
        "needle": {
            "lengths": [trained, 2 * trained, 4 * trained],
            "haystack": next(iter(loaded.materials.held_out), ""),
        },
        "positions": {"length": trained},
        "routing": {"length": trained},
    }
    for name in named:
        if name in around:
            table.setdefault(name, around[name])
            if lengths:
                key, value = ("lengths", sorted(lengths)) if "lengths" in around[name] else ("length", max(lengths))
                table[name] = table[name] | {key: value}
    return validate(table | {"tasks": named}, EvalsSettings, "evals")


def say(cells: Sequence[Cell], grids: Sequence[Grid]) -> None:
    """Print the needle grid in colour and every other cell as a line."""
    console = Console()
    if grids:
        show(grids, console)
    for cell in cells:
        if cell.task != "needle":
            extra = "  ".join(f"{key} {value:.4g}" for key, value in cell.extra.items() if not key.startswith("load_"))
            line = f"{cell.task:<22} length {cell.length:>7,}  score {cell.score:.4f}  {extra}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def write(folder: Path, cells: Sequence[Cell], grids: Sequence[Grid], loaded: Loaded) -> None:
    """Write evals.jsonl, a row a cell, and needle.png."""
    folder.mkdir(parents=True, exist_ok=True)
    where = {"stage": loaded.stage.index, "trained_length": loaded.stage.sequence_length}
    rows = [json.dumps(cell.row(loaded.step, loaded.tokens) | where) for cell in cells]
    (folder / "evals.jsonl").write_text("".join(row + "\n" for row in rows))
    if grids:
        save_png(grids, folder / "needle.png")
    print(f"written: {folder / 'evals.jsonl'}" + (f", {folder / 'needle.png'}" if grids else ""))


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evals", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a run's folder or one of its checkpoints/step_... folders")
    parser.add_argument("--tasks", type=_names, help=f"comma-separated, of: {', '.join(TASKS)}")
    parser.add_argument("--lengths", type=_numbers, help="comma-separated lengths in tokens")
    parser.add_argument("--rotary", help="another rotation for the same weights: '{ kind = \"yarn\", ... }'")
    parser.add_argument("--at-eval", choices=("token_choice",), help="how an expert-choice router routes here")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="where evals.jsonl and needle.png are written")
    return parser.parse_args(words)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _names(text)]


if __name__ == "__main__":
    chosen = parse_arguments()
    sys.exit(refusing(lambda: main(chosen)))
