"""What a layer keeps from its forward to its backward pass, in bytes: arithmetic on its settings, nothing is built.

The sums follow the code of the layers one by one, and `tests/model/test_memory.py` holds them to what really stays
alive. Only tensors that grow with the number of tokens are here, and copies of weights in low precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attention.attention import AttentionSettings, channels_per_head
from attention.latent import LatentSettings
from model.block import Kind
from model.size import attention_layer, num_scored
from model.transformer import ModelSettings
from moe.layer import MoESettings

FP32, INT32, INT64 = 4, 4, 8


@dataclass(frozen=True)
class Numbers:
    """How numbers are held besides weights and the residual stream, which are fp32."""

    itemsize: int
    """Bytes of what products take and give: 2 under autocast, else 4."""
    device: str = "cuda"

    @property
    def is_cast(self) -> bool:
        """Whether products take copies of what they are given."""
        return self.itemsize < FP32

    @property
    def norm_copies(self) -> int:
        """How often a norm of heads keeps what comes in: torch has a fused norm on GPUs alone."""
        return 2 if self.device == "cpu" else 1


@dataclass(frozen=True)
class LayerBytes:
    """Bytes kept for each token, by what they belong to, and for the layer as a whole."""

    residual: int = 0
    """What comes into the layer and what is between its halves, and of their norms one number each."""
    attention: int = 0
    feed_forward: int = 0
    """Dense layers and shared experts."""
    router: int = 0
    """Its scores, and where rows go."""
    experts: int = 0
    """Tokens and pre-activations of routed experts."""
    copies: int = 0
    """Not for each token but once: weights in low precision."""

    @property
    def per_token(self) -> int:
        return self.residual + self.attention + self.feed_forward + self.router + self.experts


@dataclass(frozen=True)
class Ranks:
    """Who else has a part in a layer."""

    expert: int = 1
    """How many hold the experts together."""
    rows: int = 1
    """How many hold each row together; latents are then not expanded."""

    def arrivals(self, moe: MoESettings) -> int:
        """To how many ranks a token travels at most; at even load as many come as leave."""
        return min(num_slots(moe), self.expert) if self.expert > 1 else 0


ALONE = Ranks()


def kept(settings: ModelSettings, layer: int, kind: Kind, numbers: Numbers, ranks: Ranks = ALONE) -> LayerBytes:
    """Of one layer that is recomputed as `kind` says."""
    return (_by_none if kind == "none" else _by_recomputed)(settings, layer, kind, numbers, ranks)


def _by_none(settings: ModelSettings, layer: int, _kind: Kind, numbers: Numbers, ranks: Ranks) -> LayerBytes:
    D, c, is_split = settings.width, numbers.itemsize, ranks.rows > 1
    attention = ATTENTION[settings.attention.kind](settings.attention, D, numbers, is_split)
    residual = 2 * (FP32 * D + FP32)
    copies = attention_layer(settings).projections * c
    if settings.feed_forward_kind(layer) == "dense":
        F = settings.feed_forward_width or 0
        # What goes in, gate and up; GPUs also keep their product, which CPUs make again.
        found = LayerBytes(residual, attention, c * (D + 2 * F + (0 if numbers.device == "cpu" else F)))
        copies += 3 * D * F * c
    else:
        assert settings.moe is not None, "checked by ModelSettings"
        found = _moe(settings.moe, residual, attention, D, numbers, ranks)
        num_experts = settings.moe.num_experts // ranks.expert + settings.moe.num_shared_experts
        copies += 3 * D * settings.moe.expert_width * num_experts * c
        copies += D * c if settings.moe.shared_gate else 0
    return LayerBytes(**{**vars(found), "copies": copies if numbers.is_cast else 0})


def _by_recomputed(settings: ModelSettings, layer: int, kind: Kind, numbers: Numbers, ranks: Ranks) -> LayerBytes:
    """What comes in, what was decided for each token, and, but for "full", what attention answered and ranks sent."""
    D, moe = settings.width, settings.moe
    attention = _answer(settings.attention, D, numbers, ranks.rows > 1) if kind == "ops" else 0
    if moe is None or settings.feed_forward_kind(layer) == "dense":
        return LayerBytes(residual=FP32 * D, attention=attention)
    arrived = numbers.itemsize * D + FP32 * num_slots(moe) if kind == "ops" else 0
    experts = ranks.arrivals(moe) * (arrived + _layout(moe))
    return LayerBytes(residual=FP32 * D, attention=attention, router=_decided(moe), experts=experts)


def _answer(attention: AttentionSettings | LatentSettings, width: int, numbers: Numbers, is_split: bool) -> int:
    """Attention's answer and its log-sum-exp."""
    H = attention.num_heads
    if isinstance(attention, AttentionSettings):
        return numbers.itemsize * H * channels_per_head(attention, width) + FP32 * H
    if is_split:
        return numbers.itemsize * H * attention.latent_rank + FP32 * H
    C, E = attention.nope_channels + attention.rope_channels, attention.value_channels
    # Kernels take heads of one width: what they answer is cut off when it is cast, and kept as it is in fp32.
    return numbers.itemsize * H * (E if numbers.is_cast else max(C, E)) + FP32 * H


def _grouped(attention: AttentionSettings, width: int, numbers: Numbers, _is_split: bool) -> int:
    c, H, G = numbers.itemsize, attention.num_heads, attention.num_kv_heads
    C = channels_per_head(attention, width)
    # Each of the three projections casts what it is given for itself.
    comes_in = 3 * c * width if numbers.is_cast else FP32 * width
    norms = (H + G) * FP32 * (numbers.norm_copies * C + 1) if attention.head_norms else 0
    return comes_in + norms + c * (H + 2 * G) * C + _answer(attention, width, numbers, _is_split)


def _latent(attention: LatentSettings, width: int, numbers: Numbers, is_split: bool) -> int:
    c, H, Z, Y = numbers.itemsize, attention.num_heads, attention.latent_rank, attention.rope_channels
    X, E, rank = attention.nope_channels, attention.value_channels, attention.query_rank
    comes_in = 2 * c * width if numbers.is_cast else FP32 * width
    # A norm in fp32 has what the product gave, which brings the rotated channels along; or else a cast of its own part.
    norms = FP32 * ((numbers.norm_copies - 1) * Z + (Z if numbers.is_cast else Z + Y) + 1)
    if rank is not None:
        norms += FP32 * (numbers.norm_copies * rank + 1) + c * rank
    key = c * (Z + Y)
    if is_split:  # queries before and after they are absorbed, and the answer as latents and as heads
        heads = c * H * (X + Y + Z + Y) + c * H * E
    else:
        # Queries and keys whole, and what keys and values were made as; the answer again where it was cut off.
        heads = c * H * (2 * (X + Y) + X + E) + (0 if numbers.is_cast or E >= X + Y else c * H * E)
    return comes_in + norms + key + heads + _answer(attention, width, numbers, is_split)


ATTENTION: dict[str, Callable[[Any, int, Numbers, bool], int]] = {"grouped": _grouped, "latent": _latent}


def _moe(  # noqa: PLR0917 (what of a layer is known by then)
    moe: MoESettings, residual: int, attention: int, width: int, numbers: Numbers, ranks: Ranks
) -> LayerBytes:
    """Every slot counted: what a capacity drops, or null experts leave out, is kept less."""
    c, D, K, F = numbers.itemsize, width, moe.experts_per_token, moe.expert_width
    S = moe.num_shared_experts * F
    cast = c * D if numbers.is_cast else 0
    # Gate and up, the gate's silu, and their product; with a gate of its own, the answer and its weight.
    shared = cast + c * 4 * S if S else 0
    if moe.shared_gate:
        shared += cast + c * (D + 1)
    # The router reads fp32, whatever products take, and experts a cast of it.
    scores = FP32 * D + SCORES[moe.router.kind](numbers) * num_scored(moe)
    if getattr(moe.router, "jitter", 0.0):  # what it is multiplied with, and the product beside what experts read
        scores += FP32 * D * (1 if numbers.is_cast else 2)
    plain = 1 if moe.router.scale == 1.0 else 2
    has_gaps = moe.router.kind == "expert_choice" or moe.capacity is not None or moe.null_experts is not None
    choice = (INT64 + FP32 * plain + (INT64 + FP32 + 1 if has_gaps else 0)) * num_slots(moe)
    places = INT64 * (num_slots(moe) + 2 * K)  # where slots stand once they are sorted
    rows = 0 if moe.recompute == "up" else c * K * 2 * F
    if Q := ranks.arrivals(moe):
        # Every token that came has all its slots and gates, with a mark on those that are another rank's.
        places = INT64 * (2 * Q * num_slots(moe) + K) + Q * (FP32 + 1) * num_slots(moe)
        cast = Q * (c * D + _layout(moe))
    return LayerBytes(residual, attention, shared, scores + choice, cast + places + rows)


def _layout(moe: MoESettings) -> int:
    """Of a token on its way to one rank: its own number, its place among those that leave, and its experts there."""
    return 2 * INT64 + INT32 * num_slots(moe)


def _decided(moe: MoESettings) -> int:
    """Logits, probabilities, choices and gates."""
    return FP32 * 2 * num_scored(moe) + (INT64 + FP32) * num_slots(moe)


def num_slots(moe: MoESettings) -> int:
    """Columns of the routing table: where experts choose, any number of them may want a token."""
    return moe.num_experts if moe.router.kind == "expert_choice" else moe.experts_per_token


SCORES: dict[str, Callable[[Numbers], int]] = {
    "softmax": lambda numbers: 3 * FP32,
    "sigmoid": lambda numbers: (4 if numbers.device == "cpu" else 3) * FP32,
    "sqrt_softplus": lambda numbers: 6 * FP32 + 1,
    "expert_choice": lambda numbers: 3 * FP32,
    "random": lambda numbers: 3 * FP32,
    "hash": lambda numbers: 3 * FP32,
    "uniform": lambda numbers: 3 * FP32,
}
"""Bytes that a router keeps for each token and expert: logits, scores and what they are made of, probabilities."""
