"""Who takes part in benchmarks.moe: our layer in each way to multiply, and other people's layers on equal weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.dispatch import sort_rows
from moe.experts import MATMULS, unavailable
from moe.layer import MoE, MoESettings
from settings import Refusal


@dataclass(frozen=True)
class Shape:
    """One MoE layer and the tokens that go through it; `theirs` names the transformers block of the kind."""

    name: str
    tokens: int
    width: int
    experts: int
    per_token: int
    expert_width: int
    theirs: str

    @property
    def flops(self) -> int:
        """Of all products of a forward and a backward pass, the router's included; nothing is computed twice."""
        rows = self.tokens * self.per_token
        return 18 * rows * self.width * self.expert_width + 6 * self.tokens * self.width * self.experts


SHAPES = {
    "cpu": (
        Shape("8 experts", 2048, 256, 8, 2, 256, "mixtral"),
        Shape("16 experts", 2048, 256, 16, 2, 256, "olmoe"),
        Shape("64 experts", 2048, 256, 64, 8, 128, "qwen3"),
    ),
    "cuda": (
        Shape("OLMoE", 32768, 2048, 64, 8, 1024, "olmoe"),
        Shape("Qwen3-30B", 32768, 2048, 128, 8, 768, "qwen3"),
        Shape("Mixtral", 16384, 4096, 8, 2, 14336, "mixtral"),
        Shape("DeepSeek-V3, 1/8 of the experts", 8192, 7168, 32, 8, 2048, "qwen3"),
    ),
}


@dataclass(frozen=True)
class Weights:
    """The same for all: unit-scale tokens stay of unit scale, and the router prefers some experts to others."""

    router_ED: Tensor
    gate_up: Tensor
    down: Tensor


def make_weights(shape: Shape, dtype: torch.dtype, device: str) -> Weights:
    torch.manual_seed(0)
    experts, width, hidden = shape.experts, shape.width, shape.expert_width
    sizes = ((experts, width), (experts, 2 * hidden, width), (experts, width, hidden))
    return Weights(*(torch.randn(size, dtype=dtype, device=device) / size[-1] ** 0.5 for size in sizes))


def settings_of(shape: Shape) -> dict[str, Any]:
    return {
        "num_experts": shape.experts,
        "experts_per_token": shape.per_token,
        "expert_width": shape.expert_width,
    }


class Ours(nn.Module):
    """Our whole layer: router, sort, experts and combine."""

    def __init__(self, way: str, recompute: str, shape: Shape, weights: Weights) -> None:
        super().__init__()
        device, dtype = weights.down.device.type, weights.down.dtype
        reason = unavailable(way, device, dtype, shape.width, shape.expert_width)
        if reason is not None:
            raise Refusal(reason)
        settings = settings_of(shape) | {"experts": way, "recompute": recompute}
        with torch.device("meta"):
            self.layer = MoE(MoESettings.model_validate(settings), shape.width)
        self.layer.router.weight = nn.Parameter(weights.router_ED)
        self.layer.experts.gate_up = nn.Parameter(weights.gate_up)
        self.layer.experts.down = nn.Parameter(weights.down)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.layer(x_BTD)[0]


class Functional(nn.Module):
    """Somebody's function of (x, chosen, gates, gate_up, down) behind our router."""

    def __init__(self, multiply: Callable[..., Tensor], shape: Shape, weights: Weights) -> None:
        super().__init__()
        with torch.device("meta"):
            self.router = MoE(MoESettings.model_validate(settings_of(shape)), shape.width).router
        self.router.weight = nn.Parameter(weights.router_ED)
        self.gate_up, self.down = nn.Parameter(weights.gate_up), nn.Parameter(weights.down)
        self.multiply = multiply

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        stats = self.router(x_ND)
        return self.multiply(x_ND, stats.chosen_NK, stats.gates_NK, self.gate_up, self.down).view_as(x_BTD)


def plain_grouped_mm(shape: Shape, weights: Weights) -> nn.Module:
    """torch.nn.functional.grouped_mm as one would write it: plain autograd over each step."""

    def multiply(x_ND: Tensor, chosen_NK: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        plan = sort_rows(chosen_NK, len(down))
        z_RJ = F.grouped_mm(x_ND[plan.tokens_R], gate_up.transpose(1, 2), offs=plan.offsets_E)
        gate, up = z_RJ.chunk(2, dim=1)
        y_RD = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=plan.offsets_E)
        return (y_RD[plan.places_NK] * gates_NK[..., None]).sum(dim=1).to(x_ND.dtype)

    return Functional(multiply, shape, weights)


def liger(shape: Shape, weights: Weights) -> nn.Module:
    """liger-kernel's fused MoE."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def multiply(x_ND: Tensor, chosen_NK: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x_ND, gate_up, down, chosen_NK.int(), gates_NK)

    return Functional(multiply, shape, weights)


def scattermoe(shape: Shape, weights: Weights) -> nn.Module:
    """ScatterMoE's GLUMLP, which has `up` before `gate`."""
    from scattermoe.mlp import GLUMLP

    mlp = GLUMLP(shape.width, shape.expert_width, shape.experts, shape.per_token)
    gate, up = weights.gate_up.chunk(2, dim=1)
    mlp.experts.weight = nn.Parameter(torch.cat([up, gate], dim=1))
    mlp.output_experts.weight = nn.Parameter(weights.down)

    def multiply(x_ND: Tensor, chosen_NK: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return mlp(x_ND, gates_NK.to(x_ND.dtype), chosen_NK)

    layer = Functional(multiply, shape, weights)
    layer.gate_up = layer.down = nn.Parameter(weights.router_ED.new_empty(0))  # the parameters are the mlp's
    layer.mlp = mlp
    return layer


class SonicMoE(nn.Module):
    """SonicMoE's whole layer, its router included; on our weights, of which it wants views."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        super().__init__()
        from sonicmoe import moe_TC_softmax_topk_layer

        self.run = moe_TC_softmax_topk_layer
        self.per_token = shape.per_token
        self.router_ED = nn.Parameter(weights.router_ED)
        self.gate_up, self.down = nn.Parameter(weights.gate_up), nn.Parameter(weights.down)

    def forward(self, x_BTD: Tensor) -> Tensor:
        weights = (self.gate_up.permute(1, 2, 0), None, self.down.permute(1, 2, 0), None)
        stream = torch.cuda.current_stream().cuda_stream
        x_ND = x_BTD.flatten(0, 1)
        out_ND, *_ = self.run(x_ND, self.router_ED, *weights, self.per_token, stream, "swiglu", concat_layout=True)
        return out_ND.view_as(x_BTD)


def transformers(implementation: str, shape: Shape, weights: Weights) -> nn.Module:
    """The sparse block of a Hugging Face model with its experts in eager (a loop over masks) or grouped_mm."""
    config, block = _transformers_block(shape)
    config._experts_implementation = implementation
    with torch.device("meta"):
        layer: Any = block(config)
    layer.gate.weight = nn.Parameter(weights.router_ED)
    layer.experts.gate_up_proj, layer.experts.down_proj = nn.Parameter(weights.gate_up), nn.Parameter(weights.down)
    return layer


def _transformers_block(shape: Shape) -> tuple[Any, Callable[[Any], nn.Module]]:
    sizes: dict[str, Any] = {"hidden_size": shape.width, "num_experts_per_tok": shape.per_token}
    if shape.theirs == "mixtral":
        from transformers.models.mixtral import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        sizes |= {"intermediate_size": shape.expert_width, "num_local_experts": shape.experts}
        return MixtralConfig(**sizes), MixtralSparseMoeBlock
    sizes |= {"num_experts": shape.experts, "norm_topk_prob": True}
    if shape.theirs == "olmoe":
        from transformers.models.olmoe import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

        config = OlmoeConfig(intermediate_size=shape.expert_width, **sizes)
        return config, OlmoeSparseMoeBlock
    from transformers.models.qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    return Qwen3MoeConfig(moe_intermediate_size=shape.expert_width, **sizes), Qwen3MoeSparseMoeBlock


Rival = Callable[[Shape, Weights], nn.Module]
"""Builds a layer (1, T, D) -> (1, T, D) over these weights, or raises what says why it cannot."""

OURS: dict[str, Rival] = {
    "ours, auto": partial(Ours, "auto", "none"),
    "ours, auto, recompute": partial(Ours, "auto", "up"),
}
OURS |= {f"ours, {way}": partial(Ours, way, "none") for way in MATMULS}
THEIRS: dict[str, Rival] = {
    "transformers, eager": partial(transformers, "eager"),
    "transformers, grouped_mm": partial(transformers, "grouped_mm"),
    "torch grouped_mm, plain": plain_grouped_mm,
    "SonicMoE": SonicMoE,
    "Liger": liger,
    "ScatterMoE": scattermoe,
}
