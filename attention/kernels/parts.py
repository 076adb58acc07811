"""Many parts of one softmax in one launch: the tiles that a rank computes against the keys of one other rank.

Each is small, and so many launches would cost more than the work. Parts may share queries and keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from attention.contract import Options
from attention.kernels.blocks import Spans
from attention.kernels.launch import Answers, Call, Tiles
from attention.mask import Mask
from settings import Refusal


class Part(Protocol):
    """These queries against these keys under a mask without documents."""

    @property
    def queries(self) -> slice: ...

    @property
    def keys(self) -> slice: ...

    @property
    def mask(self) -> Mask: ...


def forward_parts(  # noqa: PLR0917 (as in the contract)
    q_1NHC: Tensor,
    k_1SGC: Tensor,
    v_1SGE: Tensor,
    parts: Sequence[Part],
    options: Options,
    tiles: Tiles | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(out (1, n, H, E), log-sum-exp (1, H, n)) of each part, as `Backend.forward` would give it for its slices."""
    call = Call.of(q_1NHC, k_1SGC, v_1SGE, options, tiles)
    answers: dict[int, tuple[Tensor, Tensor]] = {}
    for work, indices in _launches(parts):
        lengths = [span[1] for span in work.parts]
        out_NHE, lse_NH = call.forward(work, sum(lengths))
        for index, out_nHE, lse_nH in zip(indices, out_NHE.split(lengths), lse_NH.split(lengths), strict=True):
            answers[index] = out_nHE[None], lse_nH.T[None]
    return [answers[index] for index in range(len(parts))]


def backward_parts(  # noqa: PLR0917 (as in the contract)
    grad_1NHE: Tensor,
    q_1NHC: Tensor,
    k_1SGC: Tensor,
    v_1SGE: Tensor,
    out_1NHE: Tensor,
    lse_1HN: Tensor,
    parts: Sequence[Part],
    options: Options,
    grad_lse_1HN: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, summed in fp32 over all parts in order; out and log-sum-exp are the merged ones."""
    call = Call.of(q_1NHC, k_1SGC, v_1SGE, replace(options, is_partial=True), tiles)
    answers = Answers.of(grad_1NHE.to(q_1NHC.dtype), out_1NHE, lse_1HN, grad_lse_1HN, k_1SGC.shape[2])
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (q_1NHC, k_1SGC, v_1SGE))
    for work, indices in _launches(parts):
        queries, keys = ([span[i] for span in work.parts] for i in (1, 3))
        grads = call.backward(work, answers, sum(queries), sum(keys))
        pieces = [x.split(lengths) for x, lengths in zip(grads, (queries, keys, keys), strict=True)]
        for index, own_q, own_k, own_v in zip(indices, *pieces, strict=True):
            grad_q[0, parts[index].queries] += own_q
            grad_k[0, parts[index].keys] += own_k
            grad_v[0, parts[index].keys] += own_v
    return grad_q, grad_k, grad_v


def _launches(parts: Sequence[Part]) -> Iterator[tuple[Spans, list[int]]]:
    """(work, which parts are in it): parts whose masks differ in nothing but their offset go together."""
    together: dict[Mask, list[int]] = {}
    for index, part in enumerate(parts):
        if part.mask.documents is not None or isinstance(part.mask.prefix, tuple):
            raise Refusal("parts of one launch have no documents: call the backend for those, or cut them into parts")
        together.setdefault(replace(part.mask, offset=None), []).append(index)
    for mask, indices in together.items():
        yield Spans(mask, tuple(_span(parts[index]) for index in indices)), indices


def _span(part: Part) -> tuple[int, int, int, int, int]:
    queries, keys = part.queries.stop - part.queries.start, part.keys.stop - part.keys.start
    offset = keys - queries if part.mask.offset is None else part.mask.offset
    return part.queries.start, queries, part.keys.start, keys, offset
