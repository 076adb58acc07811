"""The decoder: embedding, pre-norm blocks, final norm; the product with the head is left to the loss."""

from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from attention.cache import KVCache
from attention.kinds import AnyAttentionSettings, build_attention
from attention.mask import Mask
from context.rotary import AnyRotary, LayerView
from context.rotation import LayerRotary
from model.block import Block
from model.feed_forward import FeedForward
from model.norm import RMSNorm
from moe.layer import MoE, MoESettings
from moe.routing import RoutingStats, TokenFacts
from settings import Section

LayerKind = Literal["full", "window", "full_nope", "window_nope"]
"""What a layer attends to; `_nope`: without a rotation, so that positions show only in what comes from other layers."""

MOST_LAYERS = 1000
Depth = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
"""Layers; bounded, as they are looked at one by one before anything is built."""
Width = Annotated[int, Field(ge=1, le=1_000_000)]
"""Channels; bounded, so that three such numbers multiplied are still the size of a tensor."""


class ModelSettings(Section):
    """Shape of the decoder; the vocabulary comes from the tokenizer, the rotation from the stage."""

    num_layers: Depth
    width: Width
    attention: AnyAttentionSettings
    feed_forward_width: Width | None = None
    """Inner width of the dense feed-forward layers."""
    moe: MoESettings | None = None
    """Left out: every layer is dense."""
    num_dense_layers: int = 0
    """The first so many layers are dense although `moe` is given."""
    pattern: tuple[LayerKind, ...] = ("full",)
    """What the layers attend to, repeated over the depth; `window` layers see `attention.window` tokens."""
    tied_embeddings: bool = False
    norm_epsilon: PositiveFloat = 1e-6
    initial_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelSettings":
        self.attention.rotary_channels(self.width)
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} must lie within 0 and num_layers={self.num_layers}"
            )
        if self.num_dense_layers and self.moe is None:
            raise ValueError(f"num_dense_layers={self.num_dense_layers} means nothing without moe: leave it out")
        if "dense" in map(self.feed_forward_kind, range(self.num_layers)) and self.feed_forward_width is None:
            raise ValueError(
                "feed_forward_width is missing, but some layers are dense; give it, or moe for every layer"
            )
        if not self.pattern:
            raise ValueError('pattern=[] names no layer; leave it out, or write ["full"]')
        has_window = any(kind.startswith("window") for kind in self.pattern)
        if has_window and self.attention.window is None:
            raise ValueError(
                'pattern has "window" layers, but attention.window is left out; give their number of tokens'
            )
        if not has_window and self.attention.window is not None:
            raise ValueError(
                f"attention.window={self.attention.window} is used by no layer of pattern={list(self.pattern)}; "
                'add "window" to the pattern or leave attention.window out'
            )
        return self

    @property
    def rotary_channels(self) -> int:
        """Channels of one attention head that are rotated."""
        return self.attention.rotary_channels(self.width)

    def feed_forward_kind(self, layer: int) -> Literal["dense", "moe"]:
        return "dense" if self.moe is None or layer < self.num_dense_layers else "moe"

    @property
    def routed(self) -> MoESettings | None:
        """The experts of layers that have some; None where every layer is dense, whatever `moe` says."""
        return self.moe if self.num_dense_layers < self.num_layers else None

    def layer_kind(self, layer: int) -> LayerKind:
        return self.pattern[layer % len(self.pattern)]

    def view(self, layer: int) -> LayerView:
        """Whether the layer's queries see all tokens before them or a window."""
        return "window" if self.layer_kind(layer).startswith("window") else "full"

    def window(self, layer: int) -> int | None:
        """How many tokens the layer's queries see, themselves included; None: all before them."""
        return self.attention.window if self.view(layer) == "window" else None

    def has_rotary(self, layer: int) -> bool:
        """Whether the layer's queries and keys are rotated by their positions."""
        return not self.layer_kind(layer).endswith("_nope")


class Transformer(nn.Module):
    """Tokens to hidden states after the final norm, and the routing of every MoE layer in order of depth.

    `use_rotary` chooses the rotation and must be called before the first forward. Of blocks that are run again in the
    backward pass the routing returned is that of the first run.
    """

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.vocab_size = vocab_size
        self.rotary: LayerRotary | None = None
        self.pipeline: object | None = None
        """What passes micro-batches through the layers that are here, where ranks hold them one after another."""
        self.embedding = nn.Embedding(vocab_size, settings.width)
        self.blocks = nn.ModuleList(_build_block(settings, layer) for layer in range(settings.num_layers))
        self.norm = RMSNorm(settings.width, settings.norm_epsilon)
        self.head = None if settings.tied_embeddings else nn.Linear(settings.width, vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D); the embedding itself when the two are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def use_rotary(self, rotary: AnyRotary) -> None:
        """Rotate queries and keys as `rotary` says of each kind of layer, from the next forward on."""
        self.rotary = LayerRotary(rotary, self.settings.rotary_channels)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        facts: TokenFacts | None = None,
    ) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """Hidden states (B, T, D) and routing; multiply by `head_weight` for logits.

        positions_BT: each token's place in its document; left out: counted from the row's start, or on from the cache.
        mask: what attention may see, to which layers add their windows; left out: each row is one document.
        facts: what routers are told of the tokens; left out: their ids and places.
        """
        start = 0 if cache is None else cache.length
        places_BT = torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        positions_BT = places_BT if positions_BT is None else positions_BT
        facts = facts or TokenFacts(tokens_BT, places_BT)
        mask = mask or Mask()
        if cache is not None:
            cache.check(mask)
        x_BTD, all_routing = self.through(
            range(len(self.blocks)), self.embedding(tokens_BT), positions_BT, mask, facts, cache
        )
        return self.norm(x_BTD), all_routing

    def through(  # noqa: PLR0917 (what a layer is told of its tokens)
        self,
        layers: Iterable[int],
        x_BTD: Tensor,
        positions_BT: Tensor,
        mask: Mask,
        facts: TokenFacts,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """Hidden states (B, T, D) through some layers in turn, and the routing of those that are MoE layers."""
        assert self.rotary is not None, "call use_rotary before the first forward"
        rotations = self.rotary.at(positions_BT)
        all_routing = []
        for layer in layers:
            block, rotation = self.blocks[layer], rotations[self.settings.view(layer)]
            x_BTD, routing = block(x_BTD, rotation, mask, facts, None if cache is None else cache.layer(layer))
            all_routing.append(routing)
        return x_BTD, tuple(routing for routing in all_routing if routing is not None)


def build_model(settings: ModelSettings, vocab_size: int) -> Transformer:
    """The model on the meta device: shapes without memory; `initialize` gives it a device and values."""
    with torch.device("meta"):
        return Transformer(settings, vocab_size)


def _build_block(settings: ModelSettings, layer: int) -> Block:
    has_rotary = settings.has_rotary(layer)
    attention = build_attention(settings.attention, settings.width, settings.window(layer), has_rotary=has_rotary)
    feed_forward = FEED_FORWARDS[settings.feed_forward_kind(layer)](settings, layer)
    return Block(attention, feed_forward, settings.width, settings.norm_epsilon)


def _build_dense(settings: ModelSettings, layer: int) -> FeedForward:
    assert settings.feed_forward_width is not None, "checked by ModelSettings"
    return FeedForward(settings.width, settings.feed_forward_width)


def _build_moe(settings: ModelSettings, layer: int) -> MoE:
    assert settings.moe is not None, "checked by ModelSettings"
    return MoE(settings.moe, settings.width, layer)


FEED_FORWARDS: dict[str, Callable[[ModelSettings, int], FeedForward | MoE]] = {"dense": _build_dense, "moe": _build_moe}
