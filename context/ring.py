"""Ring: every rank's keys go round, and each rank works on those that are with it while the next ones are on their way.

Liu, Zaharia and Abbeel 2023 (Ring Attention with Blockwise Transformers, section 3), over a plan of packed documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from context.carrier import Cargo, Delivery, parts_from
from context.comm import Comm, Handle


@dataclass(frozen=True)
class Ring:
    """Sends whole shares of keys; only distances at which some rank reads are travelled to, in one hop from the last.

    Bytes that a rank sends, with n such distances: n shares of keys forward; backward the same again, and n shares of
    gradients in fp32, which follow the keys one hop behind and go home from the last distance.
    """

    comm: Comm
    name: str = "ring"

    def deliver(self, cargo: Cargo) -> Iterator[Delivery]:
        """See Carrier."""
        rank, size, hops = self.comm.rank, self.comm.size, cargo.plan.hops
        keys: Handle[Tensor] | None = self.comm.shift(cargo.pack(), hops[0]) if hops else None
        yield cargo.own(parts_from(cargo.plan, rank, rank))
        gradients: Handle[Tensor] | None = None
        for hop, next_hop in pairwise((*hops, size)):
            assert keys is not None
            kv_NGX = keys.wait()
            if next_hop < size:
                keys = self.comm.shift(kv_NGX, next_hop - hop)
            grad_NGX = cargo.room(kv_NGX)
            yield cargo.delivery(parts_from(cargo.plan, rank, (rank - hop) % size), kv_NGX, grad_NGX)
            if grad_NGX is not None:
                if gradients is not None:
                    grad_NGX += gradients.wait()
                gradients = self.comm.shift(grad_NGX, next_hop - hop)
        if gradients is not None:
            cargo.add(gradients.wait())
