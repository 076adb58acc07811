"""What each backend claims, run where it can run here and compared; what it does not claim, refused."""

from dataclasses import replace

import pytest
import torch

from attention.backends.reference import Reference
from attention.contract import PLAIN_FACTS, Needs, Options
from attention.core import BACKENDS, choose, why_not
from attention.mask import Documents, Mask
from settings import Refusal
from tests.attention.cases import Case

PLAIN = Case(2, 12, 12, 2, 2, 16, 16, Mask(), Options())

# The smallest call that asks for each fact of the contract, and for some that meet.
ASKED = {
    "window": replace(PLAIN, mask=Mask(window=5)),
    "documents": replace(PLAIN, mask=Mask(documents=Documents((5, 7, 12)))),
    "unequal_lengths": replace(PLAIN, T=5),
    "offset": replace(PLAIN, mask=Mask(offset=3)),
    "key_documents": replace(
        PLAIN, T=9, mask=Mask(documents=Documents((5, 4, 9)), key_documents=Documents((7, 5, 12)))
    ),
    "prefix": replace(PLAIN, mask=Mask(prefix=4)),
    "first_tokens": replace(PLAIN, mask=Mask(window=3, first_tokens=2)),
    "softcap": replace(PLAIN, options=Options(softcap=2.0)),
    "value_channels": replace(PLAIN, E=8),
    "partial": replace(PLAIN, options=Options(is_partial=True)),
    "lse_gradient": PLAIN,
}


def needs_of(case: Case, fact: str, dtype: torch.dtype, training: bool) -> Needs:
    q, k, v, *_ = case.tensors(dtype)
    return Needs.of(q, k, v, case.mask, case.options, training=training, lse_gradient=fact == "lse_gradient")


def test_every_fact_is_asked_for() -> None:
    assert set(ASKED) == set(PLAIN_FACTS)
    for fact, case in ASKED.items():
        assert getattr(needs_of(case, fact, torch.float32, training=True), fact)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("fact", ASKED)
@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_claimed_is_true_and_what_is_not_is_refused(name: str, fact: str) -> None:
    backend, case = BACKENDS[name], ASKED[fact]
    dtype = next((x for x in (torch.float64, torch.float32) if x in backend.capability.dtypes), torch.bfloat16)
    if fact == "partial" and torch.bfloat16 in backend.capability.dtypes:
        dtype = torch.bfloat16
    needs = needs_of(case, fact, dtype, training=backend.capability.trainable)
    if why_not(backend, needs):
        with pytest.raises(Refusal, match=f"attention.backend='{name}'"):
            choose(name, needs)
        return
    assert choose(name, needs) is backend
    *inputs, grad, grad_lse = case.tensors(dtype)
    wide = [x.double() for x in (*inputs, grad, grad_lse)]
    out, lse = backend.forward(*inputs, case.mask, case.options)
    wanted, wanted_lse = Reference().forward(*wide[:3], case.mask, case.options)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5 if fact == "partial" else 2e-2}[dtype]
    assert out.dtype == (torch.float32 if fact == "partial" and dtype == torch.bfloat16 else dtype)
    assert (out - wanted).norm() <= tolerance * wanted.norm() and (lse - wanted_lse).norm() <= tolerance * 100
    if not backend.capability.trainable:
        return
    given = (wanted.to(out.dtype), wanted_lse.to(lse.dtype), case.mask, case.options)
    more = (grad_lse.to(lse.dtype), wide[4]) if fact == "lse_gradient" else (None, None)
    parts = backend.backward(grad, *inputs, *given, more[0])
    right = Reference().backward(wide[3], *wide[:3], wanted, wanted_lse, case.mask, case.options, more[1])
    for part, wants in zip(parts, right, strict=True):
        assert part.dtype == out.dtype and (part - wants).norm() <= tolerance * wants.norm()
