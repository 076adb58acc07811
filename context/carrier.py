"""What brings the keys of other ranks here and their gradients home: what it is given, and what it gives, a part at a
time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from attention.mask import Mask
from context.comm import Comm
from context.plan import Plan, Tile
from context.wire import Wire


@dataclass(frozen=True)
class Part:
    """These of the rank's queries against these of the keys that have come, all of it one call of a backend."""

    queries: slice
    keys: slice
    mask: Mask

    @staticmethod
    def of(tile: Tile) -> "Part":
        return Part(tile.local_query, tile.local_key, tile.mask)


@dataclass(frozen=True)
class Delivery:
    """Keys and values that have come, and what to do with them before the next delivery is asked for."""

    parts: Sequence[Part]
    k_1SGC: Tensor
    v_1SGE: Tensor
    gradients: tuple[Tensor, Tensor] | None
    """Where a backward pass adds the gradients of k and v; None going forward."""


@dataclass(frozen=True)
class Cargo:
    """What a rank gives to a carrier: its own keys and values and, in a backward pass, room for their gradients."""

    plan: Plan
    wire: Wire
    k_1NGC: Tensor
    v_1NGE: Tensor
    grad_NGX: Tensor | None = None

    def pack(self) -> Tensor:
        """(N, G, X), as it travels."""
        return self.wire.pack(self.k_1NGC[0], self.v_1NGE[0])

    def own(self, parts: Sequence[Part]) -> Delivery:
        """The rank's own keys, at hand before any others have come."""
        gradients = None if self.grad_NGX is None else self.wire.unpack(self.grad_NGX[None])
        return Delivery(parts, self.k_1NGC, self.v_1NGE, gradients)

    def room(self, kv_SGX: Tensor) -> Tensor | None:
        """Zeros for the gradients of keys that have come, in fp32 at least; None going forward."""
        return None if self.grad_NGX is None else torch.zeros_like(kv_SGX, dtype=self.grad_NGX.dtype)

    def add(self, grad_NGX: Tensor, place: slice = slice(None)) -> None:
        """To the gradients of the rank's own keys what others have come to."""
        assert self.grad_NGX is not None
        self.grad_NGX[place] += grad_NGX

    def delivery(self, parts: Sequence[Part], kv_SGX: Tensor, grad_SGX: Tensor | None) -> Delivery:
        gradients = None if grad_SGX is None else self.wire.unpack(grad_SGX[None])
        return Delivery(parts, *self.wire.unpack(kv_SGX[None]), gradients)


class Carrier(Protocol):
    """A way to bring the keys of other ranks here and, in a backward pass, their gradients home."""

    @property
    def name(self) -> str: ...

    @property
    def comm(self) -> Comm: ...

    def deliver(self, cargo: Cargo) -> Iterator[Delivery]:
        """Deliveries, together all parts of the rank, the diagonal as the first; more is on its way while one is worked
        on. When they are through, `cargo.grad_NGX` holds what all ranks have added for these keys."""


# Kept, as backends keep on the device what they have made of a mask's documents.
@lru_cache(maxsize=64)
def diagonal(plan: Plan, rank: int) -> Part:
    """The first part of all: every query of a rank against the keys of its own piece."""
    everything = slice(0, plan.layout.num_local_tokens)
    return Part(everything, everything, plan.diagonal(rank))


@lru_cache(maxsize=1024)
def parts_from(plan: Plan, rank: int, owner: int) -> tuple[Part, ...]:
    """What a rank does with the share of another, and with its own, there the diagonal first."""
    tiles = tuple(Part.of(tile) for tile in plan.tiles(rank) if tile.key_rank == owner)
    return (diagonal(plan, rank), *tiles) if owner == rank else tiles


@lru_cache(maxsize=64)
def joined_parts(plan: Plan, rank: int) -> tuple[Part, ...]:
    """What a rank does with the keys of all in the order of the batch, after the diagonal."""
    return tuple(map(Part.of, plan.joined_tiles(rank)))
