"""Signals that ask for the end, heard in place of their effect while processes of ours run."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signals() -> Iterator[list[int]]:
    """Signals that ask this process to end, as they come, in place of their effect.

    Runs stand in sessions of their own, so that each is told of them once, whoever was meant: a terminal and `timeout`
    signal a whole group, a scheduler or a script one process.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone may watch for them
        yield asked
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
