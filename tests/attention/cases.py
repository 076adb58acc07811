"""Random attention calls of every kind that the contract knows, for tests that hold a backend to the plain one."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from attention.backends.reference import Reference
from attention.contract import Backend, Options
from attention.mask import Documents, Mask


@dataclass(frozen=True)
class Case:
    """One call; tensors follow from it alone."""

    B: int
    T: int
    S: int
    G: int
    R: int
    C: int
    E: int
    mask: Mask
    options: Options

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """q, k, v, grad (B, T, H, E), grad_lse (B, H, T) of unit scale."""
        generator = torch.Generator().manual_seed(self.T * 100 + self.S)
        H = self.G * self.R
        shapes = [(self.B, self.T, H, self.C), (self.B, self.S, self.G, self.C), (self.B, self.S, self.G, self.E)]
        shapes += [(self.B, self.T, H, self.E), (self.B, H, self.T)]
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def cut(total: int, borders: set[int]) -> tuple[int, ...]:
    """Lengths of the pieces of `total` between these borders."""
    ends = sorted({0, total, *(border % total for border in borders)})
    return tuple(after - before for before, after in pairwise(ends))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    B, G, R = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    C, E = draw(st.sampled_from([(4, 4), (4, 7), (8, 3)]))
    T, S = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["causal", "full", "tile", "documents", "key documents"]))
    if kind == "full":
        mask = Mask(is_causal=False)
    elif kind == "tile":
        mask = Mask(offset=draw(st.integers(-45, 45)))
    elif kind == "documents":
        S = T
        rows = [cut(T, draw(st.sets(st.integers(1, 40), max_size=8))) for _ in range(B)]
        mask = Mask(documents=Documents(sum(rows, ())))
    elif kind == "key documents":
        count = draw(st.integers(1, min(T, S, 6)))
        lengths = [_pieces(draw, total, count) for _ in range(B) for total in (T, S)]
        mask = Mask(documents=Documents(sum(lengths[0::2], ())), key_documents=Documents(sum(lengths[1::2], ())))
    else:
        mask = Mask()
    if kind != "full":
        mask = _more(draw, mask, B)
    options = Options(
        draw(st.sampled_from([None, 0.5])), softcap=draw(st.sampled_from([0.0, 1.5])), is_partial=draw(st.booleans())
    )
    return Case(B, T, S, G, R, C, E, mask, options)


def _pieces(draw: st.DrawFn, total: int, count: int) -> tuple[int, ...]:
    borders = draw(st.sets(st.integers(1, total - 1), min_size=count - 1, max_size=count - 1)) if count > 1 else set()
    return cut(total, borders)


def _more(draw: st.DrawFn, mask: Mask, B: int) -> Mask:
    count = B if mask.documents is None else len(mask.documents.lengths)
    each = st.lists(st.integers(0, 9), min_size=count, max_size=count).map(tuple)
    return Mask(
        window=draw(st.sampled_from([None, None, 1, 2, 7, 99])),
        documents=mask.documents,
        key_documents=mask.key_documents,
        prefix=draw(st.one_of(st.just(0), st.integers(1, 12), each)),
        first_tokens=draw(st.sampled_from([0, 0, 1, 5])),
        offset=mask.offset,
    )


def assert_like_reference(backend: Backend, case: Case, tolerance: float = 1e-11) -> None:
    """Out, log-sum-exp and gradients in fp64, of a softmax that other keys share and whose log-sum-exp is used."""
    *inputs, grad, grad_lse = case.tensors()
    (out, lse), (wanted, wanted_lse) = (x.forward(*inputs, case.mask, case.options) for x in (backend, Reference()))
    assert out.shape == wanted.shape and lse.shape == wanted_lse.shape
    sees_nothing = wanted_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), sees_nothing)
    assert (lse - wanted_lse)[~sees_nothing].abs().sum() <= tolerance * lse.numel()
    assert torch.allclose(out, wanted, rtol=0, atol=tolerance)
    assert not out.transpose(1, 2)[sees_nothing].any()
    # As if keys elsewhere had added exp(0.5) to each sum; those of a query that sees nothing here stay apart.
    wider = torch.where(sees_nothing, lse, torch.logaddexp(wanted_lse, torch.tensor(0.5, dtype=torch.float64)))
    if not backend.capability.lse_gradient:
        grad_lse = None
    for given in (wanted_lse, wider):
        parts, expected = (
            x.backward(grad, *inputs, wanted, given, case.mask, case.options, grad_lse) for x in (backend, Reference())
        )
        for part, right, like in zip(parts, expected, inputs, strict=True):
            assert part.shape == like.shape
            assert torch.allclose(part, right, rtol=0, atol=tolerance * 10)
