"""The autograd function over backends: gradients to the last digit, sinks, what is kept, precision under autocast."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.attend import Kept, add_sink, attend
from attention.backends.blockwise import Blockwise
from attention.backends.reference import Reference
from attention.contract import Backend, Capability, Options
from attention.mask import Documents, Mask
from tests.attention.cases import Case, cases

BOTH = [Reference(), Blockwise(4)]
MASK = Mask(window=5, documents=Documents((7, 1, 4)))


def written_out(case: Case, q: Tensor, k: Tensor, v: Tensor, sink_H: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention as the docstrings define it, its gradients left to autograd, the sink as one more score."""
    k, v = (x.repeat_interleave(case.R, dim=2) for x in (k, v))
    scores = torch.einsum("bthc,bshc->bhts", q, k) * case.options.scale_for(case.C)
    if case.options.softcap:
        scores = case.options.softcap * (scores / case.options.softcap).tanh()
    weights = scores.exp() * case.mask.dense(case.B, case.T, case.S, "cpu")[:, None]
    total = weights.sum(-1) + (0 if sink_H is None else sink_H.exp()[:, None])
    sees_nothing = total == 0
    weights = weights / total.masked_fill(sees_nothing, 1)[..., None]
    lse = total.masked_fill(sees_nothing, 1).log().masked_fill(sees_nothing, float("-inf"))
    return torch.einsum("bhts,bshc->bthc", weights, v), lse


@pytest.mark.parametrize("backend", BOTH, ids=lambda backend: backend.name)
@settings(max_examples=60, deadline=None)
@given(case=cases(), has_sink=st.booleans())
def test_gradients_are_autograds_of_the_definition(backend: Backend, case: Case, has_sink: bool) -> None:
    q, k, v, grad, grad_lse = case.tensors()
    sink_H = torch.linspace(-1, 2, q.shape[2], dtype=torch.float64) if has_sink else None
    leaves = [x.requires_grad_() for x in (q, k, v, sink_H) if x is not None]
    out, lse = attend(backend, q, k, v, case.mask, case.options, sink_H=sink_H, needs_lse_gradient=True)
    wanted, wanted_lse = written_out(case, q, k, v, sink_H)
    is_seen = wanted_lse > float("-inf")
    assert torch.allclose(out, wanted, atol=1e-11) and torch.allclose(lse[is_seen], wanted_lse[is_seen], atol=1e-11)
    assert (lse[~is_seen] == float("-inf")).all()
    got, right = (
        torch.autograd.grad((a * grad).sum() + (b * grad_lse)[is_seen].sum(), leaves)
        for a, b in ((out, lse), (wanted, wanted_lse))
    )
    for a, b in zip(got, right, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_the_log_sum_exp_alone_has_a_gradient_where_it_is_asked_for() -> None:
    q, k, v = (torch.randn(1, 12, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    _, lse = attend(Reference(), q, k, v, MASK, needs_lse_gradient=True)
    lse.square().sum().backward()
    assert q.grad is not None and q.grad.any() and k.grad is not None and k.grad.any()
    assert v.grad is not None and not v.grad.any()
    assert not attend(Reference(), q, k, v, MASK)[1].requires_grad


class Counting(Reference):
    """Counts its passes."""

    def __init__(self) -> None:
        self.passes: list[str] = []

    def forward(self, *given):
        self.passes.append("forward")
        return super().forward(*given)

    def backward(self, *given):
        self.passes.append("backward")
        return super().backward(*given)


@pytest.mark.parametrize("has_sink", [False, True])
def test_what_is_kept_is_not_computed_again(has_sink: bool) -> None:
    tensors = [torch.randn(1, 12, 2, 4, requires_grad=True) for _ in range(3)]
    sink_H = torch.zeros(2, requires_grad=True) if has_sink else None
    leaves = [*tensors, sink_H] if sink_H is not None else tensors
    plain = attend(Reference(), *tensors, MASK, sink_H=sink_H)[0]
    wanted = torch.autograd.grad(plain.square().sum(), leaves)
    backend, kept = Counting(), Kept()
    with torch.no_grad():
        first, lse = attend(backend, *tensors, MASK, sink_H=sink_H, kept=kept)
    again, lse_again = attend(backend, *tensors, MASK, sink_H=sink_H, kept=kept)
    assert torch.equal(first, again) and torch.equal(lse, lse_again) and torch.equal(first, plain)
    got = torch.autograd.grad(again.square().sum(), leaves)
    assert backend.passes == ["forward", "backward"]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert kept == Kept(), "a memo that is done with holds no memory"


def test_a_sink_is_one_more_score_without_a_value() -> None:
    q, k, v = (torch.randn(2, 6, 2, 4, dtype=torch.float64) for _ in range(3))
    out, lse = Reference().forward(q, k, v, Mask(), Options())
    far = torch.full((2,), -1e9, dtype=torch.float64)
    assert torch.equal(add_sink(out, lse, far)[0], out)
    # A key of zeros scores 0 and its value of zeros adds nothing: a sink of 0.
    zero = torch.zeros(2, 1, 2, 4, dtype=torch.float64)
    wider = Reference().forward(q, torch.cat([zero, k], 1), torch.cat([zero, v], 1), Mask(prefix=1), Options())
    with_sink = attend(Reference(), q, k, v, Mask(), sink_H=torch.zeros(2, dtype=torch.float64))
    for a, b in zip(with_sink, wider, strict=True):
        assert torch.allclose(a, b, atol=1e-14)


def test_where_nothing_is_seen_the_sink_takes_all() -> None:
    q, k, v = (torch.randn(1, 3, 2, 4, requires_grad=True) for _ in range(3))
    sink_H = torch.tensor([0.5, -2.0], requires_grad=True)
    out, lse = attend(Reference(), q, k, v, Mask(offset=-1), sink_H=sink_H)
    assert not out[:, 0].any() and torch.equal(lse[0, :, 0], sink_H.detach())
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v, sink_H))


class Rounding(Blockwise):
    """Gives no fp32 answers to lower-precision inputs."""

    capability = Capability(("cpu",), (torch.bfloat16,), partial=False)

    def forward(self, q, k, v, mask, options):
        assert not options.is_partial, "not in its capability"
        return super().forward(q, k, v, mask, options)


def test_low_precision_with_a_sink_is_rounded_once() -> None:
    q, k, v = (torch.randn(1, 40, 2, 8, dtype=torch.float64).bfloat16() for _ in range(3))
    sink_H = torch.tensor([1.0, 2.0])
    exact, _ = attend(Reference(), q.double(), k.double(), v.double(), Mask(), sink_H=sink_H.double())
    out, lse = attend(Blockwise(), q, k, v, Mask(), sink_H=sink_H)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    # 8 significant bits: a rounding is off by 2^-8 of the number and no more.
    once = exact.abs() * 2**-8 + 1e-6
    assert ((out - exact).abs() <= once).all()
    twice = attend(Rounding(), q, k, v, Mask(), sink_H=sink_H)[0]
    assert ((twice - exact).abs() <= 2 * once).all() and not ((twice - exact).abs() <= once).all()
    partial = attend(Blockwise(), q, k, v, Mask(), Options(is_partial=True), sink_H=sink_H)[0]
    assert partial.dtype == torch.float32 and torch.allclose(partial, exact.float(), atol=1e-6)


@pytest.mark.parametrize("backend", BOTH, ids=lambda backend: backend.name)
def test_autocast_does_not_reach_into_a_backend(backend: Backend) -> None:
    q, k, v = (torch.randn(1, 12, 2, 4, requires_grad=True) for _ in range(3))
    wanted = attend(backend, q, k, v, MASK)[0]
    right = torch.autograd.grad(wanted.square().sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(backend, q, k, v, MASK)[0]
        got = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert torch.equal(out, wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
