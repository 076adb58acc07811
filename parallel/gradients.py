"""Gradients that lie on several ranks: added up, measured as one, and clipped."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.shard import shard_of


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
