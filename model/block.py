"""One pre-norm layer of the decoder: attention, then a dense or mixture-of-experts feed-forward, each a residual."""

from torch import Tensor, nn

from attention.attention import Attention
from attention.cache import LayerCache
from attention.mask import Mask
from context.rotary import Rotation
from model.feed_forward import FeedForward
from model.norm import RMSNorm
from moe.layer import MoE
from moe.router import RoutingStats


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); returns what a router chose beside the output."""

    def __init__(self, attention: Attention, feed_forward: FeedForward | MoE, width: int, norm_epsilon: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, norm_epsilon)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(width, norm_epsilon)
        self.feed_forward = feed_forward
        self.is_moe = isinstance(feed_forward, MoE)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, mask: Mask, cache: LayerCache | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, T, D) to (B, T, D) and the layer's routing, which a dense layer has none of."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, mask, cache)
        change_BTD = self.feed_forward(self.feed_forward_norm(x_BTD))
        change_BTD, routing = change_BTD if self.is_moe else (change_BTD, None)
        return x_BTD + change_BTD, routing
