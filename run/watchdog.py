"""A run that stands still ends by itself: each rank writes down where it stands, and leaves.

A collective that waits for a rank that will never come holds the main thread in C, where no exception reaches it. So a
thread of its own looks at the clock, and ends the process without asking anybody.
"""

import faulthandler
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from pydantic import Field
from torch import nn

from settings import Section

STATUS, THREAD = 2, "watchdog"
MOST_GRACE = 30.0
"""Seconds that a rank stays for others to write their stacks: when one process ends, torchrun ends the rest."""


class WatchdogSettings(Section):
    """How long a rank may stand still."""

    seconds: float = Field(default=600.0, ge=0, le=1e8)
    """A rank that has begun no forward pass and no step for so long writes its stacks down and ends with status 2.
    0: nobody looks."""
    slow_seconds: float = Field(default=3600.0, gt=0, le=1e8)
    """The same for what cannot say how far it is: the start, a checkpoint, waiting for other ranks in an evaluation."""

    @property
    def timeout(self) -> timedelta | None:
        """For process groups: late enough that the watchdog speaks first; None: torch's own."""
        seconds = max(self.seconds, self.slow_seconds) + 2 * MOST_GRACE
        return timedelta(seconds=seconds) if self.seconds else None


class Watchdog:
    """Ends this process when it has not gone on for too long. Without `start` it only listens."""

    def __init__(self, settings: WatchdogSettings | None = None, rank: int = 0) -> None:
        self.settings, self.rank = settings or WatchdogSettings(), rank
        self._doing, self._limit, self._since = "start", self.settings.slow_seconds, time.monotonic()
        self._folder = Path()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, folder: Path) -> None:
        """From here on somebody looks. folder: the run's; stacks are written to its stacks/rank_<n>.txt."""
        self._folder = folder
        if self.settings.seconds:
            # By a weak reference: a run that was broken off and forgotten is not watched any more.
            arguments = (weakref.ref(self), self._stopped)
            self._thread = threading.Thread(target=_watch, args=arguments, daemon=True, name=THREAD)
            self._thread.start()

    def stop(self) -> None:
        """Nobody looks any more."""
        self._stopped.set()

    def at(self, doing: str, *, is_slow: bool = False) -> None:
        """The run has come to something new. is_slow: it takes `slow_seconds`, as it cannot say how far it is."""
        self._go_on(doing, self.settings.slow_seconds if is_slow else self.settings.seconds)

    @contextmanager
    def slow(self, doing: str) -> Iterator[None]:
        """Inside, the run does something that takes `slow_seconds`; afterwards what it did before."""
        before = self._doing, self._limit
        self.at(doing, is_slow=True)
        try:
            yield
        finally:
            self._go_on(*before)

    def _go_on(self, doing: str, limit: float) -> None:
        self._doing, self._limit = doing, limit
        self.beat()
        if self._is_watched:
            self.arm(limit)

    def arm(self, left: float) -> None:
        """Should C code keep the interpreter to itself, no thread of Python's can look: then faulthandler's own, which
        needs no interpreter, writes to the terminal and ends the process with status 1, some time after `left`."""
        spare = 2 * _grace(self._limit) + self._limit / 10
        faulthandler.dump_traceback_later(left + spare, exit=True, file=sys.__stderr__ or 2)

    @property
    def _is_watched(self) -> bool:
        return self._thread is not None and not self._stopped.is_set()

    def beat(self) -> None:
        """The run goes on with what it does."""
        self._since = time.monotonic()

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Inside, every forward pass of a model is a beat."""
        hook = model.register_forward_pre_hook(lambda *_: self.beat())
        try:
            yield
        finally:
            hook.remove()

    def look(self) -> float:
        """Seconds that are left; where there are none, this is the end of the process."""
        limit, stood = self._limit, time.monotonic() - self._since
        if stood > limit:
            self._end(stood)
        return limit - stood

    def _end(self, stood: float) -> None:
        path = self._folder / "stacks" / f"rank_{self.rank}.txt"
        head = f"rank {self.rank}: stood still for {stood:.0f} s in: {self._doing}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                print(head, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"its stacks are in {path}"
        except OSError as error:  # the disk may be what hangs, or is full
            where = f"its stacks could not be written to {path}: {error.strerror}"
        print(
            f"{head}; {where}. The rank to look for is the one whose stack waits for no other; the same command goes on"
            " from the last checkpoint (watchdog.seconds, watchdog.slow_seconds)",
            file=sys.__stderr__,
            flush=True,
        )
        time.sleep(_grace(self._limit))
        os._exit(STATUS)


def _watch(watchdog: "weakref.ref[Watchdog]", stopped: threading.Event) -> None:
    while True:
        one = watchdog()
        if one is None or stopped.is_set():
            faulthandler.cancel_dump_traceback_later()
            return
        one.arm(one.look())
        period = min(5.0, one.settings.seconds / 10)
        del one
        stopped.wait(period)


def _grace(limit: float) -> float:
    return min(MOST_GRACE, limit / 4)
