"""RMSNorm against its formula in fp64, forward and backward."""

import pytest
import torch

from model.norm import FusedRMSNorm, RMSNorm


def plain(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight


def test_gradcheck_in_fp64() -> None:
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(FusedRMSNorm.apply, (x.requires_grad_(), weight.requires_grad_(), 0.1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_error_to_fp64_is_that_of_rounding(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    norm = RMSNorm(64, epsilon=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(3, 700, 64) * scale).to(dtype).requires_grad_()
    grad = torch.randn(3, 700, 64).to(dtype)
    out = norm(x)
    out.backward(grad)
    exact_x, exact_weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    exact = plain(exact_x, exact_weight, 1e-6)
    exact.backward(grad.double())
    pairs = [(out, exact), (x.grad, exact_x.grad), (norm.weight.grad, exact_weight.grad)]
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    assert out.dtype == dtype


def test_the_cpu_path_equals_torch_and_copes_with_strided_rows() -> None:
    norm = RMSNorm(8, epsilon=1e-6)
    x = torch.randn(6, 5, 8).transpose(0, 1).requires_grad_()
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (8,), norm.weight, 1e-6))
    (ours,) = torch.autograd.grad(norm(x).sum(), x)
    (theirs,) = torch.autograd.grad(torch.nn.functional.rms_norm(x, (8,), norm.weight, 1e-6).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
