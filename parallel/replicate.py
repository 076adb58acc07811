"""Data parallelism by replication: every rank works on its own micro-batches, and what ranks share is added up."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.shard import shard_of


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


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Add up the gradients of all ranks that hold the same values, in one flat exchange for each dtype.

    Gradients are summed, not averaged: each rank has divided its loss by the global count of target tokens.
    A parameter that no token of this rank touched counts as zero, so that all ranks exchange the same bytes. A slice
    of experts has met the tokens of all ranks that share them; the ranks that hold the same slice add the rest.
    """
    if world.size == 1:
        return
    exchanges: dict[tuple[dist.ProcessGroup | None, torch.dtype], list[Tensor]] = {}
    for p in parameters:
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            shard = shard_of(p)
            exchanges.setdefault((shard.replicas if shard else None, p.dtype), []).append(p.grad)
    # In the order of the parameters, which is the same on all ranks.
    for (group, _), gradients in exchanges.items():
        if group is not None and group.size() == 1:
            continue
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=group)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def norm_over_ranks(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the whole model's gradient: each element counts once, however many ranks hold it. On device."""
    whole: list[Tensor] = []
    sharded: dict[dist.ProcessGroup, list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            shard = shard_of(p)
            (whole if shard is None else sharded.setdefault(shard.owners, [])).append(p.grad)
    norms = [nn.utils.get_total_norm(whole)] if whole else []
    for owners, gradients in sharded.items():
        squared = nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(squared, group=owners)
        norms.append(squared.sqrt())
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
