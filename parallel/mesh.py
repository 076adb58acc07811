"""How the ranks of a run stand: axes along which they share something, and the arithmetic of who stands where.

Ranks are numbered as pipeline x data x tensor, the last running fastest. `shard`, `expert` and `context` are three ways
to group the same data ranks, always with their neighbours; `tensor` and `pipeline` multiply them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from context.lengths import divisors
from parallel.world import World
from settings import Refusal, Section

Method = Literal["ring", "gather", "groupcast", "ulysses", "usp"]
Axis = Literal[
    "data", "replicate", "shard", "expert", "expert_shard", "expert_replicate", "context", "tensor", "pipeline"
]
"""`data`: all ranks that have tokens of their own. `expert_shard` and `expert_replicate` are what `shard` and
`replicate` come to for the experts: the ranks that hold the same ones, in groups that cut them and across groups."""
AXES = ("shard", "expert", "context", "tensor", "pipeline")
"""Those with a length in the settings."""


Ranks = Annotated[int, Field(ge=1, le=1 << 16)]
"""Along one axis."""


class SequenceSettings(Section):
    """How rows lie on the ranks that hold them together, and how attention reaches from rank to rank."""

    full: Method = "groupcast"
    """How layers do it that see all of a document."""
    window: Method = "groupcast"
    """How layers do it that see a window."""
    layout: Literal["balanced", "zigzag", "contiguous"] = "balanced"
    """Which rank has which tokens: by the documents' true work, in pairs for rows that are one document, in order."""
    chunks_per_rank: int = Field(default=16, ge=1, le=1024)
    """Chunks of a row on a rank in layout "balanced", at most: as few are taken as balance the work."""
    ulysses: Ranks | None = None
    """For method "usp": so many neighbours, at most, exchange heads, and rings run across them; left out, as many as
    the heads allow."""


class PipeliningSettings(Section):
    """How micro-batches move through the ranks of a pipeline. Of use with `pipeline` alone."""

    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """One forward, one backward (Narayanan et al. 2021, section 2.2); the same over several parts of the model on each
    rank (there, too); or with weight gradients moved into the waiting (Qi et al. 2023)."""
    parts_per_rank: Ranks = 2
    """Of the model on each rank, for "interleaved" and "zero_bubble"; "1f1b" has one."""


class ParallelSettings(Section):
    """What ranks share. `tensor * pipeline * replicate * shard` is their number."""

    replicate: Ranks | None = None
    """So many groups hold the same weights and add their gradients up; left out, as many as there are ranks for."""
    shard: Ranks = 1
    """So many ranks cut weights, gradients and moments among them, and gather a layer's weights while it runs."""
    expert: Ranks = 1
    """So many ranks hold the experts of each layer together; 1: every rank holds them all."""
    context: int = Field(default=1, ge=1)
    """So many ranks hold each row together, every one a part of its tokens; 1: every rank has rows of its own."""
    tensor: Ranks = 1
    """So many ranks cut heads, inner channels and vocabulary among them, and work on the same tokens."""
    pipeline: Ranks = 1
    """So many ranks hold the layers one after another."""
    sequence: SequenceSettings = SequenceSettings()
    """Of use with `context` alone."""
    pipelining: PipeliningSettings = PipeliningSettings()


@dataclass(frozen=True)
class Grid:
    """Where each of `size` ranks stands: arithmetic alone, so that any rank can work out any other's place."""

    size: int = 1
    shard: int = 1
    expert: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def data(self) -> int:
        """How many ranks have tokens of their own."""
        return self.size // (self.tensor * self.pipeline)

    def line(self, axis: Axis, context: int = 1) -> tuple[int, int]:
        """(stride, length): the ranks along an axis are so many numbers apart, and so many. context: of that axis."""
        T, D, S, E = self.tensor, self.data, self.shard, self.expert
        lines = {
            "tensor": (1, T),
            "data": (T, D),
            "context": (T, context),
            "shard": (T, S),
            "replicate": (T * S, D // S),
            "expert": (T, E),
            "expert_shard": (T * E, max(S // E, 1)),
            "expert_replicate": (T * max(S, E), D // max(S, E)),
            "pipeline": (T * D, self.pipeline),
        }
        return lines[axis]

    def length(self, axis: Axis) -> int:
        """How many ranks stand along an axis."""
        return self.line(axis)[1]

    def place(self, axis: Axis, rank: int) -> int:
        """Where a rank stands along an axis, from 0."""
        stride, length = self.line(axis)
        return rank // stride % length

    def along(self, axis: Axis, rank: int, context: int = 1) -> list[int]:
        """The ranks that differ from this one by their place along the axis alone, itself among them, in order."""
        stride, length = self.line(axis, context)
        first = rank - rank // stride % length * stride
        return [first + place * stride for place in range(length)]


@dataclass(frozen=True)
class Mesh:
    """The grid as this rank sees it, with a process group along each axis that is longer than one."""

    grid: Grid
    world: World
    groups: Mapping[str, dist.ProcessGroup]
    """By axis."""
    dense: DeviceMesh | None = None
    """(replicate, shard) or shard alone, for what all data ranks share; None where nothing is cut into shards."""
    experts: DeviceMesh | None = None
    """The same of (expert_replicate, expert_shard), for experts; None where they are not cut into shards."""

    @property
    def data(self) -> World:
        """The ranks with tokens of their own, among which this one counts as many others do: see `Grid.data`."""
        if self.grid.data == self.world.size:
            return self.world
        rank = self.grid.place("data", self.world.rank)
        return World(rank, self.grid.data, self.world.local_rank, self.groups.get("data"))

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """The process group along an axis; None where this rank is alone on it, or all ranks of the run stand there."""
        return self.groups.get(axis)


def grid_of(settings: ParallelSettings, size: int) -> Grid:
    """The grid of so many ranks; raises Refusal, with ways out that are possible, where there is none."""
    if not _fits(settings, size):
        raise Refusal(f"{_trouble(settings, size)}; {' or '.join(_ways_out(settings, size))}")
    return Grid(size, settings.shard, settings.expert, settings.tensor, settings.pipeline)


def _fits(settings: ParallelSettings, size: int) -> bool:
    """Whether every axis divides what it groups; shards of the same experts have to be whole ranks."""
    is_asked = settings.replicate is None or _wanted(settings) == size
    return is_asked and not _is_uneven(settings) and size % _unit(settings) == 0


def _wanted(settings: ParallelSettings) -> int:
    """The number of ranks where `replicate` is given."""
    return settings.tensor * settings.pipeline * settings.shard * (settings.replicate or 1)


def _unit(settings: ParallelSettings, *contexts: int) -> int:
    """What the number of ranks is a multiple of. contexts: of single stages."""
    return settings.tensor * settings.pipeline * math.lcm(settings.shard, settings.expert, settings.context, *contexts)


def _is_uneven(settings: ParallelSettings) -> bool:
    return max(settings.shard, settings.expert) % min(settings.shard, settings.expert) > 0


def _trouble(settings: ParallelSettings, size: int) -> str:
    if _is_uneven(settings):
        return f"parallel.shard={settings.shard} and parallel.expert={settings.expert}: one has to divide the other"
    if settings.replicate is not None and _wanted(settings) != size:
        return (
            f"parallel.replicate={settings.replicate}{_beside(settings)} is for {_wanted(settings)} ranks, and this run"
            f" has {size}"
        )
    key = _in_the_way(settings, size)
    value = getattr(settings, key)
    return f"parallel.{key}={value} does not divide the {size} ranks of this run{_beside(settings, key)}"


def _in_the_way(settings: ParallelSettings, size: int) -> str:
    """The first axis that does not divide what those before have left; the last where only all together do not."""
    if _is_uneven(settings):
        return "shard" if settings.shard < settings.expert else "expert"
    left = size
    for key in ("tensor", "pipeline"):
        if left % getattr(settings, key):
            return key
        left //= getattr(settings, key)
    return next((key for key in ("shard", "expert") if left % getattr(settings, key)), "context")


def _ways_out(settings: ParallelSettings, size: int) -> list[str]:
    """Another number of ranks, and another value of one key, as far as they are possible alone; else both at once."""
    ways, unit = [], _unit(settings)
    start = _wanted(settings) if settings.replicate else max(size // unit, 1) * unit
    if _fits(settings, start):
        ways.append(f"start {start} of them (torchrun --nproc-per-node {start})")
    changes = list(_changes(settings, size))
    possible = (change for change in changes if _fits(settings.model_copy(update=change), size))
    ways += [_in_words(change) for change in islice(possible, 1)]
    if ways:
        return ways
    free = settings.model_copy(update={"replicate": None})
    change = next(c for c in changes if not _is_uneven(free.model_copy(update=c)))
    start = _unit(free.model_copy(update=change))
    return [f"{_in_words(change)}, set nothing for parallel.replicate and start {start} of them"]


def _changes(settings: ParallelSettings, size: int) -> Iterator[dict[str, int | None]]:
    """Of one key each, those of the key that is in the way before others, and of a key the nearest value first."""
    if settings.replicate is not None:
        yield {"replicate": None}
    first = _in_the_way(settings, size)
    for key in (first, *(axis for axis in AXES if axis != first)):
        now = getattr(settings, key)
        for value in sorted(divisors(size), key=lambda d: (abs(d - now), d)):
            yield {key: value}


def _in_words(change: dict[str, int | None]) -> str:
    (key, value), *_ = change.items()
    return f"leave parallel.{key} out" if value is None else f"set parallel.{key}={value}"


def _beside(settings: ParallelSettings, key: str = "") -> str:
    """The other axes, where there are some."""
    told = [f"{axis} {getattr(settings, axis)}" for axis in AXES if axis != key and getattr(settings, axis) > 1]
    return f" beside {', '.join(told)}" if told else ""


def build_mesh(settings: ParallelSettings, contexts: Mapping[int, str], world: World, device: torch.device) -> Mesh:
    """The mesh of this run's ranks; all of them have to call. contexts: how many ranks hold rows together
    in some stage, and the key that says so.

    Groups are made all at once and in one order: ranks that make them in different orders wait for each other for good.
    Raises Refusal, on every rank, where the ranks do not divide as the settings say.
    """
    grid = grid_of(settings, world.size)
    for size, key in contexts.items():
        if grid.data % size:
            near = min(divisors(grid.data), key=lambda d: (abs(d - size), d))
            unit = _unit(settings, *contexts)
            start = f", or start {max(world.size // unit, 1) * unit} of them" if settings.replicate is None else ""
            raise Refusal(
                f"{key}={size} does not divide the {grid.data} ranks of this run that have tokens of their own; set"
                f" {key}={near}{start}"
            )
    if world.size == 1:
        return Mesh(grid, world, {})
    groups = dict(_groups(grid))
    dense = experts = None
    if grid.shard > 1:
        dense = _shards(grid, device, ("pipeline", "replicate", "shard", "tensor"))
    if grid.length("expert_shard") > 1:
        axes: tuple[Axis, ...] = ("pipeline", "expert_replicate", "expert_shard", "expert", "tensor")
        experts = dense if grid.expert == 1 else _shards(grid, device, axes)
    return Mesh(grid, world, groups, dense, experts)


def _groups(grid: Grid) -> Iterator[tuple[str, dist.ProcessGroup]]:
    """A group along each axis that needs one; those that a DeviceMesh makes for FSDP are beside them."""
    axes: tuple[Axis, ...] = ("data", "shard", "expert", "expert_shard", "expert_replicate", "tensor", "pipeline")
    for axis in axes:
        if grid.length(axis) > 1:
            yield axis, group_along(grid.size, *grid.line(axis))


def group_along(size: int, stride: int, length: int) -> dist.ProcessGroup:
    """This rank's group of all those of `length` ranks that are `stride` apart; every rank has to call."""
    if length == size:
        assert dist.group.WORLD is not None, "the ranks have been joined"
        return dist.group.WORLD
    lines = torch.arange(size).view(-1, length, stride).transpose(1, 2).reshape(-1, length)
    group, _ = dist.new_subgroups_by_enumeration(lines.tolist())
    return group


def _shards(grid: Grid, device: torch.device, axes: tuple[Axis, ...]) -> DeviceMesh:
    """A mesh of all ranks along these axes, outermost first, and of it the part that FSDP cuts and sums over."""
    shape = [grid.length(axis) for axis in axes]
    whole = init_device_mesh(device.type, tuple(shape), mesh_dim_names=tuple(axes))
    replicas, shards = axes[1], axes[2]
    return whole[shards] if grid.length(replicas) == 1 else whole[replicas, shards]
