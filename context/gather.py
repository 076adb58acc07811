"""Gather: all keys come to every rank at once, and each of its pieces meets all earlier keys in one rectangle.

Llama 3 (Grattafiori et al. 2024, section 3.3.2) gathers so; simplest, and the memory of whole rows' keys on every rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from context.carrier import Cargo, Delivery, diagonal, joined_parts
from context.comm import Comm
from context.layout import Layout


@dataclass(frozen=True)
class Gather:
    """Gathers all ranks' keys in the order of the batch; the diagonal is computed meanwhile.

    Bytes that a rank sends: its share of keys to each other rank; backward the same again, and the gradients of all
    other ranks' keys in fp32. Nothing is sent where no rank reads another's keys.
    """

    comm: Comm
    name: str = "gather"

    def deliver(self, cargo: Cargo) -> Iterator[Delivery]:
        """See Carrier."""
        rank, plan = self.comm.rank, cargo.plan
        gathering = self.comm.all_gather(cargo.pack()) if plan.hops else None
        yield cargo.own((diagonal(plan, rank),))
        if gathering is None:
            return
        kv_WNGX = gathering.wait()
        into_batch, into_shares = orders(plan.layout, kv_WNGX.device)
        kv_SGX = kv_WNGX.flatten(0, 1)[into_batch]
        grad_SGX = cargo.room(kv_SGX)
        yield cargo.delivery(joined_parts(plan, rank), kv_SGX, grad_SGX)
        if grad_SGX is not None:
            cargo.add(self.comm.sum_scatter(grad_SGX[into_shares].view(kv_WNGX.shape)).wait())


@lru_cache(maxsize=64)
def orders(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """(from all shares, laid end to end, to the order of the batch; back)."""
    into_batch = layout.joined_order(range(layout.num_ranks), device)
    return into_batch, into_batch.argsort()
