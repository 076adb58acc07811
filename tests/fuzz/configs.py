"""One damaged configuration, tried: shown, shown again, suggestions taken, and started as far as the first weights."""

import os
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from data.corpus import text_documents
from run.config import RunConfig, load_config
from settings import Refusal
from tests.fuzz.mutations import Case, case, places
from tests.fuzz.schema import names
from tests.fuzz.suggestions import blames, suggestions
from tests.fuzz.trials import Arrived, Outcome, command, empty_folder
from tests.fuzz.verdicts import wrong_with
from tests.words import write_words


def try_made(made: Case) -> Outcome:
    """Show it; where that goes well show what was shown, and start it, else take what the refusal suggests."""
    with empty_folder():
        lay_out(made)
        if made.door == "compare":
            return judged(made, command("compare.py", [*made.words, "--show"]))
        shown = judged(made, command("train.py", [*made.words, "--show"]))
        if shown.found or shown.status == 2:
            shown.found += wrong_suggestions(made, shown.err) if made.is_single else []
            return shown
        shown.found += shown_again(made, shown.out)
        return shown if shown.found else judged(made, started(made))


def lay_out(made: Case) -> None:
    """Write the case's files where we stand, and a text to train on."""
    write_words(Path.cwd())
    for name, content in made.files.items():
        Path(name).write_bytes(content)
    for name, target in made.links.items():
        os.mkfifo(name) if target == "|" else Path(name).symlink_to(target)


def judged(made: Case, outcome: Outcome) -> Outcome:
    outcome.found += wrong_with(outcome, known() | keys_of(made))
    return outcome


@cache
def known() -> set[str]:
    """The keys of the schema, and those that are gone once a file is read."""
    of_comparisons = {"above", "below", "bases", "arms", "only", "seeds", "claims", "small"}
    return {*names(RunConfig), "scale", "extends", *of_comparisons}


def keys_of(made: Case) -> set[str]:
    """The keys that were written, whatever they are."""
    found = {part for word in made.words if "=" in word for part in word.partition("=")[0].split(".")}
    for content in made.files.values():
        try:
            keys = [str(path[-1]) for path in places(tomllib.loads(content.decode().replace("\r", "\n")))]
        except (ValueError, RecursionError):
            continue
        found |= {part for key in keys for part in (key, *key.split("."))}
    return found


def shown_again(made: Case, text: str) -> list[str]:
    """What --show prints is a configuration: the same one."""
    Path("shown.toml").write_text(text, encoding="utf-8")
    try:
        config, back = load_config(made.words[0], made.words[1:]), load_config("shown.toml", [])
    except Refusal as refusal:
        return [f"what is shown does not load: {refusal}"]
    finally:
        Path("shown.toml").unlink()
    return [] if back == config else ["what is shown loads to something else"]


def wrong_suggestions(made: Case, message: str) -> list[str]:
    """Those of a refusal's suggestions whose key is blamed once more when they are taken; of a case with one fault."""
    found = []
    for suggestion in suggestions(message):
        try:
            load_config(made.words[0], [*made.words[1:], suggestion])
        except Refusal as refusal:
            if blames(str(refusal), suggestion.partition("=")[0]):
                found.append(f"{message[:300]!r} suggests {suggestion}, and then: {str(refusal)[:300]}")
    return found


def started(made: Case) -> Outcome:
    """Start it, on as many ranks as it is for, up to where weights would be drawn: all of this is to refuse in time."""
    config = load_config(made.words[0], made.words[1:])
    outside = [path for path in reads(config) if not Path(path).resolve().is_relative_to(Path.cwd())]
    if outside:  # it would read or fill what is not ours
        return Outcome(0)
    with as_if_started(made.ranks):
        outcome = command("train.py", made.words)
    prepared = os.path.normpath(config.data.prepared)
    outcome.left = [path for path in outcome.left if not path.startswith(prepared.split(os.sep)[0])]
    torch.set_num_threads(1)
    return outcome


def reads(config: RunConfig) -> Iterator[str]:
    """The paths that a start reads, or prepares data in."""
    yield config.data.prepared
    for source in config.data.sources.values():
        yield getattr(source, "path", "")


@contextmanager
def as_if_started(ranks: int) -> Iterator[None]:
    """As torchrun starts the first of so many ranks, which all agree and send nothing; local code is a short text."""
    init = dist.init_process_group

    def init_alone(_backend: str, **_: object) -> None:
        init("fake", rank=0, world_size=ranks, store=FakeStore())

    def arrive(*_: object, **__: object) -> None:
        raise Arrived

    environment = {"WORLD_SIZE": str(ranks), "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(ranks)}

    def leave(status: int) -> None:
        sys.exit(status)

    with ExitStack() as stack:
        stack.enter_context(patch("run.start.leave", leave))
        stack.enter_context(patch.dict(os.environ, environment if ranks > 1 else {}))
        stack.enter_context(patch("torch.distributed.init_process_group", init_alone))
        stack.enter_context(patch("torch.nn.Module.to_empty", arrive))
        stack.enter_context(patch("data.sources.local_python", lambda: text_documents("words.txt")))
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    chosen = case(int(sys.argv[1]))
    print(
        chosen.label,
        chosen.done,
        chosen.words,
        *(content.decode(errors="replace") for content in chosen.files.values()),
    )
    print(try_made(chosen))
