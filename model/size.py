"""How large a model is and how much it computes: arithmetic on its settings, nothing is built."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attention.attention import AttentionSettings, channels_per_head
from attention.latent import LatentSettings
from model.transformer import ModelSettings
from moe.layer import MoESettings


@dataclass(frozen=True)
class Size:
    """Numbers of parameters."""

    embedding: int
    """The embedding and, unless it is tied, the head."""
    attention: int
    """Projections, norms of heads and latents, and sinks of all layers."""
    feed_forward: int
    """Dense layers, shared experts and their gates."""
    router: int
    """Rows of null experts included."""
    experts: int
    """All routed experts of all layers."""
    norms: int
    """The norms around blocks and the final one."""
    active_experts: int
    """The share of `experts` that one token meets: K in each layer.

    With null experts that is the most that it can meet, and fewer on average; with expert choice it is the average.
    What a capacity drops is counted: how much that is depends on the load.
    """

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.feed_forward + self.router + self.experts + self.norms

    @property
    def active(self) -> int:
        """What one token meets, the whole embedding and head included, as model cards count."""
        return self.total - self.experts + self.active_experts


def count(settings: ModelSettings, vocab_size: int) -> Size:
    """The parameters of `Transformer(settings, vocab_size)`, part by part; their sum is the built model's exactly."""
    width, attention = settings.width, attention_layer(settings)
    num_dense = sum(settings.feed_forward_kind(layer) == "dense" for layer in range(settings.num_layers))
    num_moe = settings.num_layers - num_dense
    shared, router, experts, active = _moe_layer(settings.moe, width) if settings.moe else (0, 0, 0, 0)
    return Size(
        embedding=vocab_size * width * (1 if settings.tied_embeddings else 2),
        attention=settings.num_layers * (attention.projections + attention.vectors),
        feed_forward=num_dense * 3 * width * (settings.feed_forward_width or 0) + num_moe * shared,
        router=num_moe * router,
        experts=num_moe * experts,
        norms=(2 * settings.num_layers + 1) * width,
        active_experts=num_moe * active,
    )


def _moe_layer(moe: MoESettings, width: int) -> tuple[int, int, int, int]:
    """Parameters of one layer: shared experts and their gate, the router, routed experts, those of them at work."""
    expert = 3 * width * moe.expert_width
    shared = moe.num_shared_experts * expert + (width if moe.shared_gate else 0)
    return shared, num_scored(moe) * width, moe.num_experts * expert, moe.experts_per_token * expert


def num_scored(moe: MoESettings) -> int:
    """Experts that a router scores, null ones included."""
    return moe.num_experts + (moe.null_experts.count if moe.null_experts else 0)


def flops_per_token(settings: ModelSettings, vocab_size: int, sequence_length: int, causal: bool = True) -> int | float:
    """Floating-point operations of one token's forward and backward pass, matrix products only, nothing recomputed.

    A product costs 2 per weight forward and 4 backward. Attention adds 6 * channels of all heads' keys and values for
    each key a query sees (PaLM, appendix B): on average (T+1)/2 in a row of T tokens, less in a window. `causal=False`
    counts T keys in every layer, as an implementation computes that masks a full score matrix. Latent attention is
    counted as it is trained on whole rows, expanded.
    """
    weights, channels = multiplied_weights(settings, vocab_size), attention_layer(settings).channels
    if causal:
        return 6 * weights + attention_flops_per_token(settings, (sequence_length,))
    return 6 * (weights + channels * settings.num_layers * sequence_length)


def multiplied_weights(settings: ModelSettings, vocab_size: int) -> int:
    """The weights that one token is multiplied with, the head's among them."""
    size, attention = count(settings, vocab_size), attention_layer(settings)
    return (
        size.active
        - size.embedding
        - size.norms
        - settings.num_layers * attention.vectors
        + (vocab_size * settings.width)
    )


def attention_flops_per_token(
    settings: ModelSettings, lengths: Sequence[int], window: int | None = None
) -> int | float:
    """The part that grows with what a query sees: of documents of these lengths, by one of their tokens on average.

    window: how many tokens back every layer sees in training, itself included; left out, what the layer says.
    """
    keys = sum(number * mean_keys_of_documents(lengths, view) for view, number in views(settings, window).items())
    return 6 * attention_layer(settings).channels * keys


def views(settings: ModelSettings, window: int | None = None) -> dict[int | None, int]:
    """How many layers see so many tokens back, a token itself included (None: all), in the order of the layers.

    window: as many as any layer sees in training; left out, what the layer says.
    """
    own = (settings.window(layer) for layer in range(settings.num_layers))
    return dict(Counter(min((w for w in (each, window) if w is not None), default=None) for each in own))


def pairs_seen(settings: ModelSettings, lengths: Sequence[int] | np.ndarray, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees, in documents of these lengths, over all layers: exactly."""
    return sum(number * keys_seen(lengths, view) for view, number in views(settings, window).items())


def keys_seen(lengths: Sequence[int] | np.ndarray, view: int | None) -> int:
    """The same in a layer that sees so many tokens back, a token itself included; None: all of its document."""
    lengths_D = np.asarray(lengths, dtype=np.int64)
    seen_D = lengths_D if view is None else np.minimum(lengths_D, view)
    return int((seen_D * (seen_D + 1) // 2 + (lengths_D - seen_D) * seen_D).sum())


def step_flops(
    settings: ModelSettings, vocab_size: int, num_tokens: int, pairs: int, expert_rows: float | None = None
) -> float:
    """Operations of so many tokens forward and backward, counted as in `flops_per_token`, with what was in a step.

    pairs: see `pairs_seen`. expert_rows: rows that routed experts computed, of all layers together; left out, K of each
    layer for each token.
    """
    active = count(settings, vocab_size).active_experts
    experts: float = num_tokens * active
    if expert_rows is not None and settings.moe is not None:
        experts = expert_rows * 3 * settings.width * settings.moe.expert_width
    others = num_tokens * (multiplied_weights(settings, vocab_size) - active)
    return 6 * (others + experts + attention_layer(settings).channels * pairs)


def mean_keys_of_documents(lengths: Sequence[int], window: int | None) -> float:
    """How many keys a query sees on average where each document is attended to alone."""
    return sum(n * number * mean_keys(n, window) for n, number in Counter(lengths).items()) / sum(lengths)


def mean_keys(sequence_length: int, window: int | None, causal: bool = True) -> float:
    """How many keys a query of a row sees on average, itself included."""
    if not causal:
        return sequence_length
    seen = min(window or sequence_length, sequence_length)
    return (seen * (seen + 1) / 2 + (sequence_length - seen) * seen) / sequence_length


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention in numbers."""

    projections: int
    """Parameters that every token is multiplied with."""
    vectors: int
    """The other parameters: norms of heads and latents, sinks."""
    channels: int
    """Of the queries and values of all heads together: what is multiplied for each key that a query sees."""


def attention_layer(settings: ModelSettings) -> AttentionLayer:
    """The attention of one of the model's layers, which are all alike."""
    return LAYERS[settings.attention.kind](settings.attention, settings.width)


def _grouped(attention: AttentionSettings, width: int) -> AttentionLayer:
    H, G, C = attention.num_heads, attention.num_kv_heads, channels_per_head(attention, width)
    vectors = (2 * C if attention.head_norms else 0) + (H if attention.sink else 0)
    return AttentionLayer(2 * width * (H + G) * C, vectors, 2 * H * C)


def _latent(attention: LatentSettings, width: int) -> AttentionLayer:
    H, Z, E = attention.num_heads, attention.latent_rank, attention.value_channels
    C = attention.nope_channels + attention.rope_channels
    rank = attention.query_rank
    queries = width * H * C if rank is None else (width + H * C) * rank
    keys = width * (Z + attention.rope_channels) + Z * H * (attention.nope_channels + E)
    return AttentionLayer(queries + keys + H * E * width, Z + (rank or 0), H * (C + E))


LAYERS: dict[str, Callable[[Any, int], AttentionLayer]] = {"grouped": _grouped, "latent": _latent}
