"""W virtual ranks in one process, one thread each: for tests, and to measure on one device what splitting costs."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from context.comm import digest, neighbours, refuse_unless_same

Result = TypeVar("Result")
Message = tuple[str, Tensor]
Address = tuple[str, int, int, int]
"""(group, number of the call, from, to)."""


class Stopped(Exception):
    """Another rank has raised; this one ends without a reason of its own."""


@dataclass
class Post:
    """What the threads share: messages on their way, who has ended, and the first exception."""

    timeout: float
    letters: dict[Address, Message] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    failure: BaseException | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def send(self, address: Address, message: Message) -> None:
        with self.changed:
            self.letters[address] = message
            self.changed.notify_all()

    def receive(self, address: Address, sender: int, what: str) -> Tensor:
        """The letter; `sender` is who sends it in the numbers of `run`."""
        with self.changed:
            # A rank that fails ends, and so do those that wait for it, one after another.
            arrived = self.changed.wait_for(lambda: address in self.letters or sender in self.ended, self.timeout)
            if self.failure:
                raise Stopped
            if address not in self.letters:
                why = "has ended" if arrived else f"did not come within {self.timeout:g} s"
                raise RuntimeError(f"a virtual rank waits for rank {sender} in {what}, but that one {why}")
            called, tensor = self.letters.pop(address)
        if called != what:
            raise RuntimeError(f"virtual ranks made different calls: {what} met {called} of rank {sender}")
        return tensor

    def end(self, rank: int, failure: BaseException | None) -> None:
        with self.changed:
            self.ended.add(rank)
            if self.failure is None and not isinstance(failure, Stopped):
                self.failure = failure
            self.changed.notify_all()


@dataclass
class Pickup(Generic[Result]):
    """A handle: the letters are taken when they are waited for."""

    take: Callable[[], Result]
    result: list[Result] = field(default_factory=list)

    def wait(self) -> Result:
        if not self.result:
            self.result.append(self.take())
        return self.result[0]


class LocalComm:
    """One virtual rank. Stricter than real ones: calls or shapes that do not match are named, not waited for."""

    def __init__(self, post: Post, members: Sequence[int], rank: int, name: str = "all") -> None:
        self.rank, self.size = rank, len(members)
        self._post, self._members, self._name = post, members, name
        self._num_calls = 0
        self._splits: dict[int, tuple[LocalComm, LocalComm]] = {}

    @staticmethod
    def run(size: int, work: "Callable[[LocalComm], Result]", timeout: float = 60.0) -> list[Result]:
        """`work(comm)` on `size` threads; its results in order of rank.

        What one rank raises first ends all and is raised here. Gradients are on as in the caller; a random generator
        is shared by all threads, so draw before.
        """
        post, results = Post(timeout), dict[int, Result]()
        is_grad_enabled = torch.is_grad_enabled()

        def one(rank: int) -> None:
            failure: BaseException | None = None
            try:
                # Backward passes in the rank's own thread: one thread a device would wait for itself.
                with torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(is_grad_enabled):
                    results[rank] = work(LocalComm(post, range(size), rank))
            except BaseException as error:
                failure = error
            post.end(rank, failure)

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if post.failure is not None:
            raise post.failure
        return [results[rank] for rank in range(size)]

    def shift(self, tensor: Tensor, by: int = 1) -> Pickup[Tensor]:
        """See Comm."""
        call = self._next_call()
        self._send(call, (self.rank + by) % self.size, f"shift by {by}", tensor)
        return Pickup(lambda: self._receive(call, (self.rank - by) % self.size, f"shift by {by}", tensor.shape))

    def all_to_all(self, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> Pickup[list[Tensor]]:
        """See Comm."""
        return self._exchange("all_to_all", tensors, shapes)

    def all_gather(self, tensor: Tensor) -> Pickup[Tensor]:
        """See Comm."""
        gathering = self._exchange("all_gather", [tensor] * self.size, [tensor.shape] * self.size)
        return Pickup(lambda: torch.stack(gathering.wait()))

    def sum_scatter(self, tensor_W: Tensor) -> Pickup[Tensor]:
        """See Comm; added in order of rank."""
        parts = self._exchange("sum_scatter", tensor_W.unbind(), [tensor_W.shape[1:]] * self.size)
        return Pickup(lambda: torch.stack(parts.wait()).sum(0))

    def sum(self, tensor: Tensor) -> Tensor:
        """See Comm; added in order of rank."""
        return torch.stack(self._exchange("sum", [tensor] * self.size, [tensor.shape] * self.size).wait()).sum(0)

    def check_same(self, value: bytes | str | int, what: str) -> None:
        """See Comm."""
        own = torch.frombuffer(bytearray(digest(value)), dtype=torch.uint8)
        gathered = self._exchange(f"check of {what}", [own] * self.size, [own.shape] * self.size).wait()
        refuse_unless_same([bytes(other.tolist()) for other in gathered], what)

    def split(self, size_inside: int) -> "tuple[LocalComm, LocalComm]":
        """See Comm."""
        if size_inside not in self._splits:
            inside, outside = neighbours(self.rank, self.size, size_inside)
            self._splits[size_inside] = (
                self._part(inside, f"{self._name}/inside {size_inside} from {inside[0]}"),
                self._part(outside, f"{self._name}/outside {size_inside} from {outside[0]}"),
            )
        return self._splits[size_inside]

    def _part(self, members: range, name: str) -> "LocalComm":
        return LocalComm(self._post, [self._members[rank] for rank in members], members.index(self.rank), name)

    def _next_call(self) -> int:
        self._num_calls += 1
        return self._num_calls

    def _exchange(self, what: str, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> Pickup[list[Tensor]]:
        call = self._next_call()
        for rank, tensor in enumerate(tensors):
            self._send(call, rank, what, tensor)
        return Pickup(lambda: [self._receive(call, rank, what, shape) for rank, shape in enumerate(shapes)])

    def _send(self, call: int, to: int, what: str, tensor: Tensor) -> None:
        # A copy: real ranks share no memory, and the sender may write to its tensor once it has waited.
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._post.send((self._name, call, self.rank, to), (what, copy))

    def _receive(self, call: int, sender: int, what: str, shape: Sequence[int]) -> Tensor:
        tensor = self._post.receive((self._name, call, sender, self.rank), self._members[sender], what)
        if tensor.shape != torch.Size(shape):
            raise RuntimeError(
                f"{what}: rank {self.rank} expects {tuple(shape)} from rank {sender}, which sends {tuple(tensor.shape)}"
            )
        return tensor
