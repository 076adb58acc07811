"""Tensor parallelism: ranks cut heads, inner channels and vocabulary among them, and share out tokens between layers.

Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.2: norms and residuals see T / W tokens on each rank; before
attention and feed-forward layers the tokens are gathered, and behind them each rank's part of every sum is added up and
shared out again. Inside, all ranks have the same tokens and different parts of the answer, so the gradient of whatever
is not cut is a part of a sum over the ranks, norms included. What every rank computes alike there, and adds to the loss
(balance losses), has to be divided by their number.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attention.attention import Attention
from attention.kinds import AnyAttention
from attention.latent import LatentAttention
from context.comm import all_gather, reduce_scatter
from context.layout import chunks_of
from model.feed_forward import FeedForward
from model.transformer import ModelSettings
from moe.experts import Experts
from moe.layer import MoE, SharedExperts
from moe.router import Router
from moe.routing import RoutingStats
from parallel.layout import Layout, cut_parameter
from parallel.mesh import Mesh, ParallelSettings, divisors
from settings import Refusal

TOKENS = 1
"""The dimension of (B, T, D) along which tokens are shared out."""

CUTS: dict[type[nn.Module], tuple[tuple[str, int, int], ...]] = {
    Attention: (("query", 0, 1), ("key", 0, 1), ("value", 0, 1), ("output", 1, 1), ("sink_H", 0, 1)),
    LatentAttention: (("query", 0, 1), ("expand", 0, 1), ("output", 1, 1)),
    FeedForward: (("gate_up", 0, 2), ("down", 1, 1)),
    SharedExperts: (("gate_up", 0, 2), ("down", 1, 1)),
    Experts: (("gate_up", 1, 2), ("down", 2, 1)),
}
"""(a linear layer or a parameter, the dimension that is cut, the blocks in it) of each layer; all else stays whole."""


def check_tensor(settings: ParallelSettings, model: ModelSettings) -> None:
    """Raise ValueError where this model cannot be cut into so many parts."""
    W = settings.tensor
    if W == 1:
        return
    attention, moe = model.attention, model.moe
    sizes = {"model.attention.num_heads": attention.num_heads}
    if attention.kind == "grouped":
        sizes["model.attention.num_kv_heads"] = attention.num_kv_heads
    if model.feed_forward_width is not None:
        sizes["model.feed_forward_width"] = model.feed_forward_width
    if moe is not None:
        sizes["model.moe.expert_width"] = moe.expert_width
    near = min(divisors(math.gcd(*sizes.values())), key=lambda d: (abs(d - W), d))
    for key, size in sizes.items():
        if size % W:
            raise ValueError(f"parallel.tensor={W} does not divide {key}={size}; try parallel.tensor={near}")


def check_rows(settings: ParallelSettings, sequence_length: int, row_ranks: int, key: str) -> None:
    """Raise ValueError where the tokens of a row that a rank holds cannot be shared out. key: of the length."""
    W, kind = settings.tensor, settings.sequence.layout
    chunks = chunks_of(kind, settings.sequence.chunks_per_rank) if row_ranks > 1 else 1
    # As many as it holds of a row that is padded to whole chunks, which is all of one that no others hold.
    held = -(-sequence_length // (row_ranks * chunks)) * chunks
    if held % W:
        together = row_ranks * math.lcm(W, chunks)
        near = max(1, round(sequence_length / together)) * together
        of = f" of the {held} that each of {row_ranks} ranks holds of a row" if row_ranks > 1 else ""
        raise ValueError(
            f"{key}={sequence_length} must be a multiple of {together}, as parallel.tensor={W} ranks share out its"
            f" tokens{of}; try {near}"
        )


def split_tensors(model: nn.Module, mesh: Mesh, layouts: dict[str, Layout]) -> None:
    """Cut the layers of a model on the meta device, and let tokens be gathered and shared out around them."""
    group = mesh.group("tensor")
    if group is None:
        return
    for prefix, module in list(model.named_modules()):
        for name, dim, blocks in CUTS.get(type(module), ()):
            for owner, leaf, key in _parameters(module, prefix, name):
                layout = layouts[key] = layouts[key].cut("tensor", dim, blocks)
                cut_parameter(owner, leaf, mesh.grid, mesh.world.rank, layout)
        if isinstance(module, LatentAttention):
            heads = module.settings.num_heads // group.size()
            module.settings = module.settings.model_copy(update={"num_heads": heads})
        if isinstance(module, AnyAttention | MoE | FeedForward):
            module.register_forward_pre_hook(_gather_before(group))
            module.register_forward_hook(_share_out_after(group))
        if isinstance(module, Router):
            module.register_forward_hook(_divide_copies(group.size()))
    _split_ends(model, mesh, layouts, group)


def _split_ends(model: nn.Module, mesh: Mesh, layouts: dict[str, Layout], group: dist.ProcessGroup) -> None:
    """Of embedding, head and final norm those that are here: of a pipeline's model, each rank has a part."""
    if "embedding.weight" in layouts:  # on every rank of a pipeline
        _check_vocabulary(layouts["embedding.weight"].shape[0], group.size())
    embedding, head, norm = (getattr(model, name, None) for name in ("embedding", "head", "norm"))
    if isinstance(embedding, nn.Embedding):
        layout = layouts["embedding.weight"] = layouts["embedding.weight"].cut("tensor", 0)
        cut = VocabularyEmbedding(layout.shape[0], nn.Parameter(embedding.weight), group)
        cut_parameter(cut, "weight", mesh.grid, mesh.world.rank, layout)
        model.embedding = cut
    if isinstance(head, nn.Linear):
        layout = layouts["head.weight"] = layouts["head.weight"].cut("tensor", 0)
        cut_parameter(head, "weight", mesh.grid, mesh.world.rank, layout)
    if isinstance(norm, nn.Module):
        norm.register_forward_hook(lambda _module, _inputs, out: gather_tokens(out, group))


def _check_vocabulary(vocab_size: int, num_ranks: int) -> None:
    """Every rank has to have some rows: the last ones have fewer, or none where there are far too many ranks."""

    def fits(ranks: int) -> bool:
        return -(-vocab_size // ranks) * (ranks - 1) < vocab_size

    if not fits(num_ranks):
        near = max(filter(fits, divisors(num_ranks)))
        raise Refusal(
            f"parallel.tensor={num_ranks} leaves some ranks none of the {vocab_size} tokens of the vocabulary; try"
            f" parallel.tensor={near}"
        )


def _parameters(module: nn.Module, prefix: str, name: str) -> Iterator[tuple[nn.Module, str, str]]:
    """(its module, its name there, its name in the model) of a layer's weight, or of a parameter, if any."""
    found = getattr(module, name)
    if isinstance(found, nn.Linear):
        yield found, "weight", f"{prefix}.{name}.weight"
    elif found is not None:
        yield module, name, f"{prefix}.{name}"


class VocabularyEmbedding(nn.Module):
    """An embedding whose rows the ranks of a group have cut: tokens (B, T) to this rank's (B, T / W, D)."""

    def __init__(self, vocab_size: int, weight_VD: nn.Parameter, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.group = weight_VD, group
        self.first = group.rank() * -(-vocab_size // group.size())

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Rows of other ranks come as zeros from here, and all ranks' rows are added up."""
        places_BT = tokens_BT - self.first
        is_here_BT = (places_BT >= 0) & (places_BT < len(self.weight))
        rows_BTD = F.embedding(places_BT.where(is_here_BT, 0), self.weight)
        return share_out_tokens(rows_BTD * is_here_BT[..., None], self.group)


def gather_tokens(x_BtD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T / W, D) of each rank to (B, T, D) on all of them; gradients are added up and shared out."""
    return _Gather.apply(x_BtD, group)


def share_out_tokens(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Each rank's part (B, T, D) of a sum to the sum's (B, T / W, D); gradients are gathered."""
    return _ShareOut.apply(x_BTD, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BtD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x_BtD, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None]:
        return _shared_out(grad_BTD, ctx.group), None


class _ShareOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _shared_out(x_BTD, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BtD: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad_BtD, ctx.group), None


def _gathered(x_BtD: Tensor, group: dist.ProcessGroup) -> Tensor:
    (B, t, D), W = x_BtD.shape, group.size()
    parts_WBtD = x_BtD.new_empty(W, B, t, D)
    all_gather(parts_WBtD.view(-1), x_BtD.contiguous().view(-1), group=group)
    whole_BTD = x_BtD.new_empty(B, W * t, D)
    whole_BTD.view(B, W, t, D).copy_(parts_WBtD.transpose(0, 1))
    return whole_BTD


def _shared_out(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    (B, T, D), W = x_BTD.shape, group.size()
    parts_WBtD = x_BTD.reshape(B, W, T // W, D).transpose(0, 1).contiguous()
    own_BtD = x_BTD.new_empty(B, T // W, D)
    reduce_scatter(own_BtD.view(-1), parts_WBtD.view(-1), group=group)
    return own_BtD


def _gather_before(group: dist.ProcessGroup) -> Callable[..., Any]:
    def gather(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return gather_tokens(inputs[0], group), *inputs[1:]

    return gather


def _share_out_after(group: dist.ProcessGroup) -> Callable[..., Any]:
    def share_out(_module: nn.Module, _inputs: tuple[Any, ...], out: Any) -> Any:
        if isinstance(out, tuple):  # an MoE layer's, with what its router decided
            return share_out_tokens(out[0], group), *out[1:]
        return share_out_tokens(out, group)

    return share_out


def _divide_copies(num_ranks: int) -> Callable[..., Any]:
    """What null experts add is the token itself, on every rank: each adds its share of it."""

    def divide(_module: nn.Module, _inputs: tuple[Any, ...], stats: RoutingStats) -> RoutingStats:
        return stats if stats.copy_N is None else replace(stats, copy_N=stats.copy_N / num_ranks)

    return divide
