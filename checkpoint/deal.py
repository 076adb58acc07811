"""Which rank writes which tensors of a checkpoint, and who sends it parts: arithmetic, alike on all ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from checkpoint.manifest import cut_name
from checkpoint.tensor_file import Outline, outline
from parallel.layout import Layout, Layouts
from parallel.mesh import Grid

FILE_BYTES = 256 << 20
"""A rank more writes for each so many bytes: small files stay what they are for one process, a file on rank 0."""


class Held(NamedTuple):
    """A tensor that lies on this rank, or its part of one."""

    tensor: Tensor
    owner: str | None
    """The parameter or buffer that it lies as; None: all of it is here."""


Holdings: TypeAlias = dict[str, dict[str, Held]]
"""What a rank has, by file and name: {"model.safetensors": {"head.weight": ...}, ...}."""
Words: TypeAlias = dict[str, Any]
"""The same in JSON, without the tensors, for the other ranks."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    name: str
    layout: Layout
    """Of the whole, with the dtype that it is saved in."""
    sources: tuple[int, ...]
    """The ranks whose parts make it once; the writer is among them where it has one."""
    number: int
    """Among all tensors of the checkpoint."""

    @property
    def outline(self) -> Outline:
        return outline(self.layout.dtype, self.layout.shape)


@dataclass(frozen=True)
class FileDeal:
    """A file, the rank that writes it, and what comes into it, in that order."""

    name: str
    writer: int
    entries: tuple[Entry, ...]
    tied: Mapping[str, str]


def describe(holdings: Holdings, tied: Mapping[str, str], layouts: Layouts, grid: Grid, rank: int) -> Words:
    """What a rank has, in words for the others; raises ValueError where a part is not what its layout says."""
    words: Words = {"tied": dict(tied)}
    for file, named in holdings.items():
        words[file] = {}
        for name, (tensor, owner) in named.items():
            if owner is not None:
                if owner not in layouts:
                    raise ValueError(f"{name}: nothing says how {owner} lies on the ranks")
                expected = layouts[owner].part_shape(grid, rank)
                if expected != tensor.shape:
                    raise ValueError(f"{name}: rank {rank} has {tuple(tensor.shape)}, its layout {tuple(expected)}")
            words[file][name] = [owner, outline(tensor.dtype, tensor.shape)]
    return words


def deal(words: Sequence[Words], layouts: Layouts, grid: Grid) -> tuple[FileDeal, ...]:
    """Deal all tensors out to ranks that write them; words: of every rank, in their order.

    Raises ValueError, alike on every rank, where nobody has a part that a layout speaks of.
    """
    tied = {alias: kept for said in words for alias, kept in said["tied"].items()}
    known = {name for said in words for name in said["model.safetensors"]}
    missing = [name for name in layouts if name not in known and name not in tied]
    if missing:
        raise ValueError(f"no rank holds {', '.join(missing[:5])}")
    files, number = [], 0
    for file in (key for key in words[0] if key != "tied"):
        wholes = _wholes(file, words, layouts)
        count = max(1, min(grid.size, len(wholes), sum(map(_bytes, wholes.values())) // FILE_BYTES))
        for place, names in enumerate(_shares(wholes, count)):
            writer, entries = place * grid.size // count, []
            for name in names:
                sources = _sources(name, wholes[name], [said[file] for said in words], grid, writer)
                entries.append(Entry(name, wholes[name], sources, number))
                number += 1
            here = {alias: kept for alias, kept in tied.items() if kept in names}
            files.append(FileDeal(cut_name(file, place, count), writer, tuple(entries), here))
    return tuple(files)


def _wholes(file: str, words: Sequence[Words], layouts: Layouts) -> dict[str, Layout]:
    """How each tensor of a file lies, in one order on every rank: of the model, in that of its layouts."""
    wholes: dict[str, Layout] = {}
    for said in words:
        for name, (owner, facts) in said[file].items():
            dtype, shape = getattr(torch, facts["dtype"]), torch.Size(facts["shape"])
            layout = Layout(shape, dtype) if owner is None else replace(layouts[owner], dtype=dtype)
            if wholes.setdefault(name, layout) != layout:
                raise ValueError(f"{name}: ranks have it as {wholes[name]} and as {layout}")
    order = {name: place for place, name in enumerate(layouts)}
    return dict(sorted(wholes.items(), key=lambda item: order.get(item[0], len(order))))


def _shares(wholes: Mapping[str, Layout], count: int) -> list[list[str]]:
    """Names in so many shares of about as many bytes; wider numbers first, so that each begins at its own multiple."""
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(wholes, key=lambda name: -_bytes(wholes[name])):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += max(_bytes(wholes[name]), 1)
    place = {name: place for place, name in enumerate(wholes)}
    return [sorted(share, key=lambda name: (-wholes[name].dtype.itemsize, place[name])) for share in shares]


def _sources(name: str, layout: Layout, words: Sequence[Words], grid: Grid, writer: int) -> tuple[int, ...]:
    """The ranks whose parts make a tensor once, the writer's among them; words: of its file alone."""
    if not layout.shape.numel():
        return ()
    having = [rank for rank, said in enumerate(words) if name in said]
    if words[having[0]][name][0] is None:
        return (writer if writer in having else having[0],)
    bare = Layout(layout.shape, cuts=layout.cuts, stage=layout.stage)
    places = _place(bare, grid, writer)
    sources = tuple(writer if _place(bare, grid, rank) == places else rank for rank in _owners(bare, grid))
    lacking = [rank for rank in sources if rank not in having]
    if lacking:
        raise ValueError(f"{name}: rank {lacking[0]} should have a part of it, and has none")
    return sources


def _place(layout: Layout, grid: Grid, rank: int) -> tuple[int, ...] | None:
    """What tells a rank's part from others'; None where it has none."""
    return tuple(grid.place(cut.axis, rank) for cut in layout.cuts) if layout.has(grid, rank) else None


@lru_cache(maxsize=4096)
def _owners(layout: Layout, grid: Grid) -> list[int]:
    return layout.owners(grid)


def _bytes(layout: Layout) -> int:
    return math.prod(layout.shape) * layout.dtype.itemsize
