"""Training of many runs, checked before the first begins: some at a time, each a process that can be continued."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from comparison.arms import Entry
from data.batches import Batches
from evals.scoring import Materials
from evals.suite import check_suite
from parallel.mesh import build_mesh
from parallel.world import World
from run.config import rows_of_step
from run.demand import demand_of
from run.start import choose_device
from settings import Refusal, to_toml

TRAIN = Path(__file__).parents[1] / "train.py"
PAUSE = 0.1
"""Seconds between two looks at the runs."""
LAST_LINES = 6
"""Of what a run that failed has printed, that are said again."""


@dataclass(frozen=True)
class Started:
    """A run that trains now."""

    entry: Entry
    process: subprocess.Popen[bytes]
    log: Path
    since: float


def check_runs(entries: Sequence[Entry]) -> None:
    """Prepare the data of all that are not finished, and refuse, by its name, the first that could not be trained."""
    opened: dict[str, Batches] = {}
    for config in (entry.config for entry in entries if not entry.is_finished):
        try:
            device = choose_device(config.device)
            build_mesh(config.parallel, config.all_row_ranks, World(), device)
            data = to_toml(config.data)
            batches = opened[data] = opened.get(data) or Batches(config.data, seed=config.seed)
            for step in config.stages.first_steps():
                batches.check(demand_of(step, batches))
                rows_of_step(config, step, 1)
            check_suite(config.evals, Materials(batches.tokenizer, batches.all_held_out(), device, nullcontext))
        except Refusal as refusal:
            raise Refusal(f"{config.name}: {refusal}") from None


def train_all(entries: Sequence[Entry], folder: Path, jobs: int, say: Callable[[str], None]) -> list[str]:
    """Train those that are not finished, `jobs` at a time, none before the run it branches from is finished.

    folder: where each leaves its configuration, as `python train.py` takes it, and what it printed. Returns a line for
    each that failed, with its last words, and for those that wait for it; after that, as after Ctrl-C, the same call
    goes on.
    """
    waiting = [entry for entry in entries if not entry.is_finished]
    total, running, failed = len(waiting), list[Started](), list[Started]()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        while True:
            ready = [entry for entry in waiting if _may_start(entry, entries)]
            for entry in ready[: jobs - len(running)]:
                waiting.remove(entry)
                running.append(_start(entry, folder, jobs))
            if not running:
                break
            time.sleep(PAUSE)
            for started in [each for each in running if each.process.poll() is not None]:
                running.remove(started)
                status, how = started.process.returncode, "trained"
                if not started.entry.is_finished:
                    failed.append(started)
                    how = "failed"
                elif status:  # all is there: its gate was not met, or its report could not be drawn
                    how = f"trained, ended with status {status} ({started.log})"
                number, seconds = total - len(waiting) - len(running), time.monotonic() - started.since
                say(f"[{number}/{total}] {started.entry.config.name}: {how} in {seconds:.0f} s")
    finally:
        # Ctrl-C has reached them as well: they save where they are.
        for started in running:
            started.process.wait()
    return [_last_words(started) for started in failed] + [
        f"{entry.config.name}: waits for the run that it branches from" for entry in waiting
    ]


def _last_words(failed: Started) -> str:
    lines = failed.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
    return "\n  ".join([f"{failed.entry.config.name}: did not finish; {failed.log} ends with", *lines])


def _may_start(entry: Entry, entries: Sequence[Entry]) -> bool:
    """Whether the run that it branches from is there."""
    same = (other for other in entries if (other.base, other.seed, other.arm) == (entry.base, entry.seed, None))
    return entry.arm is None or all(origin.is_finished for origin in same)


def _start(entry: Entry, folder: Path, jobs: int) -> Started:
    name = entry.config.name
    config, log = folder / f"{name}.toml", folder / f"{name}.log"
    config.write_text(to_toml(entry.config), encoding="utf-8")
    words = [sys.executable, str(TRAIN), str(config)]
    if entry.config.threads is None:
        words.append(f"threads={max(1, (os.cpu_count() or 1) // jobs)}")
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    return Started(entry, process, log, time.monotonic())
