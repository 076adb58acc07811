"""Ask a checkpoint: `python -m evals CHECKPOINT [--tasks needle,held_out] [--lengths 128,512] [--out DIR]`.

`python -m evals --list` says what can be asked.
"""

import argparse
import json
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from context.rotary import AnyRotary
from context.stages import Stage
from data.batches import Batches
from evals.defaults import choose
from evals.grid import Grid
from evals.pictures import grids_of, pictures_of
from evals.scoring import Cell, Materials
from evals.suite import TASKS, run_suite
from evals.table import table_of
from evals.terminal import show
from model.initialize import initialize
from model.transformer import Transformer, build_model
from run.checkpoint import read_checkpoint
from run.config import RunConfig
from run.identity import read_recorded
from run.metrics import plain
from run.start import choose_device, choose_dtype, refusing
from settings import Refusal, Section, apply_override, to_dict, validate


class RotaryChoice(Section):
    """What --rotary may say."""

    rotary: AnyRotary


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
    if arguments.list:
        print("\n".join(describe_tasks()))
        return
    loaded = load_checkpoint(arguments.checkpoint, arguments.device, arguments.at_eval)
    if arguments.rotary is not None:
        loaded.model.use_rotary(read_rotary(arguments.rotary))
    trained = loaded.stage.sequence_length
    settings, left_out = choose(loaded.config.evals, trained, loaded.materials, arguments.tasks, arguments.lengths)
    for line in left_out:
        print(line)
    cells = run_suite(loaded.model, settings, loaded.materials)
    title = f"{loaded.config.name} at step {loaded.step:,}" + (f", {arguments.rotary}" if arguments.rotary else "")
    grids = grids_of(cells, title, trained)
    describe(cells, grids.values())
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
    stage = config.stages.last_step(state["tokens"]).stage
    model.use_rotary(stage.rotary)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    materials = Materials(batches.tokenizer, batches.all_held_out(), device, autocast)
    return Loaded(model, config, materials, stage, state["step"], state["tokens"])


def read_rotary(text: str) -> AnyRotary:
    """The rotation written as an inline table of TOML."""
    try:
        table = tomllib.loads(f"rotary = {text}")
    except tomllib.TOMLDecodeError as error:
        raise Refusal(
            f"--rotary {text!r}: not a TOML table: {error}; write '{{ kind = \"default\", base = 1e4 }}'"
        ) from None
    return validate(table, RotaryChoice, "--rotary").rotary


def describe(cells: Sequence[Cell], grids: Iterable[Grid]) -> None:
    """Print the grids in colour and every cell as a line."""
    console = Console()
    for grid in grids:
        show([grid], console)
    for line in table_of(cells):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write(folder: Path, cells: Sequence[Cell], grids: Mapping[str, Grid], loaded: Loaded) -> None:
    """Write evals.jsonl, a row a cell, and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    where = {"stage": loaded.stage.index, "trained_length": loaded.stage.sequence_length}
    rows = [json.dumps(plain(cell.row(loaded.step, loaded.tokens) | where), allow_nan=False) for cell in cells]
    (folder / "evals.jsonl").write_text("".join(row + "\n" for row in rows))
    pictures = pictures_of(cells, grids, loaded.stage.sequence_length)
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    print("written: " + ", ".join(str(folder / name) for name in ("evals.jsonl", *pictures)))


def describe_tasks() -> list[str]:
    """A line a task: its name and the first sentence of its module."""
    return [f"{name:<18} {first_sentence(sys.modules[task.run.__module__].__doc__)}" for name, task in TASKS.items()]


def first_sentence(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evals", description=first_sentence(__doc__))
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="a run's folder or one of its checkpoints/step_... folders"
    )
    parser.add_argument("--tasks", type=_names, help=f"comma-separated, of: {', '.join(TASKS)}")
    parser.add_argument("--list", action="store_true", help="say what the tasks ask, and exit")
    parser.add_argument("--lengths", type=_numbers, help="comma-separated lengths in tokens")
    parser.add_argument("--rotary", help="another rotation for the same weights: '{ kind = \"yarn\", ... }'")
    parser.add_argument("--at-eval", choices=("token_choice",), help="how an expert-choice router routes here")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="where evals.jsonl and the pictures are written")
    arguments = parser.parse_args(words)
    if arguments.checkpoint is None and not arguments.list:
        parser.error("give a checkpoint, or --list")
    return arguments


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _names(text)]


if __name__ == "__main__":
    chosen = parse_arguments()
    sys.exit(refusing(lambda: main(chosen)))
