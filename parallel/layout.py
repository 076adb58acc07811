"""How a tensor lies on the ranks: arithmetic that says which rank has which of its elements.

Nothing here is sent, and no process group is asked: any rank can work out what any other holds. Checkpoints, first
values and the gradient's norm all follow from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from parallel.mesh import Axis, Grid

Index = tuple[slice | Tensor, ...]
"""One entry a dimension: what of it, in order."""


@dataclass(frozen=True)
class Cut:
    """Ranks along an axis have parts of a dimension each, in their order, as `torch.chunk` cuts it: equal but the last.

    blocks: so many equal stretches lie along the dimension and each of them is cut, as gate and up in one matrix.
    """

    axis: Axis
    dim: int = 0
    blocks: int = 1


@dataclass(frozen=True)
class Layout:
    """A tensor of the whole model, and how ranks have cut it, the outermost cut first."""

    shape: torch.Size
    """Of the whole."""
    dtype: torch.dtype = torch.float32
    cuts: tuple[Cut, ...] = ()
    stage: int | None = None
    """Its place along `pipeline`; None: every rank there has it."""
    sums: tuple[Axis, ...] = ()
    """Axes along which gradients are to be added up, as nothing else does: neither FSDP nor what layers exchange."""

    def cut(self, axis: Axis, dim: int = 0, blocks: int = 1) -> "Layout":
        """The same, cut once more."""
        return replace(self, cuts=(*self.cuts, Cut(axis, dim, blocks)))

    def is_cut(self, axis: Axis) -> bool:
        return any(cut.axis == axis for cut in self.cuts)

    def has(self, grid: Grid, rank: int) -> bool:
        """Whether a rank holds any of it."""
        return self.stage is None or grid.place("pipeline", rank) == self.stage

    def index(self, grid: Grid, rank: int) -> Index:
        """What a rank holds of each dimension: slices where it is one stretch, else numbers."""
        return _index(self, grid, rank)

    def part_shape(self, grid: Grid, rank: int) -> torch.Size:
        """The shape of what a rank holds; a dimension may come to 0."""
        return _part_shape(self, grid, rank)

    def take(self, whole: Tensor, grid: Grid, rank: int) -> Tensor:
        """A rank's part of the whole tensor: a view where it is one stretch, else a copy."""
        return whole[self.index(grid, rank)]

    def put(self, whole: Tensor, part: Tensor, grid: Grid, rank: int) -> None:
        """Write a rank's part where it belongs in the whole tensor."""
        whole[self.index(grid, rank)] = part.to(whole.device)

    def copies(self, grid: Grid) -> int:
        """How many ranks hold each element."""
        holders = grid.size if self.stage is None else grid.size // grid.pipeline
        for cut in self.cuts:
            holders //= grid.length(cut.axis)
        return holders

    def owners(self, grid: Grid) -> list[int]:
        """The ranks whose parts, not empty, make the whole tensor once: of those with the same part, the first."""
        return list(_owners(self, grid))


Layouts = Mapping[str, Layout]
"""Of every parameter and persistent buffer of the whole model by name, those of other ranks' layers included."""


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies here: a DTensor's own part, and any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole_layouts(model: nn.Module) -> dict[str, Layout]:
    """Of a model that no rank has cut."""
    return {name: Layout(tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}


def cut_parameter(module: nn.Module, name: str, grid: Grid, rank: int, layout: Layout) -> None:
    """Leave of a parameter, on the meta device, what the layout gives to a rank."""
    whole = getattr(module, name)
    part = torch.empty(layout.part_shape(grid, rank), dtype=whole.dtype, device=whole.device)
    setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))


def _as_slice(numbers: Tensor) -> slice | Tensor:
    if len(numbers) == 0:
        return slice(0, 0)
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers


# Layers are alike, so few layouts are asked about again and again: at every step by Muon, for all ranks by checkpoints.
@lru_cache(maxsize=1 << 16)
def _index(layout: Layout, grid: Grid, rank: int) -> Index:
    numbers: dict[int, Tensor] = {}
    for cut in layout.cuts:
        length, place = grid.length(cut.axis), grid.place(cut.axis, rank)
        whole = numbers.get(cut.dim, torch.arange(layout.shape[cut.dim])).view(cut.blocks, -1)
        size = -(-whole.shape[1] // length)
        numbers[cut.dim] = whole[:, place * size : (place + 1) * size].flatten()
    # Numbers in two dimensions would be paired, not crossed; cuts in blocks are never in two.
    return tuple(_as_slice(numbers[d]) if d in numbers else slice(None) for d in range(len(layout.shape)))


@lru_cache(maxsize=1 << 16)
def _part_shape(layout: Layout, grid: Grid, rank: int) -> torch.Size:
    return torch.empty(layout.shape, device="meta")[_index(layout, grid, rank)].shape


@lru_cache(maxsize=1 << 12)
def _owners(layout: Layout, grid: Grid) -> tuple[int, ...]:
    first: dict[tuple[int, ...], int] = {}
    for rank in range(grid.size):
        if layout.has(grid, rank) and 0 not in layout.part_shape(grid, rank):
            first.setdefault(tuple(grid.place(cut.axis, rank) for cut in layout.cuts), rank)
    return tuple(sorted(first.values()))
