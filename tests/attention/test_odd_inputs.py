"""What nobody plans for: channels that do not lie side by side, no rows at all, numbers and types that mean nothing."""

import pytest
import torch

from attention.backends.reference import Reference
from attention.contract import Options
from attention.function import attention
from attention.mask import Documents, Mask
from settings import Refusal

VIEWS = {
    "unbound": lambda: torch.randn(2, 24, 4, 16, 3).unbind(-1),
    "every other": lambda: tuple(torch.randn(2, 24, 4, 32)[..., ::2] for _ in range(3)),
    "expanded": lambda: tuple((torch.randn(2, 24, 4, 1) / 4).expand(2, 24, 4, 16) for _ in range(3)),
    "transposed": lambda: tuple(torch.randn(2, 24, 16, 4).transpose(2, 3) for _ in range(3)),
}


@pytest.mark.parametrize("backend", ["auto", "sdpa", "blockwise", "reference"])
@pytest.mark.parametrize("view", VIEWS)
def test_channels_that_do_not_lie_side_by_side(view: str, backend: str) -> None:
    torch.manual_seed(0)
    views = [x.detach().requires_grad_() for x in VIEWS[view]()]
    plain = [x.detach().double().contiguous().requires_grad_() for x in views]
    answers = []
    for tensors, name in ((views, backend), (plain, "reference")):
        out, lse = attention(*tensors, return_lse=True, backend=name)
        answers.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), tensors)])  # the gradient is expanded
    for got, wanted in zip(*answers, strict=True):
        assert (got - wanted).abs().max() <= 2e-5


@pytest.mark.parametrize("backend", ["sdpa", "blockwise", "reference"])
@pytest.mark.parametrize("mask", [Mask(), Mask(window=3)])
def test_no_rows(backend: str, mask: Mask) -> None:
    q = torch.zeros(0, 8, 4, 16, requires_grad=True)
    out, lse = attention(
        q, q, q, mask, softcap=5.0 if backend == "blockwise" else 0.0, return_lse=True, backend=backend
    )
    (out.sum() + lse.sum()).backward()
    assert out.shape == (0, 8, 4, 16) and lse.shape == (0, 4, 8) and q.grad.shape == q.shape


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("number", [-1.0, float("nan"), float("inf")])
def test_numbers_that_mean_nothing(name: str, number: float) -> None:
    with pytest.raises(Refusal, match=f"{name}={number} must be"):
        Options(**{name: number})


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(Refusal, match=r"scale=0\.0 must be above 0"):
        attention(*[torch.ones(1, 2, 1, 4)] * 3, scale=0.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mask(window=1.5), "window=1.5 must be a whole number"),
        (lambda: Mask(first_tokens=0.5), "first_tokens=0.5 must be a whole number"),
        (lambda: Mask(prefix=(1, 2.5)), "prefix=2.5 must be a whole number"),
        (lambda: Mask(documents=(8, 8)), r"documents is of type tuple; give Documents"),
        (lambda: Documents((1.5, 2)), "whole numbers"),
        (lambda: Documents.from_cu_seqlens([0, 8.5, 16]), "whole numbers"),
        (lambda: Documents.from_cu_seqlens(torch.tensor([0.0, 16.0])), "whole numbers"),
        (lambda: Documents.from_cu_seqlens(16), "of type int; give a sequence"),
        (lambda: attention(None, None, None), "q is of type NoneType"),
        (lambda: attention(*[torch.ones(1, 2, 1, 4)] * 3, None), "mask is of type NoneType"),
        (lambda: attention(*[torch.ones(1, 2, 1, 4)] * 3, sink=1.0), "sink is of type float"),
        (lambda: attention(*[torch.ones(1, 2, 1, 4)] * 3, sink=torch.ones(1, device="meta")), "sink is on meta"),
        (lambda: attention(*[torch.ones(1, 2, 1, 4)] * 3, backend=None), "backend=None must be a name"),
        (lambda: attention(*[torch.ones(1, 2, 1, 0)] * 3), "at least one channel"),
    ],
)
def test_types_that_mean_nothing(make, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        make()


def test_a_list_of_lengths_is_taken() -> None:
    assert Documents([8, 8]) == Documents((8, 8)) and hash(Documents([8, 8])) == hash(Documents((8, 8)))


def test_nothing_seen_and_a_sink_of_minus_infinity() -> None:
    q, k = torch.randn(1, 3, 2, 4, requires_grad=True), torch.randn(1, 0, 2, 4)
    out, lse = attention(q, k, k, sink=torch.full((2,), float("-inf")), return_lse=True)
    assert (out == 0).all() and (lse == float("-inf")).all()
    out.sum().backward()
    assert (q.grad == 0).all()


def test_a_nan_is_not_hidden_by_a_sink() -> None:
    q = torch.full((1, 2, 1, 4), float("nan"))
    assert attention(q, q, q, sink=torch.zeros(1)).isnan().all()
    assert Reference().forward(q, q, q, Mask(), Options())[0].isnan().all()
