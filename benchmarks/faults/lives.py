"""One life of a run: a start of `train.py` on one or several ranks, watched, and ended at will.

Importing torch takes far longer than training here. A warm life is therefore forked from this process, which has all
modules in memory, and then runs train.py as the command line does, with the environment that torchrun would give its
ranks. A cold life is the command itself, `python train.py` or `torchrun`.
"""

import contextlib
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("run.toml")
NAME = "faults"
PATIENCE = 900.0
"""Seconds until a life that has not ended counts as one that hangs: more than a run's own watchdog gives it, which then
says where it stood."""


@dataclass(frozen=True)
class Start:
    """How a run is started: where, on how many ranks, with which keys of its configuration in place of run.toml's."""

    folder: Path
    ranks: int = 1
    overrides: tuple[str, ...] = ()
    is_cold: bool = False
    torchrun: tuple[str, ...] = ()
    """Options of torchrun, of a cold start on several ranks."""
    prepare: Callable[[], None] | None = None
    """What a rank of a warm life does before it runs train.py: where faults come in that no signal can bring."""
    root: Path = ROOT

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "runs" / NAME

    @property
    def words(self) -> list[str]:
        """What stands behind `train.py` on the command line."""
        return [str(CONFIG), f"data.sources.words.path={self.text}", *self.overrides]

    def command(self) -> list[str]:
        """What a cold start runs."""
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks)]
        launcher += ["--master-port", str(free_port()), *self.torchrun]
        return [sys.executable, *(launcher if self.ranks > 1 else []), str(self.root / "train.py"), *self.words]

    @property
    def text(self) -> Path:
        """The text of run.toml: beside the folder, so that all runs of one campaign read the same file."""
        return self.folder.parent / "words.txt"

    def at(self, folder: Path) -> "Start":
        """The same start in another folder."""
        return replace(self, folder=folder)

    def prepared(self, prepare: Callable[[], None]) -> "Start":
        """The same, with this done in each rank first."""
        return replace(self, prepare=prepare)

    def with_keys(self, *overrides: str) -> "Start":
        """The same with these keys of the configuration too."""
        return replace(self, overrides=(*self.overrides, *overrides))

    def cold(self, *torchrun: str, root: Path = ROOT) -> "Start":
        """The same by the command line, with these options of torchrun, from this copy of the project."""
        return replace(self, is_cold=True, torchrun=torchrun, root=root)


class Life:
    """Processes that train; `with` sees to it that none of them outlives the block."""

    def __init__(self, start: Start, log: Path | None = None) -> None:
        self.start = start
        self._log = log or start.folder.with_suffix(".log")
        self._ranks: list[BaseProcess] = []
        self.command: subprocess.Popen[bytes] | None = None
        self._log.write_bytes(b"")
        if start.is_cold:
            self.command = _start_cold(start, self._log)
        else:
            self._ranks = [_fork(start, rank, port, self._log) for port in [free_port()] for rank in range(start.ranks)]

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def said(self) -> str:
        """All that its ranks have written so far, errors included."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def statuses(self) -> list[int | None]:
        """The exit status of each rank, as the shell of a warm life would see it, or of the command of a cold one."""
        return [self.command.poll()] if self.command is not None else [rank.exitcode for rank in self._ranks]

    def is_over(self) -> bool:
        return None not in self.statuses()

    def wait(self, seconds: float = PATIENCE) -> list[int | None]:
        """The exit statuses once all have ended; None for those that have not within these seconds."""
        self.wait_for(lambda: False, seconds)
        return self.statuses()

    def wait_for(self, has_come: Callable[[], bool], seconds: float = PATIENCE) -> bool | None:
        """Whether something came before the life was over; None when neither has in these seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if has_come():
                return True
            if self.is_over():
                return has_come()
            time.sleep(0.001)
        return None

    def pids(self) -> list[int]:
        """The living ranks, in their order; those of torchrun are its children, oldest first."""
        if self.command is None:
            return [rank.pid for rank in self._ranks if rank.pid is not None and rank.exitcode is None]
        if self.command.poll() is not None:
            return []
        return sorted(children(self.command.pid)) if self.start.ranks > 1 else [self.command.pid]

    def send(self, number: int, *pids: int) -> None:
        """Send a signal to these processes, one right after the other; to the ranks when none are named."""
        for pid in pids or self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL to all at once, as when the machine fails; returns when they are gone."""
        command = [self.command.pid] if self.command is not None and self.command.poll() is None else []
        self.send(signal.SIGKILL, *command, *self.pids(), *(p for pid in command for p in children(pid)))
        for rank in self._ranks:
            rank.join()
        if self.command is not None:
            self.command.wait()
            self.command.communicate()


def children(pid: int) -> list[int]:
    """The processes that this one has started (Linux)."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def warm_up() -> None:
    """Load what a run loads, once, so that forked lives start at once. Computes nothing: threads survive no fork."""
    sys.path.insert(0, str(ROOT))
    import matplotlib.figure
    import torch._dynamo

    import evals.terminal
    import run.report
    import train

    assert all((matplotlib.figure, torch._dynamo, evals.terminal, run.report, train))


def new_place(above: Path, name: str) -> Path:
    """A new folder to train in, with the text of run.toml beside it."""
    folder = above / name
    folder.mkdir(parents=True)
    if not (above / "words.txt").exists():
        (above / "words.txt").write_text(text())
    return folder


def known(override: str) -> tuple[str, ...]:
    """A key of the configuration with its value, where this version of the project has the section."""
    from run.config import RunConfig

    return (override,) if override.partition(".")[0] in RunConfig.model_fields else ()


@contextlib.contextmanager
def place(above: Path, name: str) -> Iterator[Path]:
    """A new folder to train in, gone afterwards."""
    folder = new_place(above, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def text() -> str:
    """Fifty words in an order that a linear congruence draws: the same everywhere and for ever."""
    state, words = 1, []
    for _ in range(12_000):
        state = state * 1_103_515_245 + 12_345 & 0x7FFFFFFF
        words.append("bcdfghjklm"[state >> 16 & 7] + "aeiou"[(state >> 20) % 5] * (1 + (state >> 24 & 1)))
    return "\n\n".join(" ".join(words[at : at + 300]) for at in range(0, len(words), 300))


def _start_cold(start: Start, log: Path) -> "subprocess.Popen[bytes]":
    command = start.command()
    environment = {**os.environ, "PYTHONPATH": str(start.root), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=start.folder, env=environment, stdout=file, stderr=file)


def _fork(start: Start, rank: int, port: int, log: Path) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_train, args=(start, rank, port, log))
    process.start()
    return process


def _train(start: Start, rank: int, port: int, log: Path) -> None:
    """What a forked rank does: become what the command line would have started, and run train.py."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(start.folder)
    if start.ranks > 1:
        size = str(start.ranks)
        os.environ.update(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if start.prepare is not None:
        start.prepare()
    sys.argv = ["train.py", *start.words]
    runpy.run_path(str(start.root / "train.py"), run_name="__main__")
    sys.stdout.flush()


def succeeded(statuses: Sequence[int | None]) -> bool:
    return all(status == 0 for status in statuses)


def last_lines(said: str, count: int = 12) -> str:
    return "\n".join(said.splitlines()[-count:])
