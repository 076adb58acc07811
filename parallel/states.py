"""What weights, gradients and moments come to on each rank of a grid, exactly, before there are any ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch.distributed as dist
from torch import nn

from model.kept import FP32
from model.share import States
from model.transformer import ModelSettings, Transformer, build_model
from optim.groups import is_hidden_matrix
from parallel.apply import sums_of
from parallel.experts import split_experts
from parallel.fsdp import cut_shards
from parallel.layout import Layout, whole_layouts
from parallel.mesh import Axis, Grid, Mesh
from parallel.pipeline import stage_of
from parallel.tensor import split_tensors
from parallel.world import World


@dataclass(frozen=True)
class Imagined:
    """Stands for a process group where nothing is sent: how many ranks it has, and which this would be."""

    length: int
    place: int

    def size(self) -> int:
        return self.length

    def rank(self) -> int:
        return self.place


def imagined_mesh(grid: Grid, rank: int) -> Mesh:
    """The mesh as a rank of the grid would see it."""
    axes: tuple[Axis, ...] = ("data", "expert", "expert_replicate", "tensor", "pipeline")
    groups = {axis: Imagined(grid.length(axis), grid.place(axis, rank)) for axis in axes if grid.length(axis) > 1}
    return Mesh(grid, World(rank, grid.size, 0), cast(Mapping[str, dist.ProcessGroup], groups))


def layouts_on(model: Transformer, grid: Grid, parts_per_rank: int = 1) -> dict[str, Layout]:
    """What `parallelize` would say of a model on the meta device, which it cuts; parts_per_rank: of a pipeline."""
    mesh, layouts = imagined_mesh(grid, 0), whole_layouts(model)
    num_layers = model.settings.num_layers
    split_tensors(model, mesh, layouts)
    split_experts(model, mesh, layouts)
    parts = grid.pipeline * parts_per_rank
    for name, layout in layouts.items():
        stage = stage_of(name, grid.pipeline, parts, num_layers) if grid.pipeline > 1 else None
        layouts[name] = Layout(layout.shape, layout.dtype, layout.cuts, stage, sums_of(layout, mesh))
    if grid.shard > 1:
        cut_shards(model, grid, layouts)
    return layouts


def states_by_stage(
    settings: ModelSettings, vocab_size: int, optimizer: str, grid: Grid, parts_per_rank: int = 1
) -> list[States]:
    """Of the rank with the largest parts, for each place along the pipeline."""
    return list(_states_by_stage(settings, vocab_size, optimizer, grid, parts_per_rank))


@lru_cache(maxsize=256)
def _states_by_stage(
    settings: ModelSettings, vocab_size: int, optimizer: str, grid: Grid, parts_per_rank: int
) -> tuple[States, ...]:
    """As above, once for each: plans ask again and again, and models have to be built for the answer."""
    model = build_model(settings, vocab_size)
    shapes = dict(build_model(settings, vocab_size).named_parameters())
    layouts = layouts_on(model, grid, parts_per_rank)
    return tuple(_states(shapes, layouts, optimizer, grid, stage) for stage in range(grid.pipeline))


def _states(
    parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout], optimizer: str, grid: Grid, stage: int
) -> States:
    rank = stage * (grid.size // grid.pipeline)  # parts are equal, but for the last: the first rank has the most
    weights = moments = 0
    summed: dict[str, int] = {}
    for name, parameter in parameters.items():
        layout = layouts[name]
        if not layout.has(grid, rank):
            continue
        size = layout.part_shape(grid, rank).numel()
        weights += FP32 * size
        # AdamW has two moments and counts its steps for each tensor; Muon has one.
        moments += FP32 * (size if optimizer == "muon" and is_hidden_matrix(name, parameter) else 2 * size + 1)
        for axis in layout.sums:
            summed[axis] = summed.get(axis, 0) + FP32 * size
    return States(weights, moments, max(summed.values(), default=0))
