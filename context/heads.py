"""Heads shared by ranks: who has which, and how tokens of all heads are exchanged for all tokens of some heads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from context.comm import Comm
from settings import Refusal


@dataclass(frozen=True)
class HeadGroup:
    """Ranks that exchange heads: of what each has of its tokens, one gets together the heads that are its share."""

    comm: Comm
    places: tuple[Tensor, ...]
    """For each rank of the group, where its tokens stand among those of the group."""

    @property
    def size(self) -> int:
        return self.comm.size

    def to_heads(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Start to exchange (B, n, H, ...) of this rank for (B, n * size, H / size, ...), in ascending tokens; what it
        returns waits.

        All tensors of one dtype. Where H is less than the number of ranks, each gets one head, and so several the same.
        """
        sent = [
            torch.cat([x[:, :, share(x.shape[2], self.size, rank)].flatten(2) for x in tensors], dim=-1).flatten(0, 1)
            for rank in range(self.size)
        ]
        flight = self.comm.all_to_all(sent, [part.shape for part in sent])

        def wait() -> list[Tensor]:
            whole_NX = sent[0].new_empty(len(sent[0]) * self.size, sent[0].shape[1])
            for place, part in zip(self.places, flight.wait(), strict=True):
                whole_NX.index_copy_(0, place, part)
            shapes = [(max(x.shape[2] // self.size, 1), x.shape[3]) for x in tensors]
            parts = whole_NX.unflatten(0, (tensors[0].shape[0], -1)).split([h * c for h, c in shapes], dim=-1)
            return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]

        return wait

    def to_tokens(self, tensors: Sequence[Tensor], num_heads: int) -> Callable[[], list[Tensor]]:
        """The way back, of tensors of `num_heads` heads on all ranks together; heads that several ranks have are summed
        in the dtype they come in."""
        packed_NX = torch.cat([x.flatten(2) for x in tensors], dim=-1).flatten(0, 1)
        sent = [packed_NX[place] for place in self.places]
        flight = self.comm.all_to_all(sent, [part.shape for part in sent])

        def wait() -> list[Tensor]:
            rows = tensors[0].shape[0]
            by_rank = [
                part.unflatten(0, (rows, -1)).split([x.shape[2] * x.shape[3] for x in tensors], dim=-1)
                for part in flight.wait()
            ]
            return [
                _together([part.unflatten(-1, x.shape[2:]) for part in parts], num_heads)
                for x, parts in zip(tensors, zip(*by_rank, strict=True), strict=True)
            ]

        return wait


def share(num_heads: int, num_ranks: int, rank: int) -> slice:
    """A rank's heads; where there are fewer than ranks, the one that its query heads read."""
    start = rank * num_heads // num_ranks
    return slice(start, max((rank + 1) * num_heads // num_ranks, start + 1))


def fits(H: int, G: int, size: int) -> bool:
    """Whether so many ranks can have as many query heads each, and whole key heads for them."""
    return H % size == 0 and (G % size == 0 or size % G == 0)


def check_heads(H: int, G: int, size: int) -> None:
    """Raise Refusal where the heads cannot be shared by so many ranks."""
    if not fits(H, G, size):
        able = sorted((s for s in range(1, H + 1) if fits(H, G, s)), key=lambda s: (abs(s - size), s))[:2]
        raise Refusal(
            f"ulysses: {size} ranks cannot share {H} query heads and {G} key heads; use"
            f" {' or '.join(map(str, sorted(able)))} ranks, or method 'usp', which finds a part of the ranks that can"
        )


def largest_group(H: int, G: int, num_ranks: int, at_most: int | None = None) -> int:
    """The most neighbours, a divisor of `num_ranks` and no more than `at_most`, that can share these heads."""
    sizes = range(1, min(num_ranks, at_most or num_ranks) + 1)
    return max(size for size in sizes if num_ranks % size == 0 and fits(H, G, size))


def _together(parts: Sequence[Tensor], num_heads: int) -> Tensor:
    """The heads of all ranks in order; of a head that several ranks have, the sum."""
    alike = len(parts) * parts[0].shape[2] // num_heads
    if alike == 1:
        return torch.cat(list(parts), dim=2)
    return torch.cat([torch.stack(list(parts[i : i + alike])).sum(0) for i in range(0, len(parts), alike)], dim=2)
