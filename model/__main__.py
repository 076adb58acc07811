"""To and from Hugging Face: `python -m model export RUN OUT` and `python -m model import FOLDER OUT`."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint.checkpoints import read_checkpoint
from checkpoint.fit import check_weights
from checkpoint.identity import may_change, read_recorded
from checkpoint.records import place_of
from checkpoint.sealed import write_sealed
from data.tokenizer import AnyTokenizerSettings, build_tokenizer
from model.huggingface.convert import DTYPES, Imported, Origin, export, read_folder
from model.huggingface.files import read_config
from model.huggingface.tokenizer import FILE, tokenizer_of
from model.huggingface.traits import Decoder
from model.transformer import build_model
from run.config import RunConfig
from run.start import refusing
from settings import Refusal, apply_override, differences, to_dict, to_toml, validate

WEIGHTS_ARE = re.compile(r"model\b|context\.stages\.\d+\.rotary\b|data\.tokenizer\b")
"""Keys that an import takes from the folder alone."""


def export_run(arguments: argparse.Namespace) -> None:
    """Write a run's newest checkpoint, or the one given, as a Hugging Face folder."""
    state, config_toml, weights = read_checkpoint(arguments.run)
    config = read_recorded(config_toml, RunConfig, f"{arguments.run}: config.toml")
    step, tokens = place_of(state, arguments.run)
    stage = config.stages.last_step(tokens).stage
    tokenizer = build_tokenizer(config.data.tokenizer)
    check_weights(arguments.run, weights, build_model(config.model, tokenizer.vocab_size))
    origin = Origin(stage.sequence_length, config.data.tokenizer, tokenizer.end_of_text)
    name = export(Decoder(config.model, stage.rotary), weights, origin, arguments.out, arguments.dtype)
    print(f"written: {arguments.out}, {name} of step {step:,}, {len(weights)} tensors in {arguments.dtype}")


def import_folder(arguments: argparse.Namespace) -> None:
    """Write a Hugging Face folder as a checkpoint that `initial` and `python -m evals` take."""
    folder, out = arguments.folder, arguments.out
    if out.exists() or out.name.startswith("step_"):
        why = "is already there" if out.exists() else "would be taken for a step of a run"
        raise Refusal(f"{out}: {why}; name another folder")
    tokenizer, text = tokenizer_of(folder, read_config(folder))
    config_tokenizer = tokenizer if text is None else tokenizer.model_copy(update={"file": str(out.resolve() / FILE)})
    imported = read_folder(folder, lambda line: print(line, file=sys.stderr))
    config = run_config(imported, config_tokenizer, out.name, arguments.overrides)
    texts = {"state.json": json.dumps({"step": 0, "tokens": 0}), "config.toml": to_toml(config)}
    texts |= {} if text is None else {FILE: text}
    architecture = str(imported.config["architectures"][0])
    facts = {"step": 0, "torch": torch.__version__, "imported": architecture}
    write_sealed(out, texts, {"model.safetensors": imported.weights}, facts)
    print(f"written: {out}, {architecture}, {len(imported.weights)} tensors")
    print(f"to train on: initial.checkpoint = {str(out)!r}, and model, rotary and tokenizer of {out / 'config.toml'}")


def run_config(imported: Imported, tokenizer: AnyTokenizerSettings, name: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of an imported checkpoint: its model and rotation, and text that every machine has.

    Raises Refusal for an override of what the weights are.
    """
    length = imported.length
    stage = {
        "until_tokens": length,
        "sequence_length": length,
        "rotary": to_dict(imported.decoder.rotary),
    }
    table = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "imported",
        "total_tokens": length,
        "tokens_per_step": length,
        "model": to_dict(imported.decoder.settings),
        "context": {"stages": [stage]},
        "data": {"tokenizer": to_dict(tokenizer), "sources": {"python": {"kind": "local_python"}}},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-4},
    }
    where = str(imported.folder)
    plain = validate(table, RunConfig, where)
    for override in overrides:
        apply_override(table, override)
    config = validate(table, RunConfig, where)
    # Looked for in the result: an override may replace a table that stands above a key of the weights.
    other = [line for line in differences(plain, config) if WEIGHTS_ARE.match(line) and not may_change(line)]
    if other:
        raise Refusal(
            "\n".join(f"{where}: {line}" for line in other) + "\nThat is what the weights are: leave it out here; the"
            " stages of a run that starts from the checkpoint (initial.checkpoint) may have another rotation"
        )
    return config


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help=export_run.__doc__)
    out.add_argument("run", type=Path, help="a run's folder or one of its checkpoints/step_... folders")
    out.add_argument("out", type=Path, help="the folder to write")
    out.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    out.set_defaults(main=export_run)
    back = commands.add_parser("import", help=import_folder.__doc__)
    back.add_argument(
        "folder", type=Path, help="config.json, safetensors and tokenizer.json, as transformers writes them"
    )
    back.add_argument("out", type=Path, help="the checkpoint to write")
    back.add_argument("overrides", nargs="*", help="keys of its configuration: data.sources.web='{ ... }'")
    back.set_defaults(main=import_folder)
    return parser.parse_args(words)


if __name__ == "__main__":
    chosen = parse_arguments()
    sys.exit(refusing(lambda: chosen.main(chosen)))
