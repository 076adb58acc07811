"""Cases tried in forked processes, each under limits of its own: what was said, what it ended with, what it left."""

import contextlib
import json
import os
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
CPU_SECONDS = 60.0
"""Of one case: a hang. Of the processor's own time, so that a busy machine does not matter."""
WALL_SECONDS = 120.0
"""Of one case that waits for something."""
MEMORY = 4 << 30
"""Bytes beyond what the process has when it is forked."""


class Hung(BaseException):
    """A case takes longer than anything in it should."""


class Arrived(BaseException):
    """A start came as far as was asked: nothing is left that could be refused before."""


@dataclass
class Outcome:
    """What came of one case."""

    status: int | str
    """The exit status, or "arrived", "hung", "died" or the exception that nothing caught."""
    out: str = ""
    err: str = ""
    left: list[str] = field(default_factory=list)
    """Files and folders that were not there before."""
    found: list[str] = field(default_factory=list)
    """What is wrong with all this, in words."""
    good: dict[str, str] = field(default_factory=dict)
    """Of a template: what is made of it undamaged."""


Try = Callable[[int], Outcome]


def try_all(trial: Try, numbers: Sequence[int]) -> dict[int, Outcome]:
    """The outcome of each number, tried in a fork of this process; one that dies is left behind by name."""
    outcomes: dict[int, Outcome] = {}
    while waiting := [number for number in numbers if number not in outcomes]:
        with tempfile.TemporaryDirectory() as folder:
            notes = Path(folder) / "notes"
            notes.touch()
            pid = os.fork()
            if not pid:
                _be_a_child(trial, waiting, notes)
            _, status = os.waitpid(pid, 0)
            told = [json.loads(line) for line in notes.read_text().splitlines()]
        outcomes |= {note["number"]: Outcome(**note["outcome"]) for note in told}
        if len(told) < len(waiting):
            number = waiting[len(told)]
            outcomes[number] = Outcome("died", found=[f"the process died with wait status {status}"])
    return outcomes


def _be_a_child(trial: Try, numbers: Sequence[int], notes: Path) -> NoReturn:
    try:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        with notes.open("a") as file:
            for number in numbers:
                file.write(json.dumps({"number": number, "outcome": asdict(trial(number))}) + "\n")
                file.flush()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """A folder of its own to stand in."""
    before = Path.cwd()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def command(script: str, words: Sequence[str]) -> Outcome:
    """`python SCRIPT WORDS`, or `python -m ROOM WORDS`, inside this process: the same entry, its own output."""
    before = listed(Path.cwd())
    with tempfile.TemporaryDirectory() as aside:
        texts = [Path(aside) / "out", Path(aside) / "err"]
        with said_to(*texts), limited():
            status = _run(script, words)
        out, err = (text.read_text(encoding="utf-8", errors="replace") for text in texts)
    return Outcome(status, out, err, sorted(listed(Path.cwd()) - before))


def _run(script: str, words: Sequence[str]) -> int | str:
    path = str(ROOT / script)
    sys.argv = [path, *words]
    try:
        if script.endswith(".py"):
            runpy.run_path(path, run_name="__main__")
        else:
            sys.modules.pop(f"{script}.__main__", None)
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except Arrived:
        return "arrived"
    except Hung:
        traceback.print_exc()
        return "hung"
    except BaseException as error:
        traceback.print_exc()
        return type(error).__name__
    return 0


@contextlib.contextmanager
def said_to(out: Path, err: Path) -> Iterator[None]:
    """What is written to the standard streams, by C too, goes to files."""
    kept, streams = [os.dup(1), os.dup(2)], (sys.stdout, sys.stderr)
    with out.open("wb") as out_file, err.open("wb") as err_file:
        os.dup2(out_file.fileno(), 1)
        os.dup2(err_file.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (closed with the process)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = streams
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise Hung in what takes too long."""

    def stop(*_: Any) -> None:
        raise Hung

    handlers: list[tuple[int, Any]] = [
        (number, signal.signal(number, stop)) for number in (signal.SIGPROF, signal.SIGALRM)
    ]
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers:
            signal.signal(number, handler)


def listed(folder: Path) -> set[str]:
    """The paths of all that lies in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
