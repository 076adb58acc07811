"""Rows travel to their experts and come back."""

import pytest
import torch

from moe.dispatch import LocalDispatcher, gather_sum, sort_rows

CASES = [(12, 2, 5), (1, 1, 1), (7, 3, 3), (33, 1, 7), (0, 2, 4), (50, 4, 13)]


def table(num_tokens, experts_per_token, num_experts):
    torch.manual_seed(num_tokens)
    return torch.rand(num_tokens, num_experts).topk(experts_per_token, dim=1).indices


@pytest.mark.parametrize("case", CASES)
def test_rows_are_sorted_by_expert_and_stay_in_token_order(case):
    chosen_NK = table(*case)
    offsets_E, plan = sort_rows(chosen_NK, case[2])
    experts_R = chosen_NK.flatten()[plan.order_R]
    expected = sorted(range(chosen_NK.numel()), key=lambda slot: (chosen_NK.flatten()[slot].item(), slot))
    assert plan.order_R.tolist() == expected
    assert offsets_E.dtype == torch.int32
    assert offsets_E.tolist() == [(experts_R <= e).sum().item() for e in range(case[2])]
    assert torch.equal(plan.tokens_R, plan.order_R // case[1])
    assert torch.equal(plan.order_R[plan.places_NK.flatten()], torch.arange(chosen_NK.numel()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_combine_of_dispatch_is_the_token_times_its_gates(case, dtype):
    chosen_NK = table(*case)
    x_ND = torch.randn(case[0], 6).to(dtype)
    gates_NK = torch.rand(case[0], case[1])
    dispatcher = LocalDispatcher(case[2])
    rows_RD, _, plan = dispatcher.dispatch(x_ND, chosen_NK)
    out_ND = dispatcher.combine(rows_RD, gates_NK, plan)
    assert out_ND.dtype == dtype and rows_RD.shape == (case[0] * case[1], 6)
    expected = (x_ND.double() * gates_NK.double().sum(1, keepdim=True)).to(dtype)
    torch.testing.assert_close(out_ND, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_sum_accumulates_in_fp32(dtype):
    rows_RD = torch.randn(64, 5).to(dtype)
    places_NK = torch.randperm(64).view(16, 4)
    weights_NK = torch.rand(16, 4)
    exact = (rows_RD.double()[places_NK] * weights_NK.double()[..., None]).sum(1)
    error = (gather_sum(rows_RD, places_NK, weights_NK).double() - exact).abs()
    # One rounding of the finished sum: half a unit in the last place, plus fp32's own errors.
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()


def test_gradients_of_tokens_and_gates():
    chosen_NK = table(9, 2, 4)
    dispatcher = LocalDispatcher(4)

    def through(x_ND, gates_NK):
        rows_RD, _, plan = dispatcher.dispatch(x_ND, chosen_NK)
        return dispatcher.combine(rows_RD.sin(), gates_NK, plan)

    inputs = [torch.randn(9, 3, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(through, [t.requires_grad_() for t in inputs])


def test_gradients_in_low_precision_are_summed_in_fp32():
    """256 + 1 is 256 in bf16: four rows that arrive one by one would lose three of four ones."""
    x_ND = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    rows_RD, _, plan = LocalDispatcher(5).dispatch(x_ND, torch.tensor([[0, 1, 2, 3, 4]]))
    rows_RD.backward(torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]]).expand(5, 2).bfloat16())
    assert x_ND.grad.tolist() == [[260.0, 260.0]]
    assert len(plan.order_R) == 5


def test_same_result_twice():
    chosen_NK = table(200, 4, 16)
    x_ND, gates_NK = torch.randn(200, 8), torch.rand(200, 4)
    dispatcher = LocalDispatcher(16)
    outs = []
    for _ in range(2):
        rows_RD, _, plan = dispatcher.dispatch(x_ND, chosen_NK)
        outs.append(dispatcher.combine(rows_RD, gates_NK, plan))
    assert torch.equal(*outs)
