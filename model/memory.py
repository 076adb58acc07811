"""How many bytes one rank needs to train, by what needs them: arithmetic on settings, nothing is allocated.

What stays from forward to backward is counted tensor by tensor (`kept.py`), exactly but for a few bytes a layer, where
no slot of an expert is dropped. What a moment needs beside it is an estimate, as kernels allocate what they like. Not
counted: what an allocator wastes, masks that a backend draws for windows, the rows of text (45 bytes a token).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import get_args

from attention.attention import AttentionSettings, channels_per_head
from model.block import Kind
from model.feed_forward import BLOCK_ROWS
from model.kept import FP32, LayerBytes, Numbers, Ranks, kept
from model.transformer import ModelSettings, build_model
from model.work import Cuts, head, products
from optim.groups import is_hidden_matrix


@dataclass(frozen=True)
class States:
    """Bytes that a rank has between steps, besides gradients, which are as large as its weights."""

    weights: int
    moments: int
    """The optimizer's."""
    flat: int = 0
    """The most gradients that are added up over ranks in one piece."""


@dataclass(frozen=True)
class Share:
    """What one rank is given to do at a time, and how."""

    num_tokens: int
    """Of one micro-batch, on this rank: of rows that several ranks hold, its part."""
    numbers: Numbers
    recompute: Kind | Sequence[Kind] = "none"
    """What is computed again, of all layers alike or of each."""
    offload: bool = False
    """What layers keep is in host memory, but for one that writes and one that reads; on CPUs nothing moves."""
    loss_chunk: int = 4096
    num_ranks: int = 1
    """All ranks of the run."""
    expert_ranks: int = 1
    """How many hold the experts together."""
    expert_shard_ranks: int = 1
    """How many cut each of those experts among them."""
    shard_ranks: int = 1
    """How many cut all other weights."""
    stays_whole: bool = False
    """Whether what is gathered of weights, and their gradients, are there until the step ends, as pipelines have it."""
    tensor_ranks: int = 1
    """How many cut heads and inner channels, and share out the tokens between layers."""
    row_ranks: int = 1
    """How many hold each row together."""
    methods: tuple[str, ...] = ()
    """How attention reaches over those, by name: see `context.methods`."""
    layers: tuple[int, ...] | None = None
    """Those of this rank; None: all."""
    has_embedding: bool = True
    has_head: bool = True
    in_flight: float = 1.0
    """Micro-batches whose activations are there at a time, as if each went through all of this rank's layers."""
    states: States | None = None
    """None: those of the whole model, where ranks share experts at most."""

    def kind(self, layer: int) -> Kind:
        """What is computed again of one layer."""
        return self.recompute if isinstance(self.recompute, str) else self.recompute[layer]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
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
    """The most that is needed at one moment beside all that: the logits of a chunk, a layer on its way back."""
    gathered: int
    """Whole weights that ranks have cut, of the layers at work and of the ends, and gradients on their way there."""
    exchange: int
    """Keys and values of other ranks and their gradients, in one layer. Rough: as if every key were read."""

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
        """The most at any moment. From the second micro-batch on, as in the first gradients are made one by one."""
        return self.states + self.activations + self.temporary + self.gathered + self.exchange


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
    moment = max(_loss(settings, vocab_size, share), _backward(own, layers, share))
    return Memory(
        weights=held.weights,
        gradients=held.weights,
        moments=held.moments,
        **sums,
        # Gradients are exchanged in one piece, when activations are gone.
        temporary=max(moment, held.flat - sum(sums.values())),
        gathered=_gathered(settings, vocab_size, share),
        exchange=_exchange(own, share),
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


def _gathered(settings: ModelSettings, vocab_size: int, share: Share) -> int:
    """Two layers' weights, one at work and the next on its way; the gradients of as many, and in fp32 to be summed;
    and embedding and head in fp32, as long as a micro-batch takes, with their gradients. Of a pipeline's rank, the
    weights of all its layers, and their gradients in fp32."""
    if share.shard_ranks == 1:
        return 0
    here = share.layers or tuple(range(settings.num_layers))
    cuts, c = Cuts(share.tensor_ranks, share.expert_ranks), share.numbers.itemsize

    def cut_weights(layer: int) -> float:
        made = products(settings, layer, 1, cuts)
        return sum(p.weights for p in made if p.kind != "experts" or share.expert_shard_ranks > 1)

    weights = cut_weights(here[-1])
    end = head(settings, vocab_size, 1, cuts).weights
    ends = end * (share.has_head + (share.has_embedding and not settings.tied_embeddings))
    if share.stays_whole:
        return int(sum(map(cut_weights, here)) * (c + FP32) + weights * FP32 + 2 * FP32 * ends)
    return int(min(2, len(here)) * weights * c + weights * (c + FP32) + 2 * FP32 * ends)


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


def _backward(settings: ModelSettings, layers: dict[int, LayerBytes], share: Share) -> int:
    """The most that a layer needs on the way back, less what the layers above it have already given up."""
    kept = [_sum(layer) for layer in layers.values()]
    above = [sum(kept) - below for below in accumulate(kept)]
    return max(_on_the_way_back(settings, layer, share) - freed for layer, freed in zip(layers, above, strict=True))


def _on_the_way_back(settings: ModelSettings, layer: int, share: Share) -> int:
    """Of a layer: what is made once more, the gradient of the residual stream, and the half that needs more."""
    again, kind = 0, share.kind(layer)
    if kind != "none":
        again = _sum(_kept(settings, layer, share, "none")) - _sum(_kept(settings, layer, share, kind))
    half = _dense_backward if settings.feed_forward_kind(layer) == "dense" else _moe_backward
    return (
        again
        + FP32 * share.num_tokens * settings.width // share.tensor_ranks
        + max(half(settings, share), _attention_backward(settings, share))
    )


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


def _exchange(settings: ModelSettings, share: Share) -> int:
    """The most that one layer holds of other ranks' keys and values, on the way back, when their gradients go home."""
    if share.row_ranks == 1:
        return 0
    attention, c = settings.attention, share.numbers.itemsize
    if isinstance(attention, AttentionSettings):
        C = channels_per_head(attention, settings.width)
        keys, heads = 2 * attention.num_kv_heads * C, 3 * attention.num_heads * C
    else:
        keys = attention.latent_rank + attention.rope_channels
        heads = attention.num_heads * (2 * attention.latent_rank + keys)
    with_gradients = (c + FP32) * keys
    by_method = {name: count(share.row_ranks, with_gradients, c * (heads + keys)) for name, count in EXCHANGE.items()}
    return share.num_tokens * max((by_method[name] for name in share.methods), default=0)


EXCHANGE: dict[str, Callable[[int, int, int], int]] = {
    "ring": lambda ranks, keys, heads: 2 * keys,  # what is worked on and what arrives
    "gather": lambda ranks, keys, heads: ranks * keys,
    "groupcast": lambda ranks, keys, heads: ranks * keys,
    "ulysses": lambda ranks, keys, heads: 2 * heads,  # what is sent and what came, of queries, answers and gradients
    "usp": lambda ranks, keys, heads: 2 * keys + 2 * heads,
}
"""(ranks, bytes of a token's keys and values with gradients, bytes of all its heads) to bytes for each own token."""


def _sum(kept: LayerBytes) -> int:
    return kept.per_token + kept.copies


def parts(needed: Memory) -> Iterator[tuple[str, int]]:
    """Every part that there is any of, by name."""
    return ((name.replace("_", " "), value) for name, value in vars(needed).items() if value)
