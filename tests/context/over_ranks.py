"""Attention over ranks held to the fp64 reference on whole rows: what each rank runs and compares."""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from attention.attend import attend
from attention.backends.reference import Reference
from attention.contract import Backend, Options
from attention.mask import Documents, Mask
from context.comm import Comm
from context.layout import Layout
from context.methods import Method
from context.plan import SplitMask
from tests.context.packed import cut_rows

ROWS, LENGTH = 2, 32
DOCUMENTS = {  # of a row of 32 tokens; 4 ranks have chunks of 4 (zigzag) or 8 (contiguous)
    "one document": [32, 32],
    "ragged": [5, 11, 3, 13, 7, 17, 8],
    "shorter than a chunk": [2, 3, 1, 2] * 8,
    "border on a chunk border": [8, 24, 16, 16],
    "length-1 documents": [1, 1, 14, 1, 15, 31, 1],
}
HEADS = {"multi-head": (4, 4), "grouped": (4, 2), "multi-query": (4, 1)}


@dataclass(frozen=True)
class Case:
    """One attention, and the ways to cut it."""

    documents: Documents
    heads: tuple[int, int] = (4, 2)
    window: int | None = None
    has_sink: bool = False
    value_channels: int = 8
    channels: int = 8
    is_latent: bool = False
    """The values are a view of the keys."""
    num_rows: int = ROWS
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32

    @property
    def options(self) -> Options:
        return Options(softcap=self.softcap)


@dataclass
class Answer:
    """What attention gives, and what the gradients of sum(out * grad) are."""

    out: Tensor
    lse: Tensor
    gradients: list[Tensor] = field(default_factory=list)
    """Of q, k, v and, where there is one, the sink; of a latent, where values are keys, all is in that of k."""


def split_case(case: Case, kind: str, num_ranks: int, chunks_per_rank: int = 2) -> SplitMask:
    row_length = case.documents.num_tokens // case.num_rows
    layout = Layout.make(
        kind, case.num_rows, row_length, num_ranks, case.documents.lengths, chunks_per_rank=chunks_per_rank
    )
    return SplitMask(documents=case.documents, window=case.window, layout=layout)


@lru_cache(maxsize=256)
def inputs(case: Case) -> tuple[Tensor, ...]:
    """q, k, v, the gradient of out, and the sink, N(0, 1), of the whole rows."""
    generator = torch.Generator().manual_seed(len(case.documents.lengths) + 7 * case.heads[1])
    (H, G), rows = case.heads, (case.num_rows, case.documents.num_tokens // case.num_rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    q, k = draw(*rows, H, case.channels), draw(*rows, G, case.channels)
    return q, k, draw(*rows, G, case.value_channels), draw(*rows, H, case.value_channels), draw(H)


@lru_cache(maxsize=256)
def expected(case: Case) -> Answer:
    """By the fp64 reference on whole rows."""
    whole = [x.double() for x in inputs(case)]
    return answer(case, Reference(), whole, Mask(documents=case.documents, window=case.window))


def answer(case: Case, backend: Backend, tensors: list[Tensor], mask: Mask) -> Answer:
    q, k, v, grad, sink = (x.detach().clone() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]
    values = k[..., : case.value_channels] if case.is_latent else v
    sink_H = sink if case.has_sink else None
    out, lse = attend(backend, q, k, values, mask, case.options, sink_H=sink_H)
    (out * grad).sum().backward()
    return Answer(out.detach(), lse.detach(), [x.grad for x in leaves if x.grad is not None])


def share(case: Case, mask: SplitMask, rank: int) -> list[Tensor]:
    *tokens, sink = inputs(case)
    return [*(mask.layout.shard(x, rank) for x in tokens), sink]


def over_ranks(case: Case, mask: SplitMask, method: Method, comm: Comm, inner: Backend | None = None) -> Answer:
    """This rank's share, with the sink's gradient summed over ranks, as a training step would."""
    backend = method.over(inner or Reference())
    mine = answer(case, backend, share(case, mask, comm.rank), mask)
    if case.has_sink:
        mine.gradients[-1] = comm.sum(mine.gradients[-1])
    return mine


def errors(case: Case, mask: SplitMask, mine: Answer, rank: int) -> tuple[float, float, float]:
    """Largest differences to the reference: (out, log-sum-exp, gradients)."""
    whole = expected(case)
    gradients = [mask.layout.shard(x, rank) for x in whole.gradients[: len(whole.gradients) - case.has_sink]]
    gradients += whole.gradients[-1:] if case.has_sink else []
    assert len(mine.gradients) == len(gradients)
    return (
        _apart(mine.out, mask.layout.shard(whole.out, rank)),
        _apart(mine.lse, mask.layout.shard(whole.lse.transpose(1, 2), rank).transpose(1, 2)),
        max(_apart(a, b) for a, b in zip(mine.gradients, gradients, strict=True)),
    )


def check(case: Case, mask: SplitMask, method: Method, comm: Comm, inner: Backend | None = None) -> None:
    mine = over_ranks(case, mask, method, comm, inner)
    out, lse, gradients = errors(case, mask, mine, comm.rank)
    assert out <= 2e-6, f"{method.way.description}: out is off by {out:.1e}: {case}"
    assert lse <= 5e-6, f"{method.way.description}: log-sum-exp is off by {lse:.1e}: {case}"
    assert gradients <= 1e-5, f"{method.way.description}: gradients are off by {gradients:.1e}: {case}"


def packed(name: str) -> Documents:
    return cut_rows(DOCUMENTS[name], LENGTH, ROWS)


def _apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item()
