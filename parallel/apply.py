"""What is done to a model from outside, on the meta device, before it has values: the whole order on one screen."""

import torch

from model.block import Offload
from model.feed_forward import FeedForward
from model.norm import RMSNorm
from model.transformer import Transformer
from parallel.experts import split_experts
from parallel.fsdp import cut_shards, shard
from parallel.layout import Layout, Layouts, whole_layouts
from parallel.mesh import Axis, Mesh, PipeliningSettings
from parallel.offload import offload_layers
from parallel.pipeline import split_layers
from parallel.recompute import BudgetSettings, RecomputeSettings, recompute_layers
from parallel.tensor import split_tensors

ONE_BY_ONE = PipeliningSettings()


def parallelize(
    model: Transformer,
    mesh: Mesh,
    *,
    compile: bool,
    recompute: RecomputeSettings,
    dtype: torch.dtype = torch.float32,
    pipelining: PipeliningSettings = ONE_BY_ONE,
    offload: Offload | None = None,
) -> Layouts:
    """Leave on this rank its part of everything, and say how all of it lies. dtype: of the run's products.

    recompute: a budget's choice is made where a stage is entered; until then everything is run again. offload: where
    activations lie from forward to backward, if not where they are made.
    """
    layouts = whole_layouts(model)
    split_tensors(model, mesh, layouts)
    split_experts(model, mesh, layouts)
    for name, layout in layouts.items():
        layouts[name] = Layout(layout.shape, layout.dtype, layout.cuts, layout.stage, sums_of(layout, mesh))
    if mesh.dense is not None:
        cut_shards(model, mesh.grid, layouts)
    split_layers(model, mesh, pipelining, layouts)  # from here on only this rank's layers are here
    recompute_layers(model, "full" if isinstance(recompute, BudgetSettings) else recompute)
    offload_layers(model, offload)
    if compile:
        compile_layers(model)
    shard(model, mesh, dtype)
    return layouts


def sums_of(layout: Layout, mesh: Mesh) -> tuple[Axis, ...]:
    """The axes along which gradients are parts of a sum: all that have other tokens, and all that cut other tensors."""
    tokens: Axis = "expert_replicate" if layout.is_cut("expert") else "data"
    axes: tuple[Axis, ...] = (tokens,) if layout.is_cut("tensor") else (tokens, "tensor")
    return tuple(axis for axis in axes if mesh.grid.length(axis) > 1)


def compile_layers(model: Transformer) -> None:
    """Compile what has fixed shapes: norms and dense feed-forwards.

    Their shapes never change within a stage, while the lengths of packed documents and the rows of an expert differ
    from step to step and would be compiled anew each time.
    """
    for module in model.modules():
        if isinstance(module, FeedForward | RMSNorm):
            module.compile()
