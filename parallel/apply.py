"""What is done to a model from outside, on the meta device, before it has values: the whole order on one screen."""

from typing import Protocol

import torch

from model.feed_forward import FeedForward
from model.norm import RMSNorm
from model.transformer import Transformer
from parallel.experts import split_experts
from parallel.fsdp import cut_shards, shard
from parallel.layout import Layout, Layouts, whole_layouts
from parallel.mesh import Axis, Mesh, ParallelSettings
from parallel.offload import build_offload, offload_layers
from parallel.pipeline import split_layers
from parallel.recompute import BudgetSettings, RecomputeSettings, recompute_layers
from parallel.tensor import split_tensors


class Asked(Protocol):
    """What a run asks for; its configuration is one."""

    @property
    def parallel(self) -> ParallelSettings: ...
    @property
    def recompute(self) -> RecomputeSettings: ...
    @property
    def offload(self) -> bool: ...
    @property
    def compile(self) -> bool: ...


def parallelize(
    model: Transformer, mesh: Mesh, asked: Asked, device: torch.device, dtype: torch.dtype = torch.float32
) -> Layouts:
    """Leave on this rank its part of everything, and say how all of it lies. dtype: of the run's products on device.

    A memory budget's choice of what to run again is made where a stage is entered; until then all of it is.
    """
    layouts = whole_layouts(model)
    split_tensors(model, mesh, layouts)
    split_experts(model, mesh, layouts)
    for name, layout in layouts.items():
        layouts[name] = Layout(layout.shape, layout.dtype, layout.cuts, layout.stage, sums_of(layout, mesh))
    if mesh.dense is not None:
        cut_shards(model, mesh.grid, layouts)
    split_layers(model, mesh, asked.parallel.pipelining, layouts)  # from here on only this rank's layers are here
    recompute_layers(model, "full" if isinstance(asked.recompute, BudgetSettings) else asked.recompute)
    offload_layers(model, build_offload(device, is_wanted=asked.offload))
    if asked.compile:
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
