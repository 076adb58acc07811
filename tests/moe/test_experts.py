"""Every way to multiply against the plain loop, and the loop against finite differences."""

import pytest
import torch

from moe import experts as experts_module
from moe.experts import MATMULS, Experts, choose, loop
from settings import Refusal

FAST = [name for name in MATMULS if name != "loop"]
SPLITS = {
    "uneven": [3, 11, 1, 25],
    "empty experts": [0, 17, 0, 5, 0],
    "all on one": [0, 0, 40, 0],
    "one expert": [9],
    "prime": [2, 0, 5, 1, 3, 0, 8],
    "no rows": [0, 0, 0],
}


def problem(sizes, dtype=torch.float32, width=16, hidden=24):
    torch.manual_seed(len(sizes))
    num_experts = len(sizes)
    offsets_E = torch.tensor(sizes).cumsum(0).to(torch.int32)
    tensors = (
        torch.randn(sum(sizes), width),
        torch.randn(num_experts, 2 * hidden, width) / width**0.5,
        torch.randn(num_experts, width, hidden) / hidden**0.5,
    )
    return [t.to(dtype).requires_grad_() for t in tensors], offsets_E


def run(matmul, tensors, offsets_E, grad):
    out = matmul(*tensors, offsets_E)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def relative(error, truth):
    return ((error.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


def test_loop_is_a_swiglu_of_each_expert_with_right_gradients():
    tensors, offsets_E = problem([2, 0, 3], torch.float64, width=3, hidden=2)
    rows, gate_up, down = tensors
    out = loop(*tensors, offsets_E)
    gate, up = gate_up[2, :2] @ rows[4], gate_up[2, 2:] @ rows[4]
    torch.testing.assert_close(out[4], down[2] @ (gate * torch.sigmoid(gate) * up))
    assert torch.autograd.gradcheck(lambda *t: loop(*t, offsets_E), tensors)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS.keys())
def test_fast_ways_equal_the_loop(name, sizes):
    tensors, offsets_E = problem(sizes)
    grad = torch.randn(sum(sizes), 16)
    exact = run(loop, [t.detach().double().requires_grad_() for t in tensors], offsets_E, grad.double())
    for ours, truth in zip(run(MATMULS[name], tensors, offsets_E, grad), exact, strict=True):
        assert ours.shape == truth.shape
        assert relative(ours, truth) < 2e-6


@pytest.mark.parametrize("name", FAST)
def test_low_precision_is_at_most_twice_as_wrong_as_plain_torch(name):
    tensors, offsets_E = problem([30, 0, 50, 20], torch.bfloat16, width=32, hidden=64)
    grad = torch.randn(100, 32).bfloat16()
    exact = run(loop, [t.detach().double().requires_grad_() for t in tensors], offsets_E, grad.double())
    plain = run(loop, tensors, offsets_E, grad)
    for ours, theirs, truth in zip(run(MATMULS[name], tensors, offsets_E, grad), plain, exact, strict=True):
        assert relative(ours, truth) <= 2 * relative(theirs, truth)


def test_blocks_of_any_size_give_the_same(monkeypatch):
    tensors, offsets_E = problem([0, 17, 3, 20])
    grad = torch.randn(40, 16)
    whole = run(MATMULS["blocked"], tensors, offsets_E, grad)
    for rows in (1, 7, 17):
        monkeypatch.setattr(experts_module, "BLOCK_BYTES", rows * 2 * 24 * 4)
        for ours, theirs in zip(run(MATMULS["blocked"], tensors, offsets_E, grad), whole, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["auto", *MATMULS])
def test_gradient_of_stride_0(name):
    experts = Experts(3, 8, 12, name)
    rows_RD = torch.randn(10, 8, requires_grad=True)
    offsets_E = torch.tensor([4, 4, 10], dtype=torch.int32)
    experts(rows_RD, offsets_E).sum().backward()
    expected = torch.autograd.grad(loop(rows_RD, experts.gate_up, experts.down, offsets_E), rows_RD, torch.ones(10, 8))
    torch.testing.assert_close(rows_RD.grad, expected[0])


@pytest.mark.parametrize("name", ["auto", *MATMULS])
def test_autocast_reaches_the_experts(name):
    experts = Experts(2, 8, 16, name)
    rows_RD = torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out_RD = experts(rows_RD, torch.tensor([2, 6], dtype=torch.int32))
    assert out_RD.dtype == torch.bfloat16
    out_RD.float().square().sum().backward()
    assert experts.gate_up.grad.dtype == torch.float32 and experts.gate_up.grad.abs().sum() > 0


def test_fp64_and_odd_sizes_run_on_auto_and_are_refused_by_name():
    for dtype, width, hidden in ((torch.float64, 8, 8), (torch.float32, 7, 8), (torch.float32, 8, 5)):
        experts = Experts(2, width, hidden).to(dtype)
        offsets_E = torch.tensor([1, 3], dtype=torch.int32)
        rows_RD = torch.randn(3, width, dtype=dtype)
        torch.testing.assert_close(experts(rows_RD, offsets_E), loop(rows_RD, experts.gate_up, experts.down, offsets_E))
        experts.matmul = "grouped_mm"
        with pytest.raises(Refusal, match=r'experts="grouped_mm": .*use experts = "auto"'):
            experts(rows_RD, offsets_E)


def test_auto_is_grouped_on_gpus_and_blocked_on_cpus():
    assert choose("auto", "cpu", torch.float32, 64, 64) == "blocked"
    assert choose("auto", "cuda", torch.bfloat16, 64, 64) == "grouped_mm"
    assert choose("auto", "cuda", torch.float64, 64, 64) == "blocked"
    assert choose("auto", "cuda", torch.bfloat16, 64, 63) == "blocked"


def test_only_rows_and_preactivations_are_kept():
    tensors, offsets_E = problem([10, 30])
    for name in FAST:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            MATMULS[name](*tensors, offsets_E)
        activations = sum(t.numel() for t in saved if t.is_floating_point() and t.ndim == 2)
        assert activations == 40 * (16 + 2 * 24)
