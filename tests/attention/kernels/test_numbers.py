"""How exact the kernels are in low precision, where scores are large, and from one call to the next."""

import pytest
import torch

pytest.importorskip("triton")

from attention.backends.reference import Reference
from attention.contract import Options
from attention.kernels import launch, scores
from attention.kernels.tiles import Tile
from attention.mask import Documents, Mask
from benchmarks import attention_kernels
from benchmarks.attention_rivals import Heads

SMALL = dict.fromkeys(("forward", "key_gradients", "query_gradients"), Tile(16, 16, 4, 2))
MASK = Mask(documents=Documents((33, 7)))


@pytest.fixture
def inputs(low_precision, device):
    """(grad, q, k, v) with one key head for two query heads."""
    torch.manual_seed(0)
    return [torch.randn(1, 40, heads, 32).to(device, low_precision) for heads in (2, 2, 1, 1)]


def truth_of(inputs, mask):
    grad, q, k, v = (x.double() for x in inputs)
    out, lse = Reference().forward(q, k, v, mask, Options())
    return out, *Reference().backward(grad, q, k, v, out, lse, mask, Options())


def plain_of(inputs, mask):
    """As one would write it in low precision, with autograd."""
    grad, *tensors = inputs
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors)
    hidden = ~mask.dense(1, 40, 40, q.device)
    scores = torch.einsum("bthc,bsgc->bhts", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
    out = torch.einsum("bhts,bsgc->bthc", weights, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def ours_of(inputs, mask, options):
    grad, q, k, v = inputs
    out, lse = launch.forward(q, k, v, mask, options, SMALL)
    return out, *launch.backward(grad, q, k, v, out, lse, mask, options, None, SMALL)


def distance(x, truth):
    return (x.double() - truth).abs().max().item()


def test_low_precision_is_as_exact_as_flash_attention_asks(inputs, low_precision):
    """Dao-AILab/flash-attention's rule: an error at most twice that of plain code in the same precision."""
    truth = truth_of(inputs, MASK)
    for ours, plain, exact in zip(ours_of(inputs, MASK, Options()), plain_of(inputs, MASK), truth, strict=True):
        assert ours.dtype == low_precision
        assert distance(ours, exact) <= 2 * distance(plain, exact) + 1e-5


def test_parts_come_back_in_fp32_and_round_to_the_same(inputs, low_precision):
    whole, parts = ours_of(inputs, MASK, Options()), ours_of(inputs, MASK, Options(is_partial=True))
    truth = truth_of(inputs, MASK)
    assert all(part.dtype == torch.float32 for part in parts)
    assert torch.equal(parts[0].to(low_precision), whole[0])
    for part, rounded, exact in zip(parts, whole, truth, strict=True):
        assert distance(part, exact) < distance(rounded, exact)
        assert not torch.equal(part.to(low_precision).float(), part)


def test_scores_that_no_exponential_of_a_plain_softmax_survives(device):
    torch.manual_seed(0)
    grad, q, k, v = (torch.randn(1, 40, heads, 16, device=device) for heads in (2, 2, 1, 1))
    inputs = [grad, 200 * q, k, v]
    inputs[1][:, :3] = 0
    truth = truth_of(inputs, MASK)
    for ours, exact in zip(ours_of(inputs, MASK, Options()), truth, strict=True):
        assert ours.isfinite().all()
        assert distance(ours, exact) <= 2e-4 * exact.abs().max().item()


def test_the_same_bits_every_time(inputs):
    first, again = (ours_of(inputs, MASK, Options()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_sweep_over_tiles_times_every_kernel(device):
    rows = attention_kernels.sweep(40, Heads(2, 1, 16), torch.float32, device, rounds=1)
    assert [row["kernel"] for row in rows] == 3 * ["forward", "key_gradients", "query_gradients"]
    assert all(row["ms"] > 0 for row in rows)


def test_tanh_is_exact_to_fp32(device):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, out_ptr, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(out_ptr + at, scores.tanh(tl.load(x_ptr + at)))

    x = torch.cat([torch.linspace(-12, 12, 900), torch.logspace(-30, 0, 122), torch.tensor([0.0, -1e30])]).to(device)
    out = torch.empty_like(x)
    kernel[(1,)](x, out, 1024)
    torch.testing.assert_close(out.double(), x.double().tanh(), rtol=3e-7, atol=1e-37)
