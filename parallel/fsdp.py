"""Sharding: ranks cut weights, gradients and moments among them (ZeRO-3), by torch's FSDP2, a layer at a time.

Products take weights in the run's precision: these are gathered in it, half the bytes under bf16, and give the very
numbers that autocast gives of whole weights. Routers, norms, embedding and head are gathered in fp32.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from model.block import Block
from model.transformer import Transformer
from moe.layer import MoE
from parallel.layout import Layout
from parallel.mesh import Axis, Grid, Mesh
from parallel.pipeline import roots_of


def shard(model: Transformer, mesh: Mesh, dtype: torch.dtype) -> None:
    """Cut every parameter of a model on the meta device, as `cut_shards` says. dtype: of the run's products."""
    if mesh.dense is None:
        return
    own = {parameter for moe in _moes(model) for parameter in (moe.experts.gate_up, moe.experts.down)}
    apart: dict[str, Any] = {"ignored_params": own} if mesh.experts is None else {}
    # A pipeline goes through its layers many times a step: weights stay whole meanwhile, and so do gradients.
    keeps: dict[str, Any] = {"reshard_after_forward": False} if mesh.grid.pipeline > 1 else {}
    apart |= keeps
    low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in (module for module in model.modules() if isinstance(module, Block)):
        feed_forward = block.feed_forward
        if isinstance(feed_forward, MoE) and mesh.experts is not None:
            length = mesh.grid.length("shard" if mesh.experts is mesh.dense else "expert_shard")
            fully_shard(
                feed_forward.experts,
                mesh=mesh.experts,
                mp_policy=low,
                shard_placement_fn=partial(_placement, length),
                **keeps,
            )
        if dtype != torch.float32:
            # Head norms, norms of latents and sinks stay with the block, in fp32.
            products: list[nn.Module] = [
                module for module in block.attention.modules() if isinstance(module, nn.Linear)
            ]
            fully_shard(products, mesh=mesh.dense, mp_policy=low, **apart)
            dense = feed_forward.shared if isinstance(feed_forward, MoE) else feed_forward
            if dense is not None:
                fully_shard(dense, mesh=mesh.dense, mp_policy=low, **apart)
        fully_shard(block, mesh=mesh.dense, **apart)
    for root in roots_of(model):
        fully_shard(root, mesh=mesh.dense, **apart)
    for module in (each for root in roots_of(model) for each in root.modules()):
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def cut_shards(model: nn.Module, grid: Grid, layouts: dict[str, Layout]) -> None:
    """Say of every parameter which part a rank keeps between steps, and that its gradient is summed there.

    Experts are cut among the ranks that hold the same ones.
    """
    names = expert_names(model)
    for name, parameter in model.named_parameters():
        is_expert = name in names
        if is_expert and grid.length("expert_shard") == 1:
            continue  # each rank of the shards has experts of its own
        axis: Axis = "expert_shard" if is_expert and grid.expert > 1 else "shard"
        dim = _dim(parameter, grid.length(axis)) if is_expert else 0
        layout = layouts[name].cut(axis, dim)
        layouts[name] = Layout(layout.shape, layout.dtype, layout.cuts, layout.stage, _left(layout))


def expert_names(model: nn.Module) -> set[str]:
    """The names of routed experts' weights."""
    prefixes = {module: prefix for prefix, module in model.named_modules()}
    return {f"{prefixes[moe.experts]}.{name}" for moe in _moes(model) for name in ("gate_up", "down")}


def sync_replicas(model: nn.Module, is_last: bool) -> None:
    """Of shards that are held several times: add up over replicas with the last micro-batch alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)


def reshard(model: nn.Module) -> None:
    """Let go of what the last forward pass has gathered for a backward pass that does not come."""
    if isinstance(model, FSDPModule):
        model.reshard()


def _moes(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def _placement(length: int, parameter: nn.Parameter) -> Shard:
    return Shard(_dim(parameter, length))


def _dim(parameter: nn.Parameter, length: int) -> int:
    """Where a stack of matrices is cut: between experts where every rank gets some, else within each."""
    if parameter.shape[0] % length == 0:
        return 0
    return next((dim for dim in (1, 2) if parameter.shape[dim] % length == 0), 0)


def _left(layout: Layout) -> tuple[Axis, ...]:
    """What FSDP does not add up: parts of sums over ranks that work on the same tokens."""
    return tuple(axis for axis in layout.sums if axis == "tensor")
