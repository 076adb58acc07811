"""Read a long prompt in chunks: besides the cache only one chunk's activations exist at a time."""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor

from attention.cache import KVCache, Room
from model.block import Block
from model.loss import product_dtype
from model.transformer import Transformer
from moe.router import evaluation_refusal
from settings import Refusal

CHUNK = 2048
"""Tokens of a row that are read at once: enough to keep matrix products busy."""


def new_cache(model: Transformer, num_rows: int, capacity: int, chunk: int = CHUNK, reach: int = 0) -> KVCache:
    """An empty cache for `capacity` tokens of so many rows, where the model is and in the dtype of its keys.

    chunk: tokens that are mostly read at once; reach: how far window layers can be trimmed (attention.cache.Room).
    """
    weight = model.embedding.weight
    room = Room(num_rows, capacity, chunk, reach, weight.device, product_dtype(weight))
    return KVCache([block.attention.new_cache(room) for block in cast("Iterable[Block]", model.blocks)])


@torch.no_grad()
def prefill(model: Transformer, tokens_BT: Tensor, cache: KVCache, chunk: int = CHUNK) -> Tensor:
    """Read the tokens into the cache: hidden state (B, D) of the last of at least one."""
    *_, (_, hidden_BTD) = read(model, tokens_BT, cache, chunk)
    return hidden_BTD[:, -1]


def read(model: Transformer, tokens_BT: Tensor, cache: KVCache, chunk: int = CHUNK) -> Iterator[tuple[int, Tensor]]:
    """Read the tokens that follow those in the cache, `chunk` at a time: (place of the first, hidden (B, t, D)).

    The same numbers as one forward of the whole row, but for rounding. Use it under `torch.no_grad()`.
    """
    check_chunks(model)
    for start in range(0, tokens_BT.shape[1], chunk):
        yield start, model(tokens_BT[:, start : start + chunk], cache=cache)[0]


def check_chunks(model: Transformer) -> None:
    """Refuse a model whose experts are chosen by looking at all of a row, which is never there at once."""
    moe = model.settings.moe
    if moe is None:
        return
    if model.training and moe.needs_whole_rows:
        key = "capacity" if moe.capacity is not None else f"router.kind={moe.router.kind!r}"
        raise Refusal(
            f"model.moe.{key} looks at whole rows in training, not at chunks of them; call model.eval() first"
        )
    reason = evaluation_refusal(moe.router)
    if reason is not None:
        raise Refusal(reason)
