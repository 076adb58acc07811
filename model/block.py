"""One pre-norm layer of the decoder: attention, then a dense or mixture-of-experts feed-forward, each a residual."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention.attend import Kept, in_place
from attention.cache import LayerCache
from attention.kinds import AnyAttention
from attention.mask import Mask
from context.rotation import Rotation
from model.feed_forward import FeedForward
from model.norm import RMSNorm
from moe.layer import MoE
from moe.routing import Memo, RoutingStats, TokenFacts

Kind = Literal["none", "ops", "full"]
"""What of a layer is computed again in the backward pass. "none": nothing. "ops": all but attention, the choice of
experts, and what came from other ranks for either. "full": all but the choice of experts."""


class Offload(Protocol):
    """Somewhere else to keep what the backward pass will need."""

    def saving(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Inside, what autograd saves goes there, but for the module's weights."""
        ...

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Put one tensor there; the answer brings it back."""
        ...


@dataclass(frozen=True)
class BlockMemo:
    """What a block's first pass leaves to its recomputation, so that neither is done, nor sent to ranks, twice."""

    attention: Kept | None = field(default_factory=Kept)
    """What attention answered; None: it attends again."""
    routing: Memo = field(default_factory=Memo)
    """Where tokens went, and unless they are to travel again, those that came."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); returns what a router chose beside the output.

    `recompute` and `offload` are set from outside and change what is kept for the backward pass and where, no number.
    What is run again lies inside the module: hooks around it see one forward pass.
    """

    def __init__(
        self, attention: AnyAttention, feed_forward: FeedForward | MoE, width: int, norm_epsilon: float
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, norm_epsilon)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(width, norm_epsilon)
        self.feed_forward = feed_forward
        self.is_moe = isinstance(feed_forward, MoE)
        self.recompute: Kind = "none"
        self.offload: Offload | None = None

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation,
        mask: Mask,
        facts: TokenFacts,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, T, D) to (B, T, D) and the layer's routing, which a dense layer has none of."""
        if not torch.is_grad_enabled():
            return self._run(x_BTD, rotation, mask, facts, cache)
        with nullcontext() if self.offload is None else self.offload.saving(self):
            if self.recompute == "none":
                return self._run(x_BTD, rotation, mask, facts, cache)
            return checkpoint(self._run, x_BTD, rotation, mask, facts, cache, self._memo(), use_reentrant=False)

    def _memo(self) -> BlockMemo:
        if self.recompute == "full":
            return BlockMemo(attention=None)
        keep = in_place if self.offload is None else self.offload.keep
        return BlockMemo(Kept(keep), Memo(keep=keep))

    def _run(  # noqa: PLR0917 (what a layer is told of its tokens, and what it may keep)
        self,
        x_BTD: Tensor,
        rotation: Rotation,
        mask: Mask,
        facts: TokenFacts,
        cache: LayerCache | None = None,
        memo: BlockMemo | None = None,
    ) -> tuple[Tensor, RoutingStats | None]:
        kept, routing_memo = (None, None) if memo is None else (memo.attention, memo.routing)
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, mask, cache, kept)
        normed_BTD = self.feed_forward_norm(x_BTD)
        if not self.is_moe:
            return x_BTD + self.feed_forward(normed_BTD), None
        change_BTD, routing = self.feed_forward(normed_BTD, facts, routing_memo)
        return x_BTD + change_BTD, routing
