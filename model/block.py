"""One pre-norm layer of the decoder: attention, then a dense or mixture-of-experts feed-forward, each a residual."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from attention.attend import Kept
from attention.cache import LayerCache
from attention.kinds import AnyAttention
from attention.mask import Mask
from context.rotation import Rotation
from model.feed_forward import FeedForward
from model.norm import RMSNorm
from moe.layer import MoE
from moe.routing import Memo, RoutingStats, TokenFacts


@dataclass(frozen=True)
class BlockMemo:
    """What a block's first pass leaves to its recomputation, so that neither is done, nor sent to ranks, twice."""

    attention: Kept = field(default_factory=Kept)
    """What attention answered."""
    routing: Memo = field(default_factory=Memo)
    """Where tokens went."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); returns what a router chose beside the output."""

    def __init__(
        self, attention: AnyAttention, feed_forward: FeedForward | MoE, width: int, norm_epsilon: float
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, norm_epsilon)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(width, norm_epsilon)
        self.feed_forward = feed_forward
        self.is_moe = isinstance(feed_forward, MoE)

    def forward(  # noqa: PLR0917 (what a layer is told of its tokens, and what it may keep)
        self,
        x_BTD: Tensor,
        rotation: Rotation,
        mask: Mask,
        facts: TokenFacts,
        cache: LayerCache | None = None,
        memo: BlockMemo | None = None,
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, T, D) to (B, T, D) and the layer's routing, which a dense layer has none of."""
        kept, routing_memo = (None, None) if memo is None else (memo.attention, memo.routing)
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, mask, cache, kept)
        normed_BTD = self.feed_forward_norm(x_BTD)
        if not self.is_moe:
            return x_BTD + self.feed_forward(normed_BTD), None
        change_BTD, routing = self.feed_forward(normed_BTD, facts, routing_memo)
        return x_BTD + change_BTD, routing
