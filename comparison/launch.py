"""Training of many runs, checked before the first begins: some at a time, each a process that can be continued."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from comparison.arms import Entry
from comparison.live import Live
from comparison.matched import keep
from comparison.signals import signals
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
STOPPED = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 130)
"""Statuses of a process that was told to end."""


@dataclass(frozen=True)
class Started:
    """A run that trains now."""

    entry: Entry
    process: subprocess.Popen[bytes]
    log: Path
    since: float
    place: str | None
    """The device that it was given."""
    begin: int = 0
    """Bytes of the log that earlier starts have left."""

    def how(self, asked: bool) -> str:
        """How it has ended; asked: whether all were to end."""
        status = self.process.returncode
        if not self.entry.is_finished:
            # train.py ends with 0 once it has saved; told before it could listen, it is gone at once.
            return "stopped" if asked and (status == 0 or status in STOPPED) else "failed"
        if status and not (asked and status in STOPPED):  # its gate was not met, or its report could not be drawn
            return f"trained, ended with status {status} ({self.log})"
        return "trained"


def check_runs(entries: Sequence[Entry], places: Sequence[str | None] = ()) -> None:
    """Prepare the data of all that are not finished, and refuse, by its name, the first that could not be trained.

    places: the devices that were named for them.
    """
    check_places(places)
    opened: dict[str, Batches] = {}
    for config in (entry.config for entry in entries if not entry.is_finished):
        try:
            device = choose_device(config.device if not any(places) else "auto")
            build_mesh(config.parallel, config.all_row_ranks, World(), device)
            data = to_toml(config.data)
            batches = opened[data] = opened.get(data) or Batches(config.data, seed=config.seed)
            for step in config.stages.first_steps():
                batches.check(demand_of(step, batches))
                rows_of_step(config, step, 1)
            check_suite(config.evals, Materials(batches.tokenizer, batches.all_held_out(), device, nullcontext))
        except Refusal as refusal:
            raise Refusal(f"{config.name}: {refusal}") from None


def train_all(
    entries: Sequence[Entry], folder: Path, places: int | Sequence[str | None], say: Callable[[str], None]
) -> list[str]:
    """Train those that are not finished, one at each place at a time, none before the run it branches from is finished.

    folder: where each leaves its configuration, as `python train.py` takes it, and what it printed; places: how many
    at a time, or the device of each. Returns a line for each that failed, with its last words, and for those that wait
    for it; after that, as after Ctrl-C, the same call goes on. Raises KeyboardInterrupt once all that train have saved
    where a signal asked for the end, and Refusal where another process trains one of them.
    """
    refuse_trained_elsewhere(entries, folder)
    free: list[str | None] = [None] * places if isinstance(places, int) else list(places)
    waiting, jobs = [entry for entry in entries if not entry.is_finished], len(free)
    total, running, failed = len(waiting), list[Started](), list[Started]()
    folder.mkdir(parents=True, exist_ok=True)
    keep({f"{entry.base}/{entry.arm}": entry.found for entry in entries if entry.found}, folder)
    with Live(entries, jobs, say) as live, signals() as asked:
        try:
            told = 0
            while True:
                for started in (
                    running if len(asked) > told else ()
                ):  # it saves where it is; told twice, it ends at once
                    started.process.terminate()
                told = len(asked)
                ready = [entry for entry in waiting if _may_start(entry, entries)]
                for entry in ready[: 0 if asked else len(free)]:
                    waiting.remove(entry)
                    running.append(_start(entry, folder, jobs, free.pop(0)))
                if not running:
                    break
                time.sleep(PAUSE)
                for started in [each for each in running if each.process.poll() is not None]:
                    running.remove(started)
                    free.append(started.place)
                    how = started.how(bool(asked))
                    failed += [started] if how == "failed" else []
                    number, seconds = total - len(waiting) - len(running), time.monotonic() - started.since
                    live.say(f"[{number}/{total}] {started.entry.config.name}: {how} in {seconds:.0f} s")
                live.update(*({each.entry.config.name for each in group} for group in (running, failed)))
        finally:
            for started in running:
                started.process.wait()
    if asked:
        raise KeyboardInterrupt
    return [_last_words(started) for started in failed] + [
        f"{entry.config.name}: waits for the run that it branches from" for entry in waiting
    ]


def _last_words(failed: Started) -> str:
    said = failed.log.read_bytes()[failed.begin :].replace(b"\0", b"").decode(errors="replace")
    lines = said.strip().splitlines()[-LAST_LINES:] or ["nothing: it printed no word"]
    return "\n  ".join([f"{failed.entry.config.name}: did not finish; {failed.log} ends with", *lines])


def refuse_trained_elsewhere(entries: Sequence[Entry], folder: Path) -> None:
    """Raise Refusal for runs that other processes train: those of a comparison that was killed go on without it."""
    names = [entry.config.name for entry in entries if not entry.is_finished and _is_held(entry.folder)]
    if names:
        raise Refusal(
            f"{', '.join(names)}: trained by another process now, of this comparison started twice, or of one that was "
            f"killed, whose runs go on; wait until they end, or stop them (`ps x` shows each as train.py "
            f"{folder / names[0]}.toml), then start the same command again"
        )


def _is_held(folder: Path) -> bool:
    """Whether a process that trains in the folder has its lock."""
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _may_start(entry: Entry, entries: Sequence[Entry]) -> bool:
    """Whether the run that it branches from is there."""
    same = (other for other in entries if (other.base, other.seed, other.arm) == (entry.base, entry.seed, None))
    return entry.arm is None or all(origin.is_finished for origin in same)


def _start(entry: Entry, folder: Path, jobs: int, place: str | None) -> Started:
    name = entry.config.name
    config, log = folder / f"{name}.toml", folder / f"{name}.log"
    config.write_text(to_toml(entry.config), encoding="utf-8")
    words = [sys.executable, str(TRAIN), str(config)]
    if entry.config.threads is None:
        words.append(f"threads={max(1, (os.cpu_count() or 1) // jobs)}")
    words += [] if place is None else [f"device={place.partition(':')[0]}"]
    with log.open("ab") as file:  # what it said before stays
        begin = file.tell()
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=around(place), start_new_session=True
        )
    return Started(entry, process, log, time.monotonic(), place, begin)


def around(place: str | None) -> dict[str, str] | None:
    """The environment of a run on one device; None: that of this process.

    A GPU is shown to it alone, by its number among those that this process sees.
    """
    if place is None or not place.startswith("cuda:"):
        return None
    number, seen = int(place.removeprefix("cuda:")), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen is not None else None
    shown = str(number) if names is None else names[number] if number < len(names) else "-1"
    return {**os.environ, "CUDA_VISIBLE_DEVICES": shown}


def check_places(places: Sequence[str | None]) -> None:
    """Raises Refusal for a GPU that torch does not find."""
    count = torch.cuda.device_count() if any(place and place != "cpu" for place in places) else 0
    for place in places:
        if place and place != "cpu" and int(place.removeprefix("cuda:")) >= count:
            here = f"{count} GPU{'s' * (count != 1)}, cuda:0 and up" if count else "no NVIDIA GPU"
            raise Refusal(f"devices: {place!r}: torch finds {here} here; name others, or leave devices out")
