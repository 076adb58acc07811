"""What attention asks of the ranks that hold a sequence together, and how torch.distributed gives it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from math import prod
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from settings import Refusal

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)

# torch 2.13 renames both and warns at every call of the old names; 2.11 has only those.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Handle(Protocol[Result_co]):
    """Something on its way; it keeps what is sent alive. Write to nothing that was sent before `wait` has returned."""

    def wait(self) -> Result_co:
        """The result, once it is here; a second call gives it again."""


class Comm(Protocol):
    """The ranks that hold a sequence together. All of them make the same calls in the same order.

    What carries tensors does not wait: it returns a handle, and what is computed before `wait` overlaps it. Tensors
    need not be contiguous; results are, and share no memory with what was sent. Nothing here is differentiated.
    `GroupComm` below is one, `LocalComm` (context/local_comm.py) another, for virtual ranks in one process.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def shift(self, tensor: Tensor, by: int = 1) -> Handle[Tensor]:
        """To rank + by, from rank - by (modulo size); every rank sends the same shape."""

    def all_to_all(self, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> Handle[list[Tensor]]:
        """tensors[r] to rank r; from rank r one of shapes[r]. One dtype; any shapes, empty ones included."""

    def all_gather(self, tensor: Tensor) -> Handle[Tensor]:
        """(W, ...): every rank's tensor, all of the same shape, in order of rank."""

    def sum_scatter(self, tensor_W: Tensor) -> Handle[Tensor]:
        """(W, ...) to (...): the sum over ranks of their tensor_W[rank]."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, a new tensor; waits."""

    def check_same(self, value: bytes | str | int, what: str) -> None:
        """Raise Refusal on every rank, naming `what` and who differs, unless all ranks give the same value; waits."""

    def split(self, size_inside: int) -> "tuple[Comm, Comm]":
        """(inside, outside): groups of `size_inside` neighbours, and across them the ranks of like place.

        Asked twice, it gives the same two. Raises Refusal where the size does not divide.
        """


@dataclass
class Flight(Generic[Result]):
    """A handle over torch.distributed's works."""

    works: list[dist.Work]
    sent: Any
    """Kept alive until it has left."""
    land: Callable[[], Result]
    result: list[Result] = field(default_factory=list)

    def wait(self) -> Result:
        if not self.result:
            for work in self.works:
                work.wait()
            self.result.append(self.land())
            self.works, self.sent = [], None
        return self.result[0]


class GroupComm:
    """A process group of torch.distributed: gloo on CPUs, NCCL on GPUs.

    timeout: that of the groups which `split` makes; give it the one that the process group has.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta | None = None) -> None:
        self.group, self.timeout = group, timeout
        self.rank, self.size = group.rank(), group.size()
        self._splits: dict[int, tuple[GroupComm, GroupComm]] = {}

    def shift(self, tensor: Tensor, by: int = 1) -> Flight[Tensor]:
        """See Comm."""
        sent = tensor.detach().contiguous()
        if by % self.size == 0:
            return Flight([], None, sent.clone)
        arriving = torch.empty_like(sent)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, group=self.group, group_peer=(self.rank + by) % self.size),
                dist.P2POp(dist.irecv, arriving, group=self.group, group_peer=(self.rank - by) % self.size),
            ]
        )
        return Flight(works, sent, lambda: arriving)

    def all_to_all(self, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> Flight[list[Tensor]]:
        """See Comm."""
        sent = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        sizes = [prod(shape) for shape in shapes]
        arriving = sent.new_empty(sum(sizes))
        work = dist.all_to_all_single(
            arriving, sent, sizes, [tensor.numel() for tensor in tensors], group=self.group, async_op=True
        )
        return Flight([_started(work)], sent, lambda: _cut(arriving, shapes))

    def all_gather(self, tensor: Tensor) -> Flight[Tensor]:
        """See Comm."""
        sent = tensor.detach().contiguous()
        arriving = sent.new_empty(self.size, *sent.shape)
        work = all_gather(arriving.view(-1), sent.view(-1), group=self.group, async_op=True)
        return Flight([_started(work)], sent, lambda: arriving)

    def sum_scatter(self, tensor_W: Tensor) -> Flight[Tensor]:
        """See Comm."""
        sent = tensor_W.detach().contiguous()
        arriving = torch.empty_like(sent[0])
        work = reduce_scatter(arriving.view(-1), sent.view(-1), group=self.group, async_op=True)
        return Flight([_started(work)], sent, lambda: arriving)

    def sum(self, tensor: Tensor) -> Tensor:
        """See Comm."""
        total = tensor.detach().contiguous().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def check_same(self, value: bytes | str | int, what: str) -> None:
        """See Comm; 32 bytes a rank travel, whatever the value is."""
        own = torch.frombuffer(bytearray(digest(value)), dtype=torch.uint8).to(self._device)
        gathered_W = self.all_gather(own).wait().cpu()
        refuse_unless_same([bytes(row.tolist()) for row in gathered_W], what)

    def split(self, size_inside: int) -> "tuple[GroupComm, GroupComm]":
        """See Comm; every rank of the group has to ask."""
        if size_inside not in self._splits:
            parts = neighbours(self.rank, self.size, size_inside)
            # torch names a group after its ranks and how many groups this rank has: unlike numbers would wait for ever.
            self.check_same(len(dist.distributed_c10d._world.pg_names), "how many process groups each of them has made")
            ranks = dist.get_process_group_ranks(self.group)
            inside, outside = (
                # Only the members meet: groups that have nothing to do with this one need not know of it.
                GroupComm(dist.new_group([ranks[r] for r in members], self.timeout, use_local_synchronization=True))
                for members in parts
            )
            inside.timeout = outside.timeout = self.timeout
            self._splits[size_inside] = inside, outside
        return self._splits[size_inside]

    @property
    def _device(self) -> torch.device:
        """Where the group takes small tensors from."""
        takes_cpu = "cpu:" in dist.get_backend_config(self.group)
        return torch.device("cpu") if takes_cpu else torch.device("cuda", torch.cuda.current_device())


def digest(value: bytes | str | int) -> bytes:
    """32 bytes that differ where values differ."""
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).digest()


def refuse_unless_same(digests: Sequence[bytes], what: str) -> None:
    """Raise Refusal, naming the ranks that differ from rank 0, unless all digests are equal."""
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise Refusal(
            f"ranks that share a sequence disagree on {what}: ranks {', '.join(map(str, others))} have another than"
            f" rank 0; give all ranks of the group the same"
        )


def neighbours(rank: int, size: int, size_inside: int) -> tuple[range, range]:
    """(the rank's group of neighbours, the ranks of like place in all groups)."""
    if size_inside < 1 or size % size_inside:
        divisors = ", ".join(str(d) for d in range(1, size + 1) if size % d == 0)
        raise Refusal(f"{size} ranks cannot be split into groups of {size_inside}; use one of {divisors}")
    first = rank - rank % size_inside
    return range(first, first + size_inside), range(rank % size_inside, size, size_inside)


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the group"
    return work


def _cut(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    ends = list(accumulate(prod(shape) for shape in shapes))
    starts = [0, *ends[:-1]]
    return [flat[start:end].view(*shape) for start, end, shape in zip(starts, ends, shapes, strict=True)]
