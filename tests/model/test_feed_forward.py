"""SwiGLU against its formula, and what it keeps for the backward pass."""

import pytest
import torch
import torch.nn.functional as F

from model import feed_forward
from model.feed_forward import FeedForward, SwiGLU


def test_swiglu_passes_gradcheck() -> None:
    assert torch.autograd.gradcheck(SwiGLU.apply, (torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True),))


def test_equals_the_formula_with_separate_matrices() -> None:
    layer = FeedForward(width=6, feed_forward_width=10)
    gate, up = layer.gate_up.weight.chunk(2)
    x = torch.randn(4, 3, 6)
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), layer.down.weight)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("rows", [0, 1, 4, 11])
def test_blocks_equal_plain_autograd(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(feed_forward, "BLOCK_ROWS", 4)
    layer = FeedForward(width=6, feed_forward_width=10).double()
    x = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(rows, 6, dtype=torch.float64)
    gate, up = F.linear(x, layer.gate_up.weight).chunk(2, dim=-1)
    plain = F.linear(F.silu(gate) * up, layer.down.weight)
    unknowns = (x, layer.gate_up.weight, layer.down.weight)
    torch.testing.assert_close(layer(x), plain)
    ours = torch.autograd.grad(layer(x), unknowns, upstream)
    theirs = torch.autograd.grad(plain, unknowns, upstream)
    torch.testing.assert_close(ours, theirs)
    accelerator = F.linear(SwiGLU.apply(F.linear(x, layer.gate_up.weight)), layer.down.weight)
    torch.testing.assert_close(torch.autograd.grad(accelerator, unknowns, upstream), theirs)


def test_copes_with_a_gradient_without_strides() -> None:
    layer, x = FeedForward(width=6, feed_forward_width=10), torch.randn(7, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.any()


def test_autocast_computes_in_bf16_and_learns_in_fp32() -> None:
    layer, x = FeedForward(width=64, feed_forward_width=96), torch.randn(50, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert (out.float() - layer(x)).norm() <= 1e-2 * layer(x).norm()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_keeps_only_its_input_and_the_pre_activation() -> None:
    layer, x, kept = FeedForward(width=6, feed_forward_width=10), torch.randn(7, 6, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    weights = {parameter.data_ptr() for parameter in layer.parameters()}
    assert sorted(tuple(t.shape) for t in kept if t.data_ptr() not in weights) == [(7, 6), (7, 20)]
