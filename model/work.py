"""What a layer computes for a micro-batch on one rank: its products with their sizes, and bytes that pass by.

Arithmetic on settings. Only forward passes are here: backward, a product is two of the same size and other passes over
memory are taken twice. A rank of a tensor-parallel group has parts of heads and inner channels and all of its group's
tokens, but norms and residuals of its own part of these.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from attention.attention import AttentionSettings, channels_per_head
from attention.latent import LatentSettings
from model.size import num_scored
from model.transformer import ModelSettings
from moe.layer import MoESettings

FP32 = 4


@dataclass(frozen=True)
class Product:
    """`groups` products of (rows, inner) by (inner, outer)."""

    kind: str
    rows: float
    """Of each group."""
    inner: float
    outer: float
    groups: float = 1

    @property
    def flops(self) -> float:
        return 2 * self.groups * self.rows * self.inner * self.outer

    @property
    def weights(self) -> float:
        return self.groups * self.inner * self.outer


@dataclass(frozen=True)
class Cuts:
    """Among how many ranks a layer's parts are shared out."""

    tensor: int = 1
    expert: int = 1


@dataclass(frozen=True)
class Bytes:
    """How numbers are held, and whether element-wise steps are compiled into few passes over memory."""

    stream: int = FP32
    """A number of the residual stream."""
    product: int = 2
    """A number that products take and give."""
    is_fused: bool = False


def products(settings: ModelSettings, layer: int, num_tokens: float, cuts: Cuts) -> Iterator[Product]:
    """Of one layer, for so many tokens of each data rank; scores of attention apart."""
    yield from (
        Product("attention", num_tokens, inner, outer)
        for inner, outer in _projections(settings.attention, settings.width, cuts.tensor)
    )
    D = settings.width
    if settings.feed_forward_kind(layer) == "dense":
        yield from _swiglu("feed forward", num_tokens, D, (settings.feed_forward_width or 0) / cuts.tensor)
        return
    moe = settings.moe
    assert moe is not None, "checked by ModelSettings"
    F = moe.expert_width / cuts.tensor
    yield Product("router", num_tokens, D, num_scored(moe) + moe.shared_gate)
    if moe.num_shared_experts:
        yield from _swiglu("shared experts", num_tokens, D, moe.num_shared_experts * F)
    # At even load as many slots arrive as leave.
    rows, here = num_tokens * moe.experts_per_token * cuts.expert / moe.num_experts, moe.num_experts / cuts.expert
    yield from _swiglu("experts", rows, D, F, here)


def _swiglu(kind: str, rows: float, width: float, inner: float, groups: float = 1) -> Iterator[Product]:
    yield Product(kind, rows, width, 2 * inner, groups)
    yield Product(kind, rows, inner, width, groups)


def _projections(
    attention: AttentionSettings | LatentSettings, width: int, tensor: int
) -> Iterator[tuple[float, float]]:
    """(inner, outer) of each: queries, keys and values at once, as they take the same input."""
    H = attention.num_heads / tensor
    if isinstance(attention, AttentionSettings):
        C, G = channels_per_head(attention, width), attention.num_kv_heads / tensor
        yield width, (H + 2 * G) * C
        yield H * C, width
        return
    C, E, Z = attention.nope_channels + attention.rope_channels, attention.value_channels, attention.latent_rank
    rank = attention.query_rank
    yield width, Z + attention.rope_channels + (H * C if rank is None else rank)
    if rank is not None:
        yield rank, H * C
    yield Z, H * (attention.nope_channels + E)
    yield H * E, width


def head(settings: ModelSettings, vocab_size: int, num_tokens: float, cuts: Cuts) -> Product:
    """Hidden states to logits."""
    return Product("head", num_tokens, settings.width, vocab_size / cuts.tensor)


def passes(settings: ModelSettings, layer: int, cuts: Cuts, held: Bytes) -> dict[str, float]:
    """Bytes that a token of a data rank moves through memory beside products, by what they belong to.

    Each step reads what it takes and writes what it gives once; where steps are not compiled, rotations and the gate of
    the feed-forward run in several.
    """
    D, s, c, t = settings.width, held.stream, held.product, cuts.tensor
    q, k = _rotated(settings.attention, D)
    # Two norms, two additions to the stream, of this rank's tokens alone.
    found = {"norms": 2 * (s + c) * D / t + 2 * (2 * s + c) * D / t}
    found["rotation"] = (q + k) / t * (2 * c if held.is_fused else 2 * c + 3 * FP32)
    if isinstance(settings.attention, AttentionSettings) and settings.attention.head_norms:
        found["norms"] += (q + k) / t * (0 if held.is_fused else 2 * c + FP32)
    gate = c * (3 if held.is_fused else 5)
    if settings.feed_forward_kind(layer) == "dense":
        found["gate"] = gate * (settings.feed_forward_width or 0) / t
        return found
    moe = settings.moe
    assert moe is not None, "checked by ModelSettings"
    slots = moe.experts_per_token
    found["gate"] = gate * (slots + moe.num_shared_experts) * moe.expert_width / t
    found["routing"] = _routing(moe, D, c, held)
    return found


def _rotated(attention: AttentionSettings | LatentSettings, width: int) -> tuple[float, float]:
    """Channels of queries and of keys that a rotation goes over."""
    if isinstance(attention, AttentionSettings):
        C = channels_per_head(attention, width)
        return attention.num_heads * C, attention.num_kv_heads * C
    # Rotated channels are put together with plain ones, which copies all of them, keys for every head.
    whole = attention.num_heads * (attention.nope_channels + attention.rope_channels)
    return whole, whole


def _routing(moe: MoESettings, width: int, c: int, held: Bytes) -> float:
    """Scores and places in fp32 and int64, rows gathered in the order of experts, and their sums brought back."""
    K, E = moe.experts_per_token, num_scored(moe)
    scores = FP32 * width + FP32 * E * (4 if held.is_fused else 10)
    places = 8 * K * 10
    there = 2 * c * K * width
    back = c * (K + 1) * width + (0 if held.is_fused else 2 * c * K * width)  # gates multiplied in a step of its own
    return scores + places + there + back


LOGIT_PASSES = 30
"""Bytes of a logit in a micro-batch: written in bf16, read and written in fp32 by softmax, loss and gradient."""
FUSED_LOGIT_PASSES = 14
WEIGHT_PASSES = 16
"""Bytes of a weight in a micro-batch: cast for products forward and backward, its gradient cast and added up."""
UPDATE_PASSES = 44
"""Bytes of a weight in a step: AdamW (28), the gradient's norm and clipping (12), zeros (4), all in fp32."""
