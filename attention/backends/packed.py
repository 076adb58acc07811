"""Documents packed into rows, each attended to alone: long ones where they lie, short ones gathered by length."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from attention.backends import fused
from attention.backends.fused import Widths
from attention.backends.rows import Kernel, backward_rows, forward_rows
from attention.contract import Options
from attention.mask import Documents, Mask, round_up

LONG = 64
"""Documents of at least so many tokens go to a CPU's kernel one by one: a call costs less than moving their tokens."""


@dataclass(frozen=True)
class Batch:
    """Documents that make rows of one batch: neighbours of one length where they lie, or `count` that are gathered.

    Of gathered documents the shorter ones are filled up with copies of their last token. Under a causal mask no query
    sees the copies; what they answer goes to a row of waste behind the last token.
    """

    count: int
    length: int
    source: slice | Tensor
    """The flat token of each slot."""
    target: slice | Tensor
    """The flat token whose answer a slot holds."""
    copies: Tensor | None = None
    """Slots that hold copies."""

    def take(self, x_N: Tensor, *, is_gradient: bool = False) -> Tensor:
        """(N, ...) to (count, length, ...). As a gradient copies are 0: their answers went nowhere."""
        if isinstance(self.source, slice):
            return x_N[self.source].unflatten(0, (self.count, self.length))
        # Of flat rows: torch moves those four times as fast on CPUs as rows of more dimensions.
        x_P = x_N.flatten(1).index_select(0, self.source)
        if is_gradient and self.copies is not None:
            x_P.index_fill_(0, self.copies, 0.0)
        return x_P.view(self.count, self.length, *x_N.shape[1:])

    def put(self, x: Tensor, total_N: Tensor) -> None:
        """(count, length, ...) to where it belongs in (N + 1, ...)."""
        if isinstance(self.target, slice):
            total_N[self.target] = x.flatten(0, 1)
        else:
            total_N.flatten(1).index_copy_(0, self.target, x.flatten(0, 1).flatten(1))


Batches = tuple[Batch, ...]


@lru_cache(maxsize=16)
def arrange(documents: Documents, shortest_alone: int, is_filled: bool, device: torch.device) -> Batches:
    """Documents of `shortest_alone` tokens and more alone, the rest by (if `is_filled` nearly) equal length."""
    lengths = np.asarray(documents.lengths, dtype=np.int64)
    everything = slice(0, documents.num_tokens)
    if documents.is_uniform and shortest_alone > 1:
        return (Batch(len(lengths), int(lengths[0]), everything, everything),)
    starts = np.cumsum(lengths) - lengths
    bins = round_up(lengths) if is_filled else lengths
    is_alone = lengths >= shortest_alone
    found = []
    for start, length in zip(starts[is_alone].tolist(), lengths[is_alone].tolist(), strict=True):
        found.append(Batch(1, length, slice(start, start + length), slice(start, start + length)))
    for bin_ in np.unique(bins[~is_alone]):
        members = np.flatnonzero((bins == bin_) & ~is_alone)
        longest = int(lengths[members].max())
        place_L, length_M1, start_M1 = np.arange(longest), lengths[members, None], starts[members, None]
        source = (start_M1 + np.minimum(place_L, length_M1 - 1)).ravel()
        target = np.where(place_L < length_M1, start_M1 + place_L, documents.num_tokens).ravel()
        copies = np.flatnonzero(target == documents.num_tokens)
        indices = [torch.from_numpy(index).to(device) for index in (source, target, copies)]
        found.append(Batch(len(members), longest, indices[0], indices[1], indices[2] if len(copies) else None))
    return tuple(found)


def batches_of(mask: Mask, q_BTHC: Tensor, k_BSGC: Tensor) -> list[tuple[Batch, Batch, Mask]]:
    """(queries, keys, the mask of each of their rows) until every document was there once."""
    documents, key_documents, prefixes, device = mask.documents, mask.key_documents, mask.prefixes, q_BTHC.device
    if documents is None:
        rows = zip(*(each_row(x.shape[0], x.shape[1]) for x in (q_BTHC, k_BSGC)), prefixes, strict=True)
        return [(queries, keys, replace(mask, prefix=prefix)) for queries, keys, prefix in rows]
    # A prefix may be longer than a document, and would then see the copies.
    is_filled = mask.is_causal and not max(prefixes)
    if key_documents is None and min(prefixes) == max(prefixes):
        # A CUDA device would be left waiting by many small calls.
        shortest_alone = LONG if device.type == "cpu" else documents.num_tokens + 1
        queries = arrange(documents, shortest_alone, is_filled, device)
        row_mask = replace(mask, documents=None, prefix=prefixes[0])
        return [(batch, batch, row_mask) for batch in queries]
    queries = arrange(documents, 1, is_filled, device)
    keys = arrange(documents if key_documents is None else key_documents, 1, is_filled, device)
    if len(prefixes) == 1:
        prefixes = prefixes * len(queries)
    row_masks = [replace(mask, documents=None, key_documents=None, prefix=prefix) for prefix in prefixes]
    return list(zip(queries, keys, row_masks, strict=True))


def each_row(num_rows: int, length: int) -> list[Batch]:
    """Every row a batch of its own."""
    places = [slice(row * length, (row + 1) * length) for row in range(num_rows)]
    return [Batch(1, length, place, place) for place in places]


def gather_answers(batches: list[Batch], answers: list[Tensor], num_tokens: int) -> Tensor:
    """What each batch answered, (count, length, ...), as (N, ...)."""
    first = answers[0]
    if len(batches) == 1 and isinstance(batches[0].target, slice):
        return first.flatten(0, 1)
    total_N = first.new_empty(num_tokens + 1, *first.shape[2:])
    for batch, answer in zip(batches, answers, strict=True):
        batch.put(answer, total_N)
    return total_N[:-1]


def forward_documents(  # noqa: PLR0917 (a product has many factors)
    kernel: Kernel, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, E), log-sum-exp (B, H, T)) of rows that hold documents."""
    B, T = q_BTHC.shape[:2]
    mask.check(B, T, k_BSGC.shape[1])
    if mask.documents is None and isinstance(mask.prefix, int):
        return forward_rows(kernel, q_BTHC, k_BSGC, v_BSGE, mask, scale)
    q_NHC, k_MGC, v_MGE = (x.flatten(0, 1) for x in (q_BTHC, k_BSGC, v_BSGE))
    queries, outs, lses = [], [], []
    for query, key, row_mask in batches_of(mask, q_BTHC, k_BSGC):
        q, k, v = query.take(q_NHC), key.take(k_MGC), key.take(v_MGE)
        out, lse_DHL = forward_rows(kernel, q, k, v, row_mask, scale)
        queries.append(query)
        outs.append(out)
        lses.append(lse_DHL.transpose(1, 2))
    out_NHE, lse_NH = (gather_answers(queries, answers, B * T) for answers in (outs, lses))
    return out_NHE.unflatten(0, (B, T)), lse_NH.unflatten(0, (B, T)).transpose(1, 2)


def backward_documents(  # noqa: PLR0917
    kernel: Kernel,
    grad_BTHE: Tensor,
    q_BTHC: Tensor,
    k_BSGC: Tensor,
    v_BSGE: Tensor,
    out_BTHE: Tensor,
    lse_BHT: Tensor,
    mask: Mask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of rows that hold documents."""
    if mask.documents is None and isinstance(mask.prefix, int):
        return backward_rows(kernel, grad_BTHE, q_BTHC, k_BSGC, v_BSGE, out_BTHE, lse_BHT, mask, scale)
    q_NHC, k_MGC, v_MGE = (x.flatten(0, 1) for x in (q_BTHC, k_BSGC, v_BSGE))
    grad_NHE, out_NHE, lse_NH = (x.flatten(0, 1) for x in (grad_BTHE, out_BTHE, lse_BHT.transpose(1, 2)))
    queries, keys, found = [], [], []
    for query, key, row_mask in batches_of(mask, q_BTHC, k_BSGC):
        q, k, v = query.take(q_NHC), key.take(k_MGC), key.take(v_MGE)
        grad, out, lse_DLH = query.take(grad_NHE, is_gradient=True), query.take(out_NHE), query.take(lse_NH)
        found.append(backward_rows(kernel, grad, q, k, v, out, lse_DLH.transpose(1, 2), row_mask, scale))
        queries.append(query)
        keys.append(key)
    dqs, dks, dvs = (list(part) for part in zip(*found, strict=True))
    dq_NHC = gather_answers(queries, dqs, len(q_NHC))
    dk_MGC, dv_MGE = (gather_answers(keys, part, len(k_MGC)) for part in (dks, dvs))
    return dq_NHC.reshape(q_BTHC.shape), dk_MGC.reshape(k_BSGC.shape), dv_MGE.reshape(v_BSGE.shape)


class FusedKernel(Kernel, Protocol):
    """A kernel of rows that says which widths of heads it takes."""

    @property
    def widths(self) -> Widths: ...


def forward(  # noqa: PLR0917
    kernel: FusedKernel, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options
) -> tuple[Tensor, Tensor]:
    """`attention.contract.Backend.forward` by a kernel that knows rows alone."""

    def inner(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return forward_documents(kernel, q, k, v, mask, scale)

    return fused.forward(inner, kernel.widths, q_BTHC, k_BSGC, v_BSGE, options)


def backward(  # noqa: PLR0917
    kernel: FusedKernel,
    grad_BTHE: Tensor,
    q_BTHC: Tensor,
    k_BSGC: Tensor,
    v_BSGE: Tensor,
    out_BTHE: Tensor,
    lse_BHT: Tensor,
    mask: Mask,
    options: Options,
    grad_lse_BHT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention.contract.Backend.backward` by a kernel that knows rows alone."""

    def inner(*fitted: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out, lse = fitted
        return backward_documents(kernel, grad, q, k, v, out, lse, mask, scale)

    tensors = (grad_BTHE, q_BTHC, k_BSGC, v_BSGE, out_BTHE, lse_BHT)
    return fused.backward(inner, kernel.widths, *tensors, options, grad_lse_BHT)
