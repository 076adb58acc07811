"""Rows are sorted by expert and summed back by token; slots that go nowhere leave no trace."""

import pytest
import torch

from moe import dispatch
from moe.dispatch import LocalDispatcher, Plan, gather_slots, gather_sum, pad_rows, sort_rows

CASES = [(12, 2, 5), (1, 1, 1), (7, 3, 3), (33, 1, 7), (0, 2, 4), (50, 4, 13)]


def table(num_tokens: int, experts_per_token: int, num_experts: int, nowhere: float = 0.0) -> torch.Tensor:
    """A routing table in which about a share `nowhere` of the slots go nowhere."""
    torch.manual_seed(num_tokens)
    chosen_NK = torch.rand(num_tokens, num_experts).topk(experts_per_token, dim=1).indices
    return chosen_NK.masked_fill(torch.rand(chosen_NK.shape) < nowhere, num_experts)


@pytest.mark.parametrize("nowhere", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_sorted_by_expert_and_stay_in_token_order(case: tuple[int, int, int], nowhere: float) -> None:
    chosen_NK = table(*case, nowhere)
    plan = sort_rows(chosen_NK, case[2])
    chosen_R = chosen_NK.flatten()
    expected = sorted(range(chosen_NK.numel()), key=lambda slot: (chosen_R[slot].item(), slot))
    assert plan.order_R.tolist() == expected
    assert plan.offsets_E.dtype == torch.int32
    assert plan.offsets_E.tolist() == [int((chosen_R <= e).sum()) for e in range(case[2])]
    assert torch.equal(plan.tokens_R, plan.order_R // case[1])
    assert torch.equal(plan.order_R[plan.places_NK.flatten()], torch.arange(chosen_NK.numel()))


@pytest.mark.parametrize("nowhere", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_token_comes_back_as_often_as_it_was_sent(
    case: tuple[int, int, int], nowhere: float, dtype: torch.dtype
) -> None:
    chosen_NK = table(*case, nowhere)
    plan = sort_rows(chosen_NK, case[2])
    x_ND, weights_NK = torch.randn(case[0], 6).to(dtype), torch.rand(case[0], case[1])
    rows_RD = x_ND[plan.tokens_R]
    rows_RD[plan.offsets_E[-1] :] = torch.nan
    weights_NK[chosen_NK == case[2]] = torch.nan
    goes_NK = chosen_NK < case[2]
    tolerance = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for weights, sums in ((None, goes_NK.sum(1)), (weights_NK, weights_NK.where(goes_NK, 0).sum(1))):
        out_ND = gather_sum(rows_RD, plan, weights)
        assert out_ND.dtype == dtype
        torch.testing.assert_close(out_ND, (x_ND.double() * sums[:, None]).to(dtype), **tolerance)
    slots_NK = gather_slots(torch.where(torch.arange(len(rows_RD)) < plan.offsets_E[-1], plan.order_R, -1), plan)
    assert torch.equal(slots_NK, torch.arange(chosen_NK.numel()).view_as(chosen_NK).where(goes_NK, 0))


@pytest.mark.parametrize("sum_slots", [dispatch._bag, dispatch._slot_by_slot])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_rounded_once(sum_slots, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_bag", sum_slots)
    rows_RD, weights_NK = torch.randn(64, 5).to(dtype), torch.rand(16, 4)
    plan = sort_rows(torch.rand(16, 9).topk(4, dim=1).indices, 9)
    exact = (rows_RD.double()[plan.places_NK] * weights_NK.double()[..., None]).sum(1)
    error = (gather_sum(rows_RD, plan, weights_NK).double() - exact).abs()
    # One rounding of the finished sum: half a unit in the last place, plus fp32's own errors.
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()


@pytest.mark.parametrize("case", CASES)
def test_a_plan_of_fewer_rows_is_the_same_as_long_as_they_are_enough(case: tuple[int, int, int]) -> None:
    chosen_NK = table(*case, 0.5)
    whole = sort_rows(chosen_NK, case[2])
    num_rows = int(whole.offsets_E[-1])
    for max_rows in {num_rows, min(num_rows + 1, chosen_NK.numel())}:
        plan = sort_rows(chosen_NK, case[2], max_rows)
        assert len(plan.order_R) == len(plan.tokens_R) == max_rows
        assert torch.equal(plan.order_R, whole.order_R[:max_rows])
        assert torch.equal(plan.offsets_E, whole.offsets_E) and torch.equal(plan.places_NK, whole.places_NK)
        values_R = torch.randn(len(whole.order_R), 3)
        assert torch.equal(gather_sum(values_R[:max_rows], plan), gather_sum(values_R, whole))
        assert torch.equal(gather_slots(values_R[:max_rows, 0], plan), gather_slots(values_R[:, 0], whole))


@pytest.mark.parametrize("nowhere", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_a_padded_plan_has_the_same_rows_in_stretches_of_equal_length(
    case: tuple[int, int, int], nowhere: float
) -> None:
    chosen_NK = table(*case, nowhere)
    plan, num_slots = sort_rows(chosen_NK, case[2]), chosen_NK.numel()
    padded = pad_rows(plan)
    sizes = plan.offsets_E.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()
    assert padded.offsets_E.tolist() == [(e + 1) * max(sizes) for e in range(case[2])]
    rows_of = lambda plan, start, size: plan.order_R[start : start + size].tolist()  # noqa: E731
    for e, size in enumerate(sizes):
        expected = rows_of(plan, int(plan.offsets_E[e]) - size, size) + [num_slots] * (max(sizes) - size)
        assert rows_of(padded, e * max(sizes), max(sizes)) == expected
    is_filler_R = padded.order_R == num_slots
    assert torch.equal(padded.tokens_R, torch.where(is_filler_R, 0, padded.order_R // case[1]))
    goes_NK = chosen_NK < case[2]
    assert torch.equal(padded.places_NK < case[2] * max(sizes), goes_NK)
    assert torch.equal(padded.order_R[padded.places_NK[goes_NK]], torch.arange(num_slots).view_as(chosen_NK)[goes_NK])


def test_nothing_travels_on_one_device() -> None:
    x_ND, chosen_NK, gates_NK = torch.randn(4, 3), table(4, 2, 5), torch.rand(4, 2)
    parcel = LocalDispatcher().send(x_ND, chosen_NK, gates_NK)
    assert all(a is b for a, b in zip(parcel.receive(), (x_ND, chosen_NK, gates_NK), strict=True))
    assert parcel.bring_back(x_ND) is x_ND


def test_same_result_twice() -> None:
    chosen_NK = table(200, 4, 16)
    rows_RD, gates_NK = torch.randn(800, 8), torch.rand(200, 4)
    plans = [sort_rows(chosen_NK, 16) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*plans, strict=True))
    assert torch.equal(*(gather_sum(rows_RD, plan, gates_NK) for plan in plans))


def test_sorting_and_summing_never_wait() -> None:
    chosen_NK = torch.empty(6, 2, dtype=torch.int64, device="meta")  # has no values to wait for
    plan = sort_rows(chosen_NK, 5, 10)
    assert isinstance(plan, Plan) and plan.order_R.shape == (10,)
    for dtype in (torch.float32, torch.bfloat16):
        rows_RD = torch.empty(10, 3, dtype=dtype, device="meta")
        assert gather_sum(rows_RD, plan, torch.empty(6, 2, device="meta")).shape == (6, 3)
    assert gather_slots(torch.empty(10, device="meta"), plan).shape == (6, 2)
