"""The ranks of a run, or some of them, as this process sees them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run, or some of them; rank 0 of 1 when it was started without torchrun."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None
    """The process group of these ranks; None: all of the run's."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place; also returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def any(self, claim: bool, device: torch.device) -> bool:
        """Whether the claim holds on at least one rank; all ranks get the same answer."""
        return bool(self.sum(torch.tensor(int(claim), device=device)).item()) if self.size > 1 else claim

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank does what is inside, and leaves files behind, before the others do the same."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()
