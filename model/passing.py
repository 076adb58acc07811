"""How many bytes a rank has of what others have: gathered weights, their keys and values, tokens on their way."""

from collections.abc import Callable

from attention.attention import AttentionSettings, channels_per_head
from model.kept import FP32, Ranks
from model.share import Share
from model.transformer import ModelSettings
from model.work import Cuts, head, products


def gathered(settings: ModelSettings, vocab_size: int, share: Share) -> int:
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


def dispatch(settings: ModelSettings, share: Share) -> int:
    """Of what a layer needs on its way back: the gradients of tokens on each rank that one of their experts is on."""
    if settings.moe is None:
        return 0
    arrivals = Ranks(share.expert_ranks).arrivals(settings.moe)
    return share.numbers.itemsize * share.num_tokens * arrivals * settings.width


def exchange(settings: ModelSettings, share: Share) -> int:
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
