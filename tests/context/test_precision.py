"""Low precision over ranks is as good as on one: parts are added up in fp32, and rounded once or not at all."""

import pytest
import torch
from torch import Tensor

from attention.backends.reference import Reference
from attention.contract import Options
from attention.core import BACKENDS
from attention.mask import Mask
from context.local_comm import LocalComm
from context.methods import METHODS, build_method
from tests.context.over_ranks import Case, answer, expected, inputs, over_ranks, packed, share, split_case


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
@pytest.mark.parametrize("inner", ["reference", "sdpa"])
def test_low_precision_is_rounded_once(method: str, heads: tuple[int, int], inner: str) -> None:
    case = Case(packed("ragged"), heads, has_sink=True, dtype=torch.bfloat16)
    mask = split_case(case, "balanced", 4, chunks_per_rank=4)
    single, exact = answer(case, BACKENDS[inner], list(inputs(case)), Mask(documents=case.documents)), expected(case)
    ranks = LocalComm.run(4, lambda comm: over_ranks(case, mask, build_method(method, comm), comm, BACKENDS[inner]))
    triples = [([rank.out for rank in ranks], single.out, exact.out)]
    triples += [([rank.gradients[i] for rank in ranks], single.gradients[i], exact.gradients[i]) for i in range(3)]
    for parts, alone, right in triples:
        together = mask.layout.unshard(parts)
        assert together.dtype == torch.bfloat16
        assert off(together, right) <= 1.25 * off(alone, right)


@pytest.mark.parametrize("method", METHODS)
def test_only_partial_answers_are_not_rounded(method: str) -> None:
    case = Case(packed("ragged"), (4, 1), dtype=torch.bfloat16)
    mask, exact = split_case(case, "zigzag", 4), expected(case)

    def one(comm: LocalComm) -> None:
        q, k, v, grad, _ = share(case, mask, comm.rank)
        backend = build_method(method, comm).over(Reference())
        for options in (Options(is_partial=True), Options()):
            out, lse = backend.forward(q, k, v, mask, options)
            gradients = backend.backward(grad.to(out.dtype), q, k, v, out, lse, mask, options)
            assert lse.dtype == torch.float32
            for mine, whole in zip((out, *gradients), (exact.out, *exact.gradients), strict=True):
                assert mine.dtype == (torch.float32 if options.is_partial else torch.bfloat16)
                if options.is_partial:
                    assert (mine - mask.layout.shard(whole, comm.rank)).abs().max() <= 1e-5

    LocalComm.run(4, one)


def off(a: Tensor, exact: Tensor) -> float:
    """The relative L2 error."""
    return ((a.double() - exact).norm() / exact.norm()).item()
