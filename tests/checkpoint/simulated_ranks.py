"""Many ranks in one process, each a thread: what they say and send goes over tables instead of a network."""

import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import checkpoint.checkpoints
from checkpoint.peers import Peers
from parallel.world import World

SECONDS = 20
"""No rank ever waits so long for another one."""


class Tables:
    """What the ranks of one world share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.words: list[Any] = [None] * size
        self.all_said = threading.Barrier(size, timeout=SECONDS)
        self._post: dict[tuple[int, int, int], queue.Queue] = {}

    def box(self, sender: int, receiver: int, tag: int) -> queue.Queue:
        """What one rank sends another under a tag; `setdefault` is atomic: both of them may be the first to ask."""
        return self._post.setdefault((sender, receiver, tag), queue.Queue())


class Parcel:
    def __init__(self, fetch: Callable[[], object]) -> None:
        self.wait = fetch


class SimulatedPeers(Peers):
    def __init__(self, world: World, tables: Tables) -> None:
        self.rank, self.size, self.tables = world.rank, world.size, tables

    def tell(self, words: Any) -> list[Any]:
        self.tables.words[self.rank] = json.dumps(words)
        self.tables.all_said.wait()
        answers = [json.loads(said) for said in self.tables.words]
        self.tables.all_said.wait()
        return answers

    def send(self, tensor: Tensor, rank: int, tag: int) -> Parcel:
        assert tensor.dtype == torch.uint8 and tensor.numel()
        self.tables.box(self.rank, rank, tag).put(tensor)
        return Parcel(lambda: None)

    def receive(self, tensor: Tensor, rank: int, tag: int) -> Parcel:
        return Parcel(lambda: tensor.copy_(self.tables.box(rank, self.rank, tag).get(timeout=SECONDS)))


@contextmanager
def simulated() -> Iterator[Callable[[int, Callable[[World], Any]], list[Any]]]:
    """Gives `on_ranks(size, act)`: what `act(world)` returns on each rank; the first exception of a rank is raised."""

    def on_ranks(size: int, act: Callable[[World], Any]) -> list[Any]:
        tables = Tables(size)
        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(size) as threads:
            patch.setattr(os, "fsync", lambda handle: None)  # a disk shared with other tests takes its time
            patch.setattr(checkpoint.checkpoints, "Peers", lambda world: SimulatedPeers(world, tables))
            ranks = [threads.submit(act, World(rank, size)) for rank in range(size)]
            return [rank.result(timeout=3 * SECONDS) for rank in ranks]

    yield on_ranks
