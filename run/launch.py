"""Training of many runs, some at a time, each a process of its own that can be stopped and continued."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from run.arms import Entry
from settings import Refusal, to_toml

TRAIN = Path(__file__).parents[1] / "train.py"
PAUSE = 0.1
"""Seconds between two looks at the runs."""


@dataclass(frozen=True)
class Started:
    """A run that trains now."""

    entry: Entry
    process: subprocess.Popen[bytes]
    log: Path
    since: float


def train_all(entries: Sequence[Entry], folder: Path, jobs: int, say: Callable[[str], None]) -> None:
    """Train those that are not finished, `jobs` at a time, none before the run it branches from is finished.

    folder: where each leaves its configuration, as `python train.py` takes it, and what it printed. Raises Refusal
    when one of them fails, once those that train beside it are done; then, as after Ctrl-C, the same command goes on.
    """
    waiting = [entry for entry in entries if not entry.is_finished]
    total, running, failed = len(waiting), list[Started](), list[Started]()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        while running or (waiting and not failed):
            ready = [entry for entry in waiting if _may_start(entry, entries)]
            for entry in ready[: 0 if failed else jobs - len(running)]:
                waiting.remove(entry)
                running.append(_start(entry, folder, jobs))
            time.sleep(PAUSE)
            for started in [each for each in running if each.process.poll() is not None]:
                running.remove(started)
                if started.process.returncode or not started.entry.is_finished:
                    failed.append(started)
                number, seconds = total - len(waiting) - len(running), time.monotonic() - started.since
                how = "failed" if started in failed else "trained"
                say(f"[{number}/{total}] {started.entry.config.name}: {how} in {seconds:.0f} s")
    finally:
        # Ctrl-C has reached them as well: they save where they are.
        for started in running:
            started.process.wait()
    if failed:
        last = failed[0].log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-8:]
        raise Refusal("\n  ".join([f"{failed[0].entry.config.name}: did not finish; {failed[0].log} ends with", *last]))


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
