"""How long a step of a run takes on the device that is here: a few of them trained for it, by train.py itself.

A plan knows of a CPU, or of a GPU whose shares nobody measured, one speed for everything: planned seconds are then
operations by another name. Timed steps say what each arm really reaches.
"""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from comparison.signals import signals
from planning.device import Device, this_device
from run.config import RunConfig
from run.folder import RUNS
from run.metrics import read_rows
from run.start import choose_device, choose_dtype
from settings import Refusal, Table, to_toml, validate

TRAIN = Path(__file__).parents[1] / "train.py"
STEPS = 8
"""Of each stage that are trained."""
WARM = 2
"""The first of these, which are not counted."""
LAST_LINES = 6
PAUSE = 0.1
"""Seconds between two looks at the run."""
GRACE = 20.0
"""Seconds that a run which is told to end has for it."""


def device_for(config: RunConfig) -> Device:
    """The device that the run would take here, its product measured once."""
    return _device(config.device, config.precision)


@cache
def _device(name: str, precision: str) -> Device:
    device = choose_device(name)
    return this_device(device, choose_dtype(precision, device))


def time_steps(config: RunConfig, threads: int | None = None) -> list[float]:
    """The median seconds of a step in each stage, trained alone in a folder of its own that is removed again.

    threads: where the run does not say it. Raises Refusal, with its last words, where it could not be trained, and
    KeyboardInterrupt, with nothing left of it, where a signal asked for the end.
    """
    short = shortened(config)
    folder = RUNS / short.name
    path = folder.with_suffix(".clock.toml")
    words = [sys.executable, str(TRAIN), str(path)]
    words += [f"threads={threads}"] if threads is not None and config.threads is None else []
    with signals() as asked:
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
            folder.mkdir(parents=True)
            path.write_text(to_toml(short), encoding="utf-8")
            status, said = _ended(words, asked)
            rows = [] if asked or status else read_rows(folder / "metrics.jsonl")
        finally:
            path.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
    if asked:
        raise KeyboardInterrupt
    if status:
        last = "\n  ".join(said.strip().splitlines()[-LAST_LINES:])
        raise Refusal(f"{config.name}: its steps could not be timed:\n  {last}")
    return [_median(rows, stage.index, stage.tokens_per_step) for stage in config.stages]


def _ended(words: Sequence[str], asked: Sequence[int]) -> tuple[int, str]:
    """Status and output of a process in a session of its own; where a signal is heard first, it is told to end."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not asked and process.poll() is None:
                time.sleep(PAUSE)
        finally:
            _end(process)
        said.seek(0)
        return process.returncode, said.read().decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Where it has not ended: ask it to, and wait no longer than it may take."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _median(rows: Sequence[dict[str, float]], stage: int, tokens: int) -> float:
    seconds = [tokens / row["tokens_per_second"] for row in rows if row["stage"] == stage and row["tokens_per_second"]]
    return statistics.median(seconds[min(WARM, len(seconds) - 1) :])


def shortened(config: RunConfig) -> RunConfig:
    """The run with a few steps in each stage, which asks nothing: rows of each stage's own length from its first on."""
    table: Table = tomllib.loads(to_toml(config))
    until = 0
    for stage, own in zip(config.stages, table["context"]["stages"], strict=True):
        until += STEPS * stage.tokens_per_step
        own["until_tokens"] = until
        for key in ("learning_rate", "gate", "growth"):
            own.pop(key, None)
    for key in ("evals", "profile", "branch"):
        table.pop(key, None)
    schedule = {"kind": "constant"}
    table |= {"name": f"{config.name}.clock", "total_tokens": until, "trial": False}
    table |= {"log": {"every_steps": 1, "tensorboard": False}, "optimizer": table["optimizer"] | {"schedule": schedule}}
    table["checkpoint"] = {"every_steps": 10**9}
    return validate(table, RunConfig, f"{config.name}, to be timed")
