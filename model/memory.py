"""How many bytes one rank needs to train, by what needs them: arithmetic on settings, nothing is allocated.

What stays from forward to backward is counted tensor by tensor (`kept.py`), exactly but for a few bytes a layer, where
no slot of an expert is dropped. What a moment needs beside it is an estimate, as kernels allocate what they like. Not
counted: masks that a backend draws for windows, copies that it makes of short documents of unlike lengths, the rows of
text (45 bytes a token). What an allocator cannot use is a share of the rest, and rough.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import get_args

from attention.attention import AttentionSettings, channels_per_head
from model.block import Kind
from model.feed_forward import BLOCK_ROWS
from model.kept import FP32, LayerBytes, Ranks, kept
from model.passing import dispatch, exchange, gathered
from model.share import Share, States
from model.transformer import ModelSettings, build_model
from model.work import Cuts, products
from optim.groups import is_hidden_matrix

MARGIN = 0.05
"""Blocks of torch's CUDA allocator are cut from segments of 2 and 20 MiB or more and do not always fit together.
Reports of runs that ran out of memory have 5% more reserved than allocated (hpcaitech/ColossalAI, discussion 2907);
GMLake (Guo et al. 2024) found 15% on average where recomputation and offloading mix sizes. Not measured here."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    """Those that are there when most is needed: all of them from a step's second micro-batch on."""
    moments: int
    """The optimizer's."""
    residual: int
    """What layers hand on, with the embedding, the final norm and the tables of the rotation."""
    attention: int
    feed_forward: int
    """Of dense layers and shared experts."""
    router: int
    experts: int
    copies: int
    """Weights in low precision."""
    temporary: int
    """What is needed beside all that when most is: by a layer on its way back; 0 where logits need more."""
    logits: int
    """Of a chunk, with the gradients of hidden states and head, where most is needed then; else 0."""
    gone: int
    """Less than 0: activations that layers have given up before most is needed."""
    dispatch: int
    """Tokens' gradients that go between ranks that share experts, in one layer; what came is kept by the experts."""
    gathered: int
    """Whole weights that ranks have cut, of the layers at work and of the ends, and gradients on their way there."""
    exchange: int
    """Keys and values of other ranks and their gradients, in one layer. Rough: as if every key were read."""
    margin: float = 0.0
    """The share of all that which an allocator has besides and cannot use: `MARGIN` on GPUs, nothing on CPUs."""

    @property
    def fragmentation(self) -> int:
        """Room that an allocator cannot use."""
        return int(self.margin * self.used)

    @property
    def states(self) -> int:
        """What is there between steps, the gradients included."""
        return self.weights + self.gradients + self.moments

    @property
    def activations(self) -> int:
        """What a micro-batch keeps for its backward pass."""
        return self.residual + self.attention + self.feed_forward + self.router + self.experts + self.copies

    @property
    def total(self) -> int:
        """The most at any moment, with what the allocator cannot use."""
        return self.used + self.fragmentation

    @property
    def used(self) -> int:
        """The most that tensors take at any moment."""
        beside = self.temporary + self.logits + self.gone
        return self.states + self.activations + beside + self.dispatch + self.gathered + self.exchange


def memory(settings: ModelSettings, vocab_size: int, optimizer: str, share: Share) -> Memory:
    """What a rank needs to train `Transformer(settings, vocab_size)` with optimizer kind `adamw` or `muon`."""
    held = share.states
    if held is None:
        weights, moments = states(settings, vocab_size, optimizer, share.expert_ranks)
        held = States(weights, moments, weights if share.num_ranks > 1 else 0)
    own = cut_settings(settings, share.tensor_ranks)
    here = share.layers or tuple(range(settings.num_layers))
    layers = {layer: _kept(own, layer, share, share.kind(layer)) for layer in here}
    sums = {name: sum(getattr(kept, name) for kept in layers.values()) for name in vars(layers[here[0]])}
    if share.offload and share.numbers.device != "cpu":
        here_at_once = min(1.0, 2 / len(here))
        sums = {name: value if name == "copies" else int(value * here_at_once) for name, value in sums.items()}
    sums["residual"] += _ends(settings, share)
    # Copies of weights are made anew for each micro-batch, and those in flight have copies of their own.
    sums = {name: int(value * share.in_flight) for name, value in sums.items()}
    logits = _loss(settings, vocab_size, share)
    peaks = [(0.0, logits, logits), *((made, needed, 0) for made, needed in _backward(own, layers, share))]
    peaks = [(1.0 if share.has_earlier else made, needed, chunk) for made, needed, chunk in peaks]
    # Gradients are exchanged in one piece, when activations are gone.
    peaks.append((1.0, held.flat - sum(sums.values()), 0))
    made, needed, logits = max(peaks, key=lambda peak: peak[0] * held.weights + peak[1])
    going = min(dispatch(settings, share), max(needed - logits, 0))
    return Memory(
        weights=held.weights,
        gradients=int(made * held.weights),
        moments=held.moments,
        **sums,
        temporary=max(needed - logits, 0) - going,
        dispatch=going,
        logits=logits,
        gone=min(needed, 0),
        gathered=gathered(settings, vocab_size, share),
        exchange=exchange(own, share),
        margin=0.0 if share.numbers.device == "cpu" else MARGIN,
    )


def cut_settings(settings: ModelSettings, tensor_ranks: int) -> ModelSettings:
    """The model as each of so many tensor-parallel ranks has it: fewer heads, narrower insides, as wide between."""
    if tensor_ranks == 1:
        return settings
    attention, moe, F = settings.attention, settings.moe, settings.feed_forward_width
    changed: dict[str, object] = {"num_heads": attention.num_heads // tensor_ranks}
    if isinstance(attention, AttentionSettings):
        changed["num_kv_heads"] = attention.num_kv_heads // tensor_ranks
        changed["channels"] = channels_per_head(attention, settings.width)
    narrow = moe and moe.model_copy(update={"expert_width": moe.expert_width // tensor_ranks})
    inside = None if F is None else F // tensor_ranks
    update = {"attention": attention.model_copy(update=changed), "moe": narrow, "feed_forward_width": inside}
    return settings.model_copy(update=update)


@lru_cache(maxsize=64)
def states(settings: ModelSettings, vocab_size: int, optimizer: str, expert_ranks: int = 1) -> tuple[int, int]:
    """(weights, the optimizer's moments) on a rank: exactly, of shapes on the meta device."""
    weights = moments = 0
    for name, parameter in build_model(settings, vocab_size).named_parameters():
        size = parameter.numel() // (expert_ranks if ".experts." in name else 1)
        weights += FP32 * size
        # AdamW has two moments and counts its steps for each tensor; Muon has one.
        moments += FP32 * (size if optimizer == "muon" and is_hidden_matrix(name, parameter) else 2 * size + 1)
    return weights, moments


def _kept(settings: ModelSettings, layer: int, share: Share, kind: Kind) -> LayerBytes:
    """In bytes, all tokens of this rank together."""
    ranks = Ranks(share.expert_ranks, share.row_ranks)
    own = kept(settings, layer, kind, share.numbers, ranks)
    whole = {name: value if name == "copies" else value * share.num_tokens for name, value in vars(own).items()}
    whole["residual"] //= share.tensor_ranks  # which share out the tokens there
    if share.shard_ranks > 1 and whole["copies"]:  # what is gathered is in low precision already
        cuts = Cuts(1, share.expert_ranks)
        left = [p for p in products(settings, layer, 1, cuts) if p.kind == "experts" and share.expert_shard_ranks == 1]
        whole["copies"] = int(sum(product.weights for product in left)) * share.numbers.itemsize
    return LayerBytes(**whole)


def _ends(settings: ModelSettings, share: Share) -> int:
    """What goes into the final norm and comes out of it, and one table of cosines and sines in fp32."""
    tokens, table = share.num_tokens, settings.rotary_channels
    if not share.has_head:
        return tokens * FP32 * table
    between = tokens * FP32 * (2 * settings.width + 1) // share.tensor_ranks
    whole = tokens * FP32 * settings.width if share.tensor_ranks > 1 else 0  # gathered for the head
    return between + whole + tokens * FP32 * table


def _loss(settings: ModelSettings, vocab_size: int, share: Share) -> int:
    """While the logits of the last chunk exist, with the gradients of hidden states and head made beside them."""
    if not share.has_head:
        return 0
    D, c, N = settings.width, share.numbers.itemsize, share.num_tokens
    chunk, vocab_size = min(share.loss_chunk, N), -(-vocab_size // share.tensor_ranks)
    made = FP32 * D * (N + vocab_size)
    casts = c * D * (chunk + 2 * vocab_size) if share.numbers.is_cast else 0
    # Logits and their log softmax; CPUs turn low precision into fp32 before they take it.
    logits = c + FP32 + (FP32 if share.numbers.is_cast and share.numbers.device == "cpu" else 0)
    return made + casts + chunk * vocab_size * logits


def _backward(settings: ModelSettings, layers: dict[int, LayerBytes], share: Share) -> Iterator[tuple[float, int]]:
    """Of each layer on the way back: (the share of gradients made above it, what it needs, less what layers above have
    already given up: all but what routers decided, which the balance of the step is made of)."""
    kept = [_sum(layer) - layer.router for layer in layers.values()]
    above = [sum(kept) - below for below in accumulate(kept)]
    cuts = Cuts(1, share.expert_ranks)
    weights = [sum(p.weights for p in products(settings, layer, 1, cuts)) for layer in layers]
    made = [1 - below / sum(weights) for below in accumulate(weights)]
    for layer, freed, share_made in zip(layers, above, made, strict=True):
        yield share_made, _on_the_way_back(settings, layer, share) - freed


def _on_the_way_back(settings: ModelSettings, layer: int, share: Share) -> int:
    """Of a layer: what is made once more, the gradient of the residual stream, and the half that needs more.

    The other half's share of what the layer keeps is gone when attention's turn comes.
    """
    again, kind, whole = 0, share.kind(layer), _kept(settings, layer, share, "none")
    if kind != "none":
        again = _sum(whole) - _sum(_kept(settings, layer, share, kind))
    half = _dense_backward if settings.feed_forward_kind(layer) == "dense" else _moe_backward
    attention = _attention_backward(settings, share) - whole.feed_forward - whole.experts
    stream = FP32 * share.num_tokens * settings.width // share.tensor_ranks
    return again + stream + max(half(settings, share), attention)


def by_kind(settings: ModelSettings, layer: int, share: Share) -> tuple[dict[Kind, int], int]:
    """(what a layer keeps as each kind, what there is beside what lower layers keep when it makes gradients)."""
    own = cut_settings(settings, share.tensor_ranks)
    kept = {kind: _sum(_kept(own, layer, share, kind)) for kind in get_args(Kind)}
    return kept, kept["none"] + _on_the_way_back(own, layer, replace(share, recompute="none"))


def _dense_backward(settings: ModelSettings, share: Share) -> int:
    """The gradients of what came in and of weights, and of as many inner rows as are taken at once."""
    D, F, c = settings.width, settings.feed_forward_width or 0, share.numbers.itemsize
    return c * (share.num_tokens * D + 3 * D * F + _rows_at_once(share, share.num_tokens) * 4 * F)


def _moe_backward(settings: ModelSettings, share: Share) -> int:
    """The gradients of slots and of experts' weights; rows gathered, and inside, as many as are taken at once."""
    assert settings.moe is not None
    moe, D, c = settings.moe, settings.width, share.numbers.itemsize
    R, F = share.num_tokens * moe.experts_per_token, moe.expert_width
    weights, casts = 3 * D * F * moe.num_experts // share.expert_ranks, 0
    if share.numbers.is_cast and share.numbers.device == "cpu":  # which may have units for fp32 alone
        c, casts = FP32, FP32 * (weights + 2 * share.num_tokens * D)
    return casts + c * (R * D + weights + _rows_at_once(share, R) * (2 * D + 6 * F))


def _rows_at_once(share: Share, num_rows: int) -> int:
    return min(BLOCK_ROWS, num_rows) if share.numbers.device == "cpu" else num_rows


def _attention_backward(settings: ModelSettings, share: Share) -> int:
    """The gradients of queries, keys, values and the answer, and a rotation back in fp32."""
    attention, H = settings.attention, settings.attention.num_heads
    if isinstance(attention, AttentionSettings):
        C = channels_per_head(attention, settings.width)
        query, keys = H * C, 2 * attention.num_kv_heads * C
    else:
        query = H * (attention.nope_channels + attention.rope_channels)
        keys = query + H * attention.value_channels
    return share.num_tokens * (share.numbers.itemsize * (2 * query + keys) + FP32 * 2 * query)


def _sum(kept: LayerBytes) -> int:
    return kept.per_token + kept.copies


def parts(needed: Memory) -> Iterator[tuple[str, int]]:
    """Every part that there is any of, by name; together they are `total`."""
    told = {**vars(needed), "margin": 0, "fragmentation": needed.fragmentation}
    return ((name.replace("_", " "), value) for name, value in told.items() if value)
