"""flex_attention: forward as torch computes it on a CPU, gradients by a stand-in that a CPU can differentiate."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from attention.backends import flex
from attention.backends.flex import Flex
from attention.backends.reference import Reference
from attention.contract import Needs, Options, missing
from attention.mask import Documents, Mask
from tests.attention.cases import Case, assert_like_reference, cases

INF = float("inf")
reference = Reference()


def plain_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_mod: Any,
    block_mask: Any,
    scale: float,
    enable_gqa: bool,
    return_aux: Any,
) -> Any:
    """flex_attention as its documentation has it, in tensors; it differentiates out and log-sum-exp."""
    assert enable_gqa == (q.shape[1] != k.shape[1]) and return_aux.lse
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("bhtc,bhsc->bhts", q, k) * scale
    (B, H, T), S = q.shape[:3], k.shape[2]
    places = torch.meshgrid(*(torch.arange(n) for n in (B, H, T, S)), indexing="ij")
    if score_mod is not None:
        scores = score_mod(scores, *places)
    scores = scores.masked_fill(~block_mask.mask_mod(*places), -INF)
    # Finite where nothing is seen, so that the gradient there is 0 and not NaN.
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.masked_fill(lse == -INF, 0.0)).exp()
    return torch.einsum("bhts,bhse->bhte", weights, v), SimpleNamespace(lse=lse[..., 0])


@settings(max_examples=30, deadline=None)
@given(cases())
def test_gradients_are_those_of_the_plain_one(case: Case) -> None:
    flex.block_mask.cache_clear()
    assert_like_reference(Flex(plain_flex), case)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("T", "S", "mask", "softcap"),
    [
        (9, 20, Mask(window=4, first_tokens=2), 0.0),
        (20, 9, Mask(), 1.5),
        (8, 8, Mask(is_causal=False), 0.0),
        (12, 12, Mask(documents=Documents((5, 7, 12)), prefix=(1, 3, 0)), 0.0),
        (12, 9, Mask(documents=Documents((5, 7, 12)), key_documents=Documents((7, 2, 9)), window=3), 0.0),
        (6, 10, Mask(offset=-2), 0.0),
    ],
    ids=str,
)
def test_forward_is_the_plain_one_by_torch_itself(T: int, S: int, mask: Mask, softcap: float) -> None:
    case = Case(2, T, S, 2, 2, 8, 5, mask, Options(0.3, softcap))
    inputs = case.tensors()[:3]
    (out, lse), (wanted, wanted_lse) = (x.forward(*inputs, mask, case.options) for x in (Flex(), reference))
    assert torch.allclose(out, wanted, rtol=0, atol=1e-10)
    assert torch.equal(lse == -INF, wanted_lse == -INF)
    assert torch.allclose(lse.clamp(min=-1e30), wanted_lse.clamp(min=-1e30), rtol=0, atol=1e-10)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_mask_mod_is_the_mask(case: Case) -> None:
    mod = flex.mask_mod(case.mask, case.B, case.T, case.S, torch.device("cpu"))
    places = torch.meshgrid(*(torch.arange(n) for n in (case.B, 1, case.T, case.S)), indexing="ij")
    assert torch.equal(mod(*places)[:, 0], case.mask.dense(case.B, case.T, case.S, "cpu"))


@pytest.mark.parametrize(("T", "S"), [(0, 3), (3, 0)])
def test_nothing_to_attend(T: int, S: int) -> None:
    q, k = torch.randn(2, T, 4, 8), torch.randn(2, S, 2, 8)
    out, lse = Flex().forward(q, k, k, Mask(), Options())
    assert out.shape == q.shape and not out.any() and lse.shape == (2, 4, T) and (lse == -INF).all()
    dq, dk, dv = Flex(plain_flex).backward(out, q, k, k, out, lse, Mask(), Options())
    assert not dq.any() and not dk.any() and not dv.any() and dk.shape == dv.shape == k.shape


def test_low_precision_answers() -> None:
    q, k, v = (x.bfloat16() for x in torch.randn(3, 1, 40, 2, 16))
    wanted, _ = reference.forward(q.double(), k.double(), v.double(), Mask(window=9), Options())
    for is_partial, dtype, tolerance in ((False, torch.bfloat16, 4e-3), (True, torch.float32, 1e-6)):
        out, lse = Flex().forward(q, k, v, Mask(window=9), Options(is_partial=is_partial))
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert (out - wanted).norm() <= tolerance * wanted.norm()


def test_a_block_mask_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    flex.block_mask.cache_clear()
    made = []
    plain = flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", lambda *args, **named: made.append(args) or plain(*args, **named))
    q = torch.randn(1, 20, 2, 16)
    for _ in range(3):
        for mask in (Mask(documents=Documents((12, 8))), Mask(window=4)):
            Flex().forward(q, q, q, mask, Options())
    assert len(made) == 2
    flex.block_mask.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_does_not_train_on_a_cpu() -> None:
    assert missing(Flex().capability, Needs("cpu", torch.float32, training=True)) == ["has no backward pass"]
    assert not missing(Flex().capability, Needs("cpu", torch.float32, softcap=True, prefix=True))


def test_on_cuda_it_trains_and_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not missing(Flex().capability, Needs("cuda", torch.bfloat16, training=True, lse_gradient=True))
    assert missing(Flex().capability, Needs("cpu", torch.float32)) == ["runs on cuda, not on cpu"]
    monkeypatch.setattr(torch, "compile", lambda function: ("compiled", function))
    flex.default_function.cache_clear()
    assert flex.default_function("cuda") == ("compiled", flex.flex_attention)
    flex.default_function.cache_clear()
