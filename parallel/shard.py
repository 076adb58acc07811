"""Parameters that are cut over ranks: which slice is whose, and how slices become whole and whole ones slices."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """A parameter's slices along dimension 0, all of one size, one on each rank of a group."""

    owners: dist.ProcessGroup
    """The ranks that hold the parameter together, in the order of its slices."""
    replicas: dist.ProcessGroup
    """The ranks that hold the same slice."""

    def whole_shape(self, local: Tensor) -> torch.Size:
        """The shape of what `local` is a slice of."""
        return torch.Size((len(local) * self.owners.size(), *local.shape[1:]))

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's slice, a view."""
        return whole.chunk(self.owners.size())[self.owners.rank()]

    def gather(self, local: Tensor) -> Tensor:
        """The whole tensor on the CPU of the run's rank 0, elsewhere the slice itself; all ranks have to call."""
        if 0 not in dist.get_process_group_ranks(self.owners):
            return local
        is_main = self.owners.rank() == 0
        local = local.detach().contiguous()
        slices = [torch.empty_like(local) for _ in range(self.owners.size())] if is_main else None
        dist.gather(local, slices, group=self.owners, group_dst=0)
        return local if slices is None else torch.cat([part.cpu() for part in slices])


def mark_shard(parameter: nn.Parameter, shard: Shard) -> None:
    """Say that this parameter is a slice; whoever deals with parameters asks `shard_of`."""
    parameter.shard = shard  # type: ignore[attr-defined]


def shard_of(parameter: nn.Parameter) -> Shard | None:
    """How a parameter is cut; None: it is whole on every rank."""
    return getattr(parameter, "shard", None)


def gather_all(named: Mapping[str, Tensor], shards: Mapping[str, Shard]) -> dict[str, Tensor]:
    """Every tensor whole on the run's rank 0; all ranks have to call with the same names in the same order."""
    return {name: shards[name].gather(tensor) if name in shards else tensor for name, tensor in named.items()}


def cut_all(named: Mapping[str, Tensor], shards: Mapping[str, Shard]) -> dict[str, Tensor]:
    """This rank's part of whole tensors."""
    return {name: shards[name].cut(tensor) if name in shards else tensor for name, tensor in named.items()}


def outline_all(named: Mapping[str, Tensor], shards: Mapping[str, Shard]) -> dict[str, Tensor]:
    """What this rank's tensors look like whole: shapes and dtypes on the meta device."""
    return {
        name: torch.empty(
            shards[name].whole_shape(tensor) if name in shards else tensor.shape, dtype=tensor.dtype, device="meta"
        )
        for name, tensor in named.items()
    }
