"""Group-cast: every rank gets just the ranges of keys that its tiles read, all in one exchange.

MagiAttention (Sand AI 2025) names it so; here the ranges follow from the plan of packed documents.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from context.carrier import Cargo, Delivery, Part, diagonal
from context.comm import Comm, Handle
from context.plan import Plan, Tile


@dataclass(frozen=True)
class Groupcast:
    """Sends ranges of keys; what comes is laid beside the rank's own in the order of the batch, so that each of its
    pieces meets all earlier keys in one rectangle. The diagonal is computed meanwhile.

    Bytes that a rank sends: the keys that others read of it; backward the same again, and the gradients in fp32 of the
    keys that it reads of others.
    """

    comm: Comm
    name: str = "groupcast"

    def deliver(self, cargo: Cargo) -> Iterator[Delivery]:
        """See Carrier."""
        rank, plan = self.comm.rank, cargo.plan
        own = cargo.own((diagonal(plan, rank),))
        if not plan.hops:  # on no rank: then there are no tiles anywhere, as one piece reads another across a third
            yield own
            return
        route, kv_NGX = lay_route(plan, rank), cargo.pack()
        coming = self._send(kv_NGX, route.read_of_me, route.come_from)
        yield own
        sources = coming.wait()
        sources[rank] = kv_NGX
        kv_SGX = _lay([sources[one.owner][one.source] for one in route.stretches], kv_NGX)
        grad_SGX = cargo.room(kv_SGX)
        yield cargo.delivery(route.parts, kv_SGX, grad_SGX)
        if grad_SGX is None:
            return
        going_home = self._send(grad_SGX, route.come_from, route.read_of_me)
        for one in route.stretches:
            if one.owner == rank:
                cargo.add(grad_SGX[one.place], one.source)
        for ranges, home_SGX in zip(route.read_of_me, going_home.wait(), strict=True):
            for place, part in zip(ranges, home_SGX.split([_length(place) for place in ranges]), strict=True):
                cargo.add(part, place)

    def _send(
        self, x_SGX: Tensor, sent: Sequence[Sequence[slice]], received: Sequence[Sequence[slice]]
    ) -> Handle[list[Tensor]]:
        """To each rank its ranges of x; from each rank as much as its ranges of `received` hold."""
        shapes = [(sum(map(_length, ranges)), *x_SGX.shape[1:]) for ranges in received]
        return self.comm.all_to_all([_lay([x_SGX[part] for part in parts], x_SGX) for parts in sent], shapes)


@dataclass(frozen=True)
class Stretch:
    """A range of the batch whose keys a rank reads."""

    owner: int
    source: slice
    """Where it lies in what comes from its owner or, where that is the rank itself, in its share."""
    place: slice
    """Where it lies among all that the rank reads."""


@dataclass(frozen=True)
class Route:
    """What goes where for one rank; everywhere in the order of the batch."""

    read_of_me: tuple[tuple[slice, ...], ...]
    """For each rank the ranges of this one's share that go to it; none go to itself."""
    stretches: tuple[Stretch, ...]
    come_from: tuple[tuple[slice, ...], ...]
    """For each rank the places of the stretches that come from it; none come from itself."""
    parts: tuple[Part, ...]
    """The tiles, over all stretches side by side."""


@lru_cache(maxsize=64)
def lay_route(plan: Plan, rank: int) -> Route:
    """The route of a rank; host arithmetic, kept for the layers and passes of a few micro-batches."""
    layout, ranks = plan.layout, range(plan.layout.num_ranks)
    reads = sorted((keys.start, keys.stop, owner) for owner in ranks for keys in plan.keys_needed(rank, owner))
    stretches, place, arrived = [], 0, [0] * len(ranks)
    for start, stop, owner in reads:
        first = layout.local(rank, start) if owner == rank else arrived[owner]
        arrived[owner] += stop - start
        stretches.append(Stretch(owner, _run(first, stop - start), _run(place, stop - start)))
        place += stop - start

    def mine(keys: slice) -> slice:
        return _run(layout.local(rank, keys.start), _length(keys))

    starts = [start for start, _, _ in reads]

    def part(tile: Tile) -> Part:
        nearest = bisect_right(starts, tile.key.start) - 1
        first = stretches[nearest].place.start + tile.key.start - starts[nearest]
        return Part(tile.local_query, _run(first, _length(tile.key)), tile.mask)

    return Route(
        read_of_me=tuple(
            () if reader == rank else tuple(map(mine, plan.keys_needed(reader, rank))) for reader in ranks
        ),
        stretches=tuple(stretches),
        come_from=tuple(
            tuple(one.place for one in stretches if one.owner == owner and owner != rank) for owner in ranks
        ),
        parts=tuple(map(part, plan.joined_tiles(rank))),
    )


def _lay(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Side by side: a copy only where there are several, and nothing, like `like`, where there are none."""
    return parts[0] if len(parts) == 1 else torch.cat([like[:0], *parts])


def _run(start: int, length: int) -> slice:
    return slice(start, start + length)


def _length(part: slice) -> int:
    return part.stop - part.start
