"""Folders that a run reads, damaged by number, and the commands that then meet them.

`data_case(n)` damages a prepared folder, `run_case(n)` the folder of a run that has come to step 9 of 12. What a
command makes of it is compared with what it makes of the same folder undamaged: nothing may be taken for good that
has changed and whose digest has not.
"""

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch

from data.corpus import text_documents
from data.prepare import prepare
from data.tokenizer import ByteTokenizer
from tests.fuzz import damage
from tests.fuzz.mutations import TINY
from tests.fuzz.trials import Arrived, Outcome, command, empty_folder
from tests.fuzz.verdicts import wrong_with
from tests.words import write_words

Good = Mapping[str, str]
"""What undamaged folders give, by door."""
SHARDS = ("data.sources.words={kind='shards', path='shards', weight=0.7}",)
STEPS = 9
DOORS = ("resume", "resume", "resume", "evals", "branch", "initial", "report", "export")


@dataclass
class Harm:
    """A damaged folder and who meets it."""

    label: str
    door: str
    done: list[str] = field(default_factory=list)
    is_resealed: bool = False
    """Whether digests were made to fit: somebody meant it."""
    is_hidden: bool = False
    """Whether the newest checkpoint has a name under which nobody looks for it, or only after the others."""


# ------------------------------------------------------------------------------------------------- prepared data


def make_shards(folder: Path) -> None:
    """The prepared folder that all cases begin with."""
    write_words(folder)
    prepare(text_documents(folder / "words.txt"), ByteTokenizer(), folder / "shards", 0.1)


def harm_shards(number: int) -> Harm:
    """Damage ./shards as this number says."""
    rng = Random(f"data {number}")
    harm = Harm(f"data {number}", rng.choice(["train", "train", "train", "verify", "lengths"]))
    for _ in range(rng.choice([1, 1, 1, 2])):
        harm.done.append(damage.damage(rng.choice(damage.files_below(Path("shards"))), rng))
    if rng.random() < 0.5:
        harm.is_resealed = _try(lambda: damage.reseal_shards(Path("shards")))
    return harm


def try_shards(template: Path, number: int, good: Good) -> Outcome:
    """One damaged prepared folder, opened. good: what the undamaged one gives, by door."""
    with empty_folder() as here:
        shutil.copytree(template, here, dirs_exist_ok=True, symlinks=True)
        harm = harm_shards(number)
        return judge(harm, ask_shards(harm.door), good, {"shards", "data.sources.words"})


def of_shards(template: Path) -> Good:
    """What a start makes of it undamaged."""
    return {"train": told(_asked(template, lambda: ask_shards("train")))}


def ask_shards(door: str) -> Outcome:
    """What the command says; of a start, the digest of the first rows of both stages."""
    if door != "train":
        return command("data", [door, "shards"])
    with arriving("model.transformer.build_model", _rows_digest):
        return command("train.py", [str(TINY), *SHARDS, "name=x"])


def _rows_digest(*_: Any) -> str:
    from data.batches import Batches
    from run.config import load_config
    from run.demand import demand_of

    config = load_config(TINY, list(SHARDS))
    batches = Batches(config.data, seed=config.seed)
    taken = [batches.take(demand_of(step, batches), 0, 400, 4) for step in config.stages.first_steps()]
    ids = torch.cat([batch.tokens_BT.flatten() for microbatches in taken for batch in microbatches])
    assert int(ids.min()) >= 0 and int(ids.max()) < batches.tokenizer.vocab_size, "ids that the model has no row for"
    held_out = b"".join(tokens.tobytes() for tokens in batches.all_held_out().values())
    return hashlib.sha256(ids.numpy().tobytes() + held_out).hexdigest()


# ------------------------------------------------------------------------------------------------- runs


def make_run(folder: Path) -> None:
    """runs/tiny, which has come to step 9: checkpoints of 6 and 9, and of 8, where its first stage ended."""
    from run import microbatches

    write_words(folder)
    taken, count = microbatches.take_step, 0

    def take(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > STEPS:
            raise Arrived
        return taken(*arguments)

    with chdir(folder), patch("run.microbatches.take_step", take):
        outcome = command("train.py", [str(TINY), "checkpoint.asynchronous=false", "checkpoint.keep=3"])
    assert outcome.status == "arrived", outcome.err
    names = {path.name for path in (folder / "runs/tiny/checkpoints").glob("step_*")}
    assert names == {"step_00000006", "step_00000008", "step_00000009"}, names
    assert outcome.left


def of_run(template: Path) -> Good:
    """What each door makes of it undamaged, and of its older checkpoints where the newer ones are gone."""
    good = {}
    for gone in ((), (9,), (9, 8)):

        def ask(door: str, gone: tuple[int, ...] = gone) -> Outcome:
            for step in gone:
                shutil.rmtree(f"runs/tiny/checkpoints/step_{step:08d}")
            return ask_run(door)

        for door in ("resume", "evals", "initial", "export", *(() if gone else ("branch",))):
            good[door + (f" without {gone}" if gone else "")] = told(_asked(template, partial(ask, door)))
    return good


def _asked(template: Path, ask: Callable[[], Outcome]) -> Outcome:
    with empty_folder() as here:
        shutil.copytree(template, here, dirs_exist_ok=True, symlinks=True)
        return ask()


def harm_run(number: int) -> Harm:
    """Damage ./runs/tiny as this number says."""
    rng = Random(f"run {number}")
    harm = Harm(f"run {number}", rng.choice(DOORS))
    run = Path("runs/tiny")
    newest = run / "checkpoints" / f"step_{8 if harm.door == 'branch' else 9:08d}"
    is_meant = rng.random() < 0.5
    files = _meant(harm.door, run, newest, rng) if is_meant else _any(harm.door, run, newest, rng)
    for _ in range(rng.choice([1, 1, 1, 2])):
        there = [path for path in files if path.is_file() and not path.is_symlink()]
        harm.done.append(damage.damage(rng.choice(there), rng, is_meant=is_meant))
    if is_meant:
        harm.is_resealed = _try(lambda: damage.reseal_checkpoint(newest, rng.random() < 0.8))
    elif rng.random() < 0.2 and newest.is_dir():
        other = rng.choice(
            ["step_00000007", "step_00000010", "step_9", "step_00000099", "x", "step_99999999999999999999"]
        )
        newest.rename(newest.with_name(other))
        harm.is_hidden = other in ("x", "step_00000007")
        harm.done.append(f"{newest.name} called {other}")
    return harm


def _any(door: str, run: Path, newest: Path, rng: Random) -> list[Path]:
    """Files that a disk may damage, large ones more often."""
    if door == "report" or rng.random() < 0.25:
        return [path for path in damage.files_below(run) if path.parent == run]
    files = damage.files_below(newest if rng.random() < 0.8 else run / "checkpoints")
    return rng.choice([files, [path for path in files if path.suffix == ".safetensors"]])


def _meant(door: str, run: Path, newest: Path, rng: Random) -> list[Path]:
    """Files that somebody may change for this command to meet, one kind of them as often as another."""
    if door == "report":
        return [run / name for name in ("config.toml", "environment.json", "metrics.jsonl", "evals.jsonl")]
    names = ["model.safetensors", "model.safetensors", "state.json", "config.toml", "manifest.json"]
    if door in ("resume", "branch"):
        names += ["optimizer.safetensors", "optimizer.json"]
    return [newest / rng.choice(names)]


def try_run(template: Path, number: int, good: Good) -> Outcome:
    """One damaged run, continued, asked, branched from or reported. good: what the undamaged one gives, by door."""
    with empty_folder() as here:
        shutil.copytree(template, here, dirs_exist_ok=True, symlinks=True)
        harm = harm_run(number)
        names = {path.name for path in here.rglob("*")} | {"runs/tiny", "checkpoint"}
        outcome = ask_run(harm.door)
        outcome.left = []  # a run's own folder: one in which nothing was trained is free
        return judge(harm, outcome, good, names)


def ask_run(door: str) -> Outcome:
    """What the command says; where weights are read, the digest of weights, moments and progress."""
    first = [str(TINY), "name=new"]
    if door == "report":
        return command("run", ["report", "runs/tiny"])
    if door == "evals":
        with arriving("evals.suite.run_suite", lambda model, *_: _digest(model.state_dict())):
            return command("evals", ["runs/tiny", "--tasks", "held_out", "--device", "cpu"])
    if door == "export":
        place = "model.huggingface.convert.export"
        with arriving(place, lambda _, weights, origin, *rest: f"{_digest(weights)} {origin}"):
            return command("model", ["export", "runs/tiny", "out"])
    words = {
        "resume": [str(TINY), "checkpoint.asynchronous=false"],
        "branch": [*first, "branch={run='runs/tiny', stage=1}"],
        "initial": [*first, "initial.checkpoint=runs/tiny"],
    }[door]
    with patch("run.trial.try_batches", _tell_learned), arriving("run.microbatches.take_step", lambda *_: ""):
        return command("train.py", words)


def _tell_learned(*arguments: Any) -> None:
    """What a resume has got back; it then goes on to its first step, so that all of the state is read."""
    print(f"ARRIVED {_learned(*arguments)}")


def _learned(model: Any, optimizer: Any, _batches: Any, _run: Any, tokens: int) -> str:
    state = {
        f"{n} {k} {p}": v
        for n, inner in enumerate(optimizer.optimizers)
        for k, s in _moments(inner)
        for p, v in s.items()
    }
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return (
        f"{tokens} {_digest({**model.state_dict(), **state})} {hashlib.sha256(repr(options).encode()).hexdigest()[:8]}"
    )


def _moments(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, dict[str, Any]]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        yield number, optimizer.state.get(parameter, {})


def _digest(tensors: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        content = (
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if torch.is_tensor(value) else b""
        )
        digest.update(f"{name} {getattr(value, 'shape', value)}".encode() + bytes(content))
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- what is expected


@contextmanager
def arriving(place: str, tell: Callable[..., str]) -> Iterator[None]:
    """Stop there, and print what `tell` makes of the arguments."""

    def arrive(*arguments: Any, **_: Any) -> None:
        print(f"ARRIVED {tell(*arguments)}")
        raise Arrived

    with ExitStack() as stack:
        stack.enter_context(patch(place, arrive))
        try:
            yield
        finally:
            torch.set_num_threads(1)


def told(outcome: Outcome) -> str:
    """What a command arrived with."""
    return _arrived_with(outcome.out)


def _arrived_with(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("ARRIVED ") and len(line) > len("ARRIVED ")]
    return lines[-1] if lines else ""


def judge(harm: Harm, outcome: Outcome, good: Good, names: set[str]) -> Outcome:
    """Refused in one message, or as good as undamaged; an older checkpoint only with a warning."""
    shown, outcome.out = outcome.out, f"{harm.label} by {harm.door}: {harm.done}{' (resealed)' * harm.is_resealed}"
    warned = [line for line in (shown + outcome.err).splitlines() if "is damaged and not used" in line]
    outcome.err = "".join(
        line for line in outcome.err.splitlines(keepends=True) if "is damaged and not used" not in line
    )
    outcome.found += wrong_with(outcome, None)
    if outcome.status == 2 and not any(name in outcome.err for name in names):
        outcome.found.append(f"names no file: {outcome.err[:300]!r}")
    if outcome.status == "arrived" and not harm.is_resealed:
        known = {digest for door, digest in good.items() if door.startswith(harm.door)}
        came = _arrived_with(shown)
        if came not in known:
            outcome.found.append(f"taken for good, and is not: {came} instead of {known}")
        elif came != good[harm.door] and not warned and not harm.is_hidden:
            outcome.found.append("an older checkpoint was taken without a word")
    return outcome


def _try(seal: Callable[[], None]) -> bool:
    try:
        seal()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return False  # there is nothing left that could be sealed
    except Exception as error:
        if "safetensors" not in type(error).__module__ and type(error).__name__ != "SafetensorError":
            raise
        return False
    return True


if __name__ == "__main__":
    room, number = sys.argv[1], int(sys.argv[2])
    make, tell, harm_it, trial = {
        "data": (make_shards, of_shards, harm_shards, try_shards), "run": (make_run, of_run, harm_run, try_run)
    }[room]  # fmt: skip
    with empty_folder() as template:
        make(template)
        good = tell(template)
        print(trial(template, number, good))
