"""Expert parallelism: the ranks of a group share the experts of each layer, and in nothing else are tied together."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moe.exchange import Exchange
from moe.layer import MoE
from parallel.mesh import ParallelSettings, build_grid, divisors
from parallel.world import World
from parallel.shard import Shard, mark_shard


def check_experts(settings: ParallelSettings, num_experts: int | None) -> None:
    """Raise ValueError where a model of so many experts, or of none, cannot be shared as the settings say."""
    if settings.expert == 1:
        return
    if num_experts is None:
        raise ValueError(
            f"parallel.expert={settings.expert} shares experts, but the model has none; leave it out or give model.moe"
        )
    if num_experts % settings.expert:
        divisor = min(divisors(num_experts), key=lambda d: (abs(d - settings.expert), d))
        more = num_experts + -num_experts % settings.expert
        raise ValueError(
            f"model.moe.num_experts={num_experts} must be divisible by parallel.expert={settings.expert};"
            f" try parallel.expert={divisor} or model.moe.num_experts={more}"
        )


def expert_mesh(settings: ParallelSettings, world: World, device: torch.device) -> DeviceMesh | None:
    """The ranks as a grid: along `expert` they share experts, along `replica` they hold the same; None where none do.

    Raises Refusal, on every rank, when the ranks do not divide into groups of that size.
    """
    if settings.expert == 1:
        return None
    return build_grid("parallel.expert", settings.expert, world, device, ("replica", "expert"))


def shard_experts(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """Leave on each rank its own experts of an initialised model, and let tokens travel to them.

    The values are slices of the whole model's, so that they do not depend on the number of ranks.
    """
    if mesh is None:
        return
    shard = Shard(owners=mesh.get_group("expert"), replicas=mesh.get_group("replica"))
    for module in model.modules():
        if isinstance(module, MoE):
            whole = dict(module.experts.named_parameters(recurse=False))
            module.dispatcher = Exchange(shard.owners, len(module.experts.down))
            for name, parameter in whole.items():
                # A copy, as a view would keep the whole tensor alive.
                own = nn.Parameter(shard.cut(parameter.detach()).clone(), requires_grad=parameter.requires_grad)
                mark_shard(own, shard)
                setattr(module.experts, name, own)
