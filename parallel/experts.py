"""Expert parallelism: the ranks of a group share the experts of each layer, and in nothing else are tied together."""

from torch import nn

from moe.choice import MOST_EXPERTS
from moe.exchange import Exchange
from moe.layer import MoE
from parallel.layout import Layout, cut_parameter
from parallel.mesh import Mesh, ParallelSettings, divisors


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
        other = f" or model.moe.num_experts={more}" if more <= MOST_EXPERTS else ""
        raise ValueError(
            f"model.moe.num_experts={num_experts} must be divisible by parallel.expert={settings.expert};"
            f" try parallel.expert={divisor}{other}"
        )


def split_experts(model: nn.Module, mesh: Mesh, layouts: dict[str, Layout]) -> None:
    """Leave on each rank its own experts of a model on the meta device, and let tokens travel to them."""
    group = mesh.group("expert")
    if group is None:
        return
    for prefix, module in model.named_modules():
        if isinstance(module, MoE):
            module.dispatcher = Exchange(group, len(module.experts.down))
            for name in ("gate_up", "down"):
                key = f"{prefix}.experts.{name}"
                cut = layouts[key] = layouts[key].cut("expert", 0)
                cut_parameter(module.experts, name, mesh.grid, mesh.world.rank, cut)
