"""lm-evaluation-harness on a checkpoint: `python -m evals.harness RUN hellaswag,arc_easy [--shots 5] [--out DIR]`."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoint.checkpoints import read_checkpoint
from checkpoint.fit import check_weights
from checkpoint.identity import read_recorded
from checkpoint.records import place_of
from data.tokenizer import build_tokenizer
from evals.__main__ import check_out, read_rotary
from evals.lengths import trained_length
from evals.scoring import Materials
from model.initialize import initialize
from model.transformer import build_model
from run.config import RunConfig
from run.start import choose_device, choose_dtype, refusing
from settings import Refusal, to_dict

REPORT = "harness.json"
KEPT = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
"""What is written of lm-eval's report; its configuration of each task is the version's."""


def main(arguments: argparse.Namespace) -> None:
    """Ask, print lm-eval's table, and with --out write harness.json: the numbers and what they were measured with."""
    if arguments.out is not None:
        check_out(arguments.out, REPORT)
    package = require()
    asked, facts = load(arguments)
    tasks = package.tasks.TaskManager(include_defaults=not all(map(is_file, arguments.tasks)))
    matches = {name: [name] if is_file(name) else tasks.match_tasks([name]) for name in arguments.tasks}
    unknown = [name for name, found in matches.items() if not found]
    if unknown:
        raise Refusal(
            f"{unknown[0]!r}: is no YAML file, and lm-eval {package.__version__} has no such task; `lm-eval ls tasks` "
            "lists them"
        )
    found = package.simple_evaluate(
        model=asked,
        tasks=list(dict.fromkeys(name for names in matches.values() for name in names)),
        num_fewshot=arguments.shots,
        limit=arguments.limit,
        task_manager=tasks,
        log_samples=False,
    )
    print(package.utils.make_table(found))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        report = {"lm_eval": package.__version__, **facts, **{key: found[key] for key in KEPT if key in found}}
        path = arguments.out / REPORT
        path.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
        print(f"written: {path}")


def require() -> Any:
    """The package lm_eval, whole. Raises Refusal where it is not installed."""
    try:
        import lm_eval
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise Refusal(f"lm-eval cannot be imported ({error}): pip install 'longmoe[eval]'") from None
    return lm_eval


def load(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The checkpoint as lm-eval asks it, and what there is to say of it; the run's data is not needed."""
    from evals.harness.model import HarnessModel

    state, config_toml, weights = read_checkpoint(arguments.checkpoint)
    config = read_recorded(config_toml, RunConfig, f"{arguments.checkpoint}: config.toml")
    device = choose_device(arguments.device)
    dtype = choose_dtype(config.precision, device)
    tokenizer = build_tokenizer(config.data.tokenizer)
    model = build_model(config.model, tokenizer.vocab_size)
    check_weights(arguments.checkpoint, weights, model)
    initialize(model, config.seed, device)
    model.load_state_dict(weights)
    step, tokens = place_of(state, arguments.checkpoint)
    stage = config.stages.last_step(tokens).stage
    rotary = stage.rotary if arguments.rotary is None else read_rotary(arguments.rotary)
    model.use_rotary(rotary)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    trained = trained_length(config.stages, tokens)
    length = trained if arguments.length is None else arguments.length
    if length < 1:
        raise Refusal(f"--length {length}: a request has tokens; give 1 or more")
    facts = {
        "checkpoint": str(arguments.checkpoint),
        "step": step,
        "tokens": tokens,
        "trained_length": trained,
        "length": length,
        "beyond": arguments.beyond,
        "rotary": to_dict(rotary),
        "tokenizer": to_dict(config.data.tokenizer),
        "precision": str(dtype).removeprefix("torch."),
    }
    return HarnessModel(model, Materials(tokenizer, {}, device, autocast), length, arguments.beyond), facts


def is_file(name: str) -> bool:
    """Whether a task is given by its YAML file."""
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evals.harness", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a run's folder or one of its checkpoints/step_... folders")
    parser.add_argument("tasks", type=lambda text: text.split(","), help="lm-eval's names, or YAML files, by commas")
    parser.add_argument("--shots", type=int, help="solved examples before each question; left out, as the task says")
    parser.add_argument("--limit", type=int, help="ask only the first so many of each task")
    parser.add_argument("--length", type=int, help="tokens that are read at most; left out, the trained length")
    parser.add_argument(
        "--beyond",
        choices=("refuse", "cut", "read"),
        default="refuse",
        help="what is done with longer requests: refuse, cut their beginnings off, or read all of them",
    )
    parser.add_argument("--rotary", help="another rotation for the same weights: '{ kind = \"yarn\", ... }'")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="where harness.json is written")
    return parser.parse_args(words)


if __name__ == "__main__":
    chosen = parse_arguments()
    sys.exit(refusing(lambda: main(chosen)))
