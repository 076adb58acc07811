"""A run that stands still: every rank that can writes down where it stands, and all of them end."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from run import watchdog as watchdog_module
from run.watchdog import Watchdog, WatchdogSettings
from tests.run.poison import TINY

ROOT = Path(__file__).parents[2]
LIMIT = 15
FAST = (f"watchdog.seconds={LIMIT}", "evals.every_tokens=6144", "checkpoint.every_steps=3", "trial=false")

STALL = """
import os, sys, time
import train
from run.config import load_config
from run.start import leave, refusing

whole, rank = train.take_step, int(os.environ.get("RANK", "0"))

def take_step(batches, step, run):
    if step.end_tokens == 5 * 512 and rank == {rank}:
        {what}
    return whole(batches, step, run)

train.take_step = take_step
leave(refusing(lambda: train.main(load_config(sys.argv[1], sys.argv[2:]))))
"""


def start(here: Path, rank: int, what: str, *overrides: str, ranks: int = 2) -> subprocess.Popen[str]:
    """A run of which one rank does something else at the fifth step."""
    (here / "stall.py").write_text(textwrap.dedent(STALL).format(rank=rank, what=what))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "stall.py", str(TINY), *FAST, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def told_by(process: subprocess.Popen[str]) -> str:
    """All that it says until it ends; what never ends is ended, and fails the test."""
    try:
        return process.communicate(timeout=300)[0]
    finally:
        process.kill()


def wait_for(what: Callable[[], bool], seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


@pytest.mark.distributed
def test_when_one_rank_sleeps_all_write_their_stacks_and_end(here: Path) -> None:
    process = start(here, 1, "time.sleep(3600)  # here it sleeps")
    said = told_by(process)
    assert process.returncode != 0
    stacks = {rank: (here / f"runs/tiny/stacks/rank_{rank}.txt").read_text() for rank in (0, 1)}
    assert all(text.startswith(f"rank {rank}: stood still for") for rank, text in stacks.items())
    assert all("in: the step after 2,048 tokens" in text for text in stacks.values())
    line = 1 + next(
        n for n, text in enumerate((here / "stall.py").read_text().splitlines()) if "here it sleeps" in text
    )
    assert f'stall.py", line {line} in take_step' in stacks[1], "the line that it hangs at"
    assert "all_reduce" in stacks[0] and 'stall.py", line' not in stacks[0].partition("take_step")[2].partition("\n")[0]
    assert "rank 0: stood still" in said and "runs/tiny/stacks/rank_0.txt" in said
    assert "exitcode  : 2" in said or "exitcode: 2" in said, said


@pytest.mark.distributed
def test_a_stopped_process_cannot_speak_but_the_others_do(here: Path) -> None:
    process = start(here, 1, "print('pid', os.getpid(), flush=True); time.sleep(1); os.kill(os.getpid(), 19)")
    assert process.stdout is not None
    pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid "))
    wait_for((here / "runs/tiny/stacks/rank_0.txt").exists)
    os.kill(pid, signal.SIGKILL)  # torchrun would do it, after half a minute
    told_by(process)
    assert process.returncode != 0 and not (here / "runs/tiny/stacks/rank_1.txt").exists()


@pytest.mark.distributed
def test_a_rank_that_dies_ends_the_others(here: Path) -> None:
    process = start(here, 1, "os.kill(os.getpid(), 9)", "watchdog.seconds=0")
    said = told_by(process)  # not torch's half an hour
    assert process.returncode != 0 and "SIGKILL" in said


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("time.sleep(3600)", 2),
        # C code that keeps the interpreter: no thread of Python's runs any more.
        ("import ctypes; ctypes.PyDLL(None).sleep(3600)", 1),
    ],
)
def test_one_process_ends_itself_whoever_holds_the_interpreter(here: Path, what: str, status: int) -> None:
    process = start(here, 0, what, ranks=1)
    said = told_by(process)
    assert process.returncode == status, said
    stacks = (here / "runs/tiny/stacks/rank_0.txt").read_text() if status == 2 else said
    assert "stall.py" in stacks and "take_step" in stacks


class Ended(BaseException):
    pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be turned by hand; the end of the process is an exception."""
    now = [0.0]

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(watchdog_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog_module.time, "sleep", lambda _: None)
    monkeypatch.setattr(watchdog_module.os, "_exit", end)
    return now


def test_whoever_goes_on_is_left_alone(tmp_path: Path, clock: list[float]) -> None:
    dog = Watchdog(WatchdogSettings(seconds=10, slow_seconds=100))
    dog._folder = tmp_path
    clock[0] = 99
    assert dog.look() == 1, "the start may be slow"
    dog.at("a step")
    clock[0] += 9
    assert dog.look() == 1
    dog.beat()
    clock[0] += 9
    assert dog.look() == 1
    dog.at("a checkpoint", is_slow=True)
    clock[0] += 90
    assert dog.look() == 10
    dog.at("a step")
    clock[0] += 11
    with pytest.raises(Ended, match="2"):
        dog.look()
    assert (tmp_path / "stacks/rank_0.txt").read_text().startswith("rank 0: stood still for 11 s in: a step\n")


def test_every_forward_pass_of_an_evaluation_is_a_beat(clock: list[float]) -> None:
    dog, model = Watchdog(WatchdogSettings(seconds=10)), nn.Linear(1, 1)
    dog.at("an evaluation")
    with dog.following(model):
        for _ in range(5):
            clock[0] += 9
            model(next(model.parameters()))
            assert dog.look() == 10
    clock[0] += 9
    model(next(model.parameters()))
    assert dog.look() == 1, "and nothing is left on the model"


def test_a_full_disk_does_not_keep_it(tmp_path: Path, clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    dog = Watchdog(WatchdogSettings(seconds=10), rank=3)
    dog.at("a step")
    (tmp_path / "stacks").write_text("no folder")
    dog._folder = tmp_path
    clock[0] += 20
    with pytest.raises(Ended, match="2"):
        dog.look()
    assert "rank 3: stood still for 20 s in: a step; its stacks could not be written" in capfd.readouterr().err


def test_a_run_that_is_forgotten_is_not_watched(tmp_path: Path) -> None:
    dog = Watchdog(WatchdogSettings(seconds=0.5))
    dog.start(tmp_path)
    thread = dog._thread
    assert thread is not None and thread.is_alive()
    gone = weakref.ref(dog)
    del dog
    gc.collect()
    assert gone() is None
    thread.join(60)
    assert not thread.is_alive()


def test_nobody_looks_where_it_is_off(tmp_path: Path) -> None:
    before = watchdog_module.threading.active_count()
    Watchdog(WatchdogSettings(seconds=0)).start(tmp_path)
    assert watchdog_module.threading.active_count() == before
    assert WatchdogSettings(seconds=0).timeout is None
    timeout = WatchdogSettings(seconds=7, slow_seconds=100).timeout
    assert timeout is not None and timeout.total_seconds() > 130, "later than the slowest, and than its grace"


def test_patience_ends_with_what_needs_it(tmp_path: Path, clock: list[float]) -> None:
    dog = Watchdog(WatchdogSettings(seconds=10, slow_seconds=100))
    dog._folder = tmp_path
    dog.at("a step")
    with pytest.raises(KeyError), dog.slow("an evaluation"):
        clock[0] += 50
        assert dog.look() == 50
        raise KeyError
    assert dog.look() == 10
    clock[0] += 11
    with pytest.raises(Ended):
        dog.look()
