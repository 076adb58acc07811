"""How the ranks of a run stand: what they share, and the grids that their groups are rows of."""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.replicate import World
from settings import Refusal, Section

Method = Literal["ring", "gather", "groupcast", "ulysses", "usp"]


class SequenceSettings(Section):
    """How rows lie on the ranks that hold them together, and how attention reaches from rank to rank."""

    full: Method = "groupcast"
    """How layers do it that see all of a document."""
    window: Method = "groupcast"
    """How layers do it that see a window."""
    layout: Literal["balanced", "zigzag", "contiguous"] = "balanced"
    """Which rank has which tokens: by the documents' true work, in pairs for rows that are one document, in order."""
    chunks_per_rank: PositiveInt = 16
    """Chunks of a row on a rank in layout "balanced", at most: as few are taken as balance the work."""
    ulysses: PositiveInt | None = None
    """For method "usp": so many neighbours, at most, exchange heads, and rings run across them; left out, as many as
    the heads allow."""


class ParallelSettings(Section):
    """What ranks share: both kinds of groups are neighbours by number, and may be the same ones."""

    expert: PositiveInt = 1
    """So many ranks hold the experts of each layer together; 1: every rank holds them all."""
    context: PositiveInt = 1
    """So many ranks hold each row together, every one a part of its tokens; 1: every rank has rows of its own."""
    sequence: SequenceSettings = SequenceSettings()
    """Of use with `context` alone."""


def build_grid(key: str, size: int, world: World, device: torch.device, names: tuple[str, str]) -> DeviceMesh:
    """The ranks as a grid whose rows are groups of `size` neighbours; `names` of its axes, groups last.

    Raises Refusal, on every rank, when they do not divide; `key` is the setting that asked for it.
    """
    if world.size % size:
        below = max(world.size // size, 1) * size
        divisor = min(divisors(world.size), key=lambda d: (abs(d - size), d))
        raise Refusal(
            f"{key}={size} does not divide the {world.size} ranks of this run; start"
            f" {below} of them (torchrun --nproc-per-node {below}) or set {key}={divisor}"
        )
    return init_device_mesh(device.type, (world.size // size, size), mesh_dim_names=names)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
