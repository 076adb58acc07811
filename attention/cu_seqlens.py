"""FlashAttention's cu_seqlens as documents of a mask, and what to do with documents that have no queries or no keys."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from attention.mask import Documents, Mask, lengths_between
from settings import Refusal

Starts = Tensor | Sequence[int]
"""0, then where each document ends among the flat tokens."""


@dataclass(frozen=True)
class Part:
    """The tokens that take part in attention, and the mask among them."""

    mask: Mask
    query_N: Tensor | None
    """Flat places of the queries whose documents have keys; None: all of them, and all keys."""
    key_N: Tensor | None


def read(mask: Mask, queries: Starts, keys: Starts | None, q_BTHC: Tensor, k_BSGC: Tensor) -> Part:
    """`mask` with the documents that start so. keys: where they are not the queries'.

    A tensor on a GPU is waited for: where that matters, give sequences or put `Documents` into the mask.
    """
    if mask.documents is not None or mask.offset is not None:
        raise Refusal("cu_seqlens takes the place of documents and offset in the mask; leave those out")
    query_lengths = _lengths(queries, q_BTHC, "cu_seqlens")
    key_lengths = query_lengths if keys is None else _lengths(keys, k_BSGC, "key_cu_seqlens")
    if len(query_lengths) != len(key_lengths):
        raise Refusal(
            f"cu_seqlens has {len(query_lengths)} documents and key_cu_seqlens {len(key_lengths)}; give equally many"
        )
    is_in = (query_lengths > 0) & (key_lengths > 0)
    if isinstance(mask.prefix, tuple):
        if len(mask.prefix) != len(is_in):
            raise Refusal(f"prefix has {len(mask.prefix)} numbers for {len(is_in)} documents; give one for each")
        mask = replace(mask, prefix=tuple(np.array(mask.prefix)[is_in].tolist()))
    if is_in.any():
        documents, key_documents = (Documents(tuple(x[is_in].tolist())) for x in (query_lengths, key_lengths))
        mask = replace(mask, documents=documents, key_documents=None if keys is None else key_documents)
        if not query_lengths[~is_in].any() and not key_lengths[~is_in].any():
            return Part(mask, None, None)
    else:
        mask = replace(mask, prefix=0)  # there is nobody to count for
    query_N, key_N = (
        torch.from_numpy(np.flatnonzero(np.repeat(is_in, lengths))).to(q_BTHC.device)
        for lengths in (query_lengths, key_lengths)
    )
    return Part(mask, query_N, key_N)


def _lengths(starts: Starts, x_BTHC: Tensor, name: str) -> np.ndarray:
    """The documents' lengths, of empty ones too."""
    lengths = np.array(lengths_between(starts, name), dtype=np.int64)
    B, T = x_BTHC.shape[:2]
    if lengths.sum() != B * T:
        raise Refusal(f"{name} ends at {lengths.sum()}, but there are {B} x {T} tokens; they must be equal")
    return lengths
