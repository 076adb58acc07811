"""What the ranks of a run say to each other about checkpoints: words in JSON, and tensors from one to another.

They have a gloo process group of their own, so that a thread can save while the others train. Words are JSON and never
pickled: nothing that a rank reads can run.
"""

import json
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint.manifest import Damaged
from parallel.world import World
from settings import Refusal

JSON: TypeAlias = Any
T = TypeVar("T")
PATIENCE = timedelta(hours=1)
"""As long as the slowest disk may take; a rank that died is noticed at once."""


class Sent(Protocol):
    """A tensor under way."""

    def wait(self) -> object:
        """Until it has arrived."""


class Peers:
    """All ranks of a run; one alone needs nobody."""

    def __init__(self, world: World | None = None) -> None:
        """Every rank has to make its own at the same point; world: of all the run's ranks."""
        self.rank, self.size = (world.rank, world.size) if world else (0, 1)
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def tell(self, words: JSON) -> list[JSON]:
        """What every rank said, in their order; all of them have to call."""
        own = json.dumps(words).encode()
        if self.size == 1:
            return [json.loads(own)]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(own)]), group=self._group)
        longest = max(int(length) for length in lengths)
        padded = torch.frombuffer(bytearray(own.ljust(longest)), dtype=torch.uint8)
        answers = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(answers, padded, group=self._group)
        return [json.loads(answer.numpy().tobytes()) for answer in answers]

    def send(self, tensor: Tensor, rank: int, tag: int) -> Sent:
        """Begin to send bytes, (n,) uint8 on the CPU, which must not change until they are there."""
        work = dist.isend(tensor, rank, group=self._group, tag=tag)
        assert work is not None
        return work

    def receive(self, tensor: Tensor, rank: int, tag: int) -> Sent:
        """Begin to receive what that rank sends under the same tag."""
        work = dist.irecv(tensor, rank, group=self._group, tag=tag)
        assert work is not None
        return work

    def agree(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns here, once it has succeeded on every rank; else all raise what the first one did."""
        if self.size == 1:
            return attempt()
        result, mine, trouble = None, None, None
        try:
            result = attempt()
        except Exception as error:
            mine, trouble = error, trouble_of(error)
        troubles = self.tell(trouble)
        first = next((rank for rank, said in enumerate(troubles) if said), None)
        if first is None:
            return result  # type: ignore[return-value]
        if mine is not None and first == self.rank:
            raise mine
        raise error_of(troubles[first], first)


def trouble_of(error: Exception) -> list[str]:
    """An error in words: [kind, message]."""
    if isinstance(error, Damaged):
        return ["damaged", str(error)]
    if isinstance(error, Refusal):
        return ["refusal", str(error)]
    return ["fault", "".join(traceback.format_exception(error))]


def error_of(trouble: list[str], rank: int) -> Exception:
    """What to raise for another rank that told of it by `trouble_of`."""
    kind, message = trouble
    if kind == "damaged":
        return Damaged(message)
    return Refusal(message) if kind == "refusal" else RuntimeError(f"rank {rank} failed: {message}")
