"""Data parallelism by replication: every rank holds the whole model and works on its own micro-batches."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run; rank 0 of 1 when it was started without torchrun."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place; also returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, claim: bool, device: torch.device) -> bool:
        """Whether the claim holds on at least one rank; all ranks get the same answer."""
        return bool(self.sum(torch.tensor(int(claim), device=device)).item()) if self.size > 1 else claim

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank does what is inside, and leaves files behind, before the others do the same."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


def sum_gradients(parameters: Iterable[torch.nn.Parameter], world: World) -> None:
    """Add up the gradients of all ranks, in one flat exchange for each dtype.

    Gradients are summed, not averaged: each rank has divided its loss by the global count of target tokens.
    A parameter that no token of this rank touched counts as zero, so that all ranks exchange the same bytes.
    """
    if world.size == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for dtype in sorted({p.dtype for p in trained}, key=str):
        gradients = [p.grad for p in trained if p.grad is not None and p.dtype == dtype]
        flat = world.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
