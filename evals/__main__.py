"""Ask a checkpoint: `python -m evals CHECKPOINT [--tasks needle,held_out] [--lengths 128,512] [--out DIR]`.

`python -m evals --list` says what can be asked.
"""

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from checkpoint.checkpoints import read_checkpoint
from checkpoint.fit import check_weights
from checkpoint.identity import read_recorded
from checkpoint.records import place_of
from context.rotary import AnyRotary
from context.stages import Stage
from data.batches import Batches
from evals.defaults import choose
from evals.grid import Grid
from evals.lengths import trained_length
from evals.pictures import grids_of, pictures_of
from evals.scoring import Cell, Materials
from evals.suite import TASKS, run_suite
from evals.table import table_of
from evals.terminal import show
from model.initialize import initialize
from model.transformer import ModelSettings, Transformer, build_model
from moe.choice import ExpertChoiceSettings
from run.config import RunConfig
from run.metrics import plain
from run.start import choose_device, choose_dtype, refusing
from settings import Refusal, Section, apply_override, to_dict, validate

CELLS = "evals.jsonl"
"""A row a cell."""


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
    """The stage that its last step belonged to: its rotary is used."""
    step: int
    tokens: int

    @property
    def trained_length(self) -> int:
        return trained_length(self.config.stages, self.tokens)


def main(arguments: argparse.Namespace) -> None:
    """Ask what the checkpoint's own configuration asks, changed by the command line; print, and write with --out."""
    if arguments.list:
        print("\n".join(describe_tasks()))
        return
    if arguments.out is not None:
        check_out(arguments.out, CELLS)
    tasks = None if arguments.tasks is None else read_names(arguments.tasks, "--tasks")
    lengths = None if arguments.lengths is None else read_lengths(arguments.lengths)
    loaded = load_checkpoint(arguments.checkpoint, arguments.device, arguments.at_eval)
    if arguments.rotary is not None:
        loaded.model.use_rotary(read_rotary(arguments.rotary))
    trained = loaded.trained_length
    settings, left_out = choose(loaded.config.evals, trained, loaded.materials, tasks, lengths)
    for line in left_out:
        print(line)
    cells = run_suite(loaded.model, settings, loaded.materials, say=print)
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
        refuse_token_choosers(config.model, at_eval)
        table = to_dict(config)
        apply_override(table, f"model.moe.router.at_eval={at_eval}")
        config = validate(table, RunConfig, "--at-eval")
    device = choose_device(device_name)
    dtype = choose_dtype(config.precision, device)
    batches = Batches(config.data, seed=config.seed)
    model = build_model(config.model, batches.tokenizer.vocab_size)
    check_weights(path, weights, model)
    initialize(model, config.seed, device)
    model.load_state_dict(weights)
    step, tokens = place_of(state, path)
    stage = config.stages.last_step(tokens).stage
    model.use_rotary(stage.rotary)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    materials = Materials(batches.tokenizer, batches.all_held_out(), device, autocast)
    return Loaded(model, config, materials, stage, step, tokens)


def refuse_token_choosers(model: ModelSettings, at_eval: str) -> None:
    """Refuse --at-eval for a model whose tokens choose their experts already, or that has none."""
    router = None if model.moe is None else model.moe.router
    if not isinstance(router, ExpertChoiceSettings):
        found = "this model is dense" if router is None else f"this one is {router.kind!r}"
        raise Refusal(f"--at-eval {at_eval}: is for a router of kind 'expert_choice', and {found}; leave it out")


def check_out(folder: Path, name: str) -> None:
    """Refuse, before the model is asked, a folder that `name` cannot be written to without loss."""
    nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise Refusal(f"--out {folder}: {nearest} is there and is no folder; give another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise Refusal(f"--out {folder}: nothing may be written in {nearest}; give another one")
    if (folder / "config.toml").exists() or (folder / "checkpoints").exists():
        raise Refusal(f"--out {folder}: holds a run or a checkpoint; give a folder of its own, such as {folder}-evals")
    if os.path.lexists(folder / name):
        raise Refusal(f"--out {folder}: {name} is there already; give another folder, or move that file away")


def read_names(text: str, option: str) -> list[str]:
    """What stands between commas. Raises Refusal for nothing, which is not the same as leaving the option out."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise Refusal(f"{option} {text!r}: names nothing; write names with commas between them, or leave it out")
    return names


def read_lengths(text: str) -> list[int]:
    """Lengths in tokens, each once."""
    names = read_names(text, "--lengths")
    wrong = [name for name in names if not name.isdecimal() or int(name) < 1]
    if wrong:
        raise Refusal(f"--lengths {text!r}: {wrong[0]!r} is no length; write tokens, 1 or more, as in 128,512")
    lengths = [int(name) for name in names]
    if len(set(lengths)) < len(lengths):
        raise Refusal(f"--lengths {text!r}: the same length stands twice; give each once")
    return lengths


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
    where = {"stage": loaded.stage.index, "trained_length": loaded.trained_length}
    rows = [json.dumps(plain(cell.row(loaded.step, loaded.tokens) | where), allow_nan=False) for cell in cells]
    (folder / CELLS).write_text("".join(row + "\n" for row in rows))
    pictures = pictures_of(cells, grids, loaded.trained_length)
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    print("written: " + ", ".join(str(folder / name) for name in (CELLS, *pictures)))


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
    parser.add_argument("--tasks", help=f"comma-separated, of: {', '.join(TASKS)}")
    parser.add_argument("--list", action="store_true", help="say what the tasks ask, and exit")
    parser.add_argument("--lengths", help="comma-separated lengths in tokens")
    parser.add_argument("--rotary", help="another rotation for the same weights: '{ kind = \"yarn\", ... }'")
    parser.add_argument("--at-eval", choices=("token_choice",), help="how an expert-choice router routes here")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="where evals.jsonl and the pictures are written")
    arguments = parser.parse_args(words)
    if arguments.checkpoint is None and not arguments.list:
        parser.error("give a checkpoint, or --list")
    return arguments


if __name__ == "__main__":
    chosen = parse_arguments()
    sys.exit(refusing(lambda: main(chosen)))
