"""Both Triton ways to multiply, forward and backward, against the plain loop in fp64."""

import pytest
import torch

pytest.importorskip("triton")

from moe import grouped
from moe.dispatch import sort_rows
from moe.experts import loop

WAYS = {"fused": grouped.fused, "triton": grouped.triton}
WIDTH, HIDDEN = 24, 40
# fp32 sums of another order are a few roundings apart; three TF32 products on a GPU are not quite one of fp32.
FLOOR = 1e-5 if torch.cuda.is_available() else 2e-6
NAMES = ("out", "x", "gates", "gate_up", "down")


def spread(num_tokens, slots, num_experts):
    """Distinct experts for each token, at random."""
    return torch.stack([torch.randperm(num_experts)[:slots] for _ in range(num_tokens)]).view(num_tokens, slots)


def skewed(num_tokens, slots, num_experts):
    """Most tokens want the first experts."""
    wish_NE = torch.rand(num_tokens, num_experts).log() / torch.arange(1, num_experts + 1) ** -2.0
    return wish_NE.topk(slots).indices


def dropped(chosen_NK, num_experts):
    """A third of the slots go nowhere."""
    return chosen_NK.where(torch.rand(chosen_NK.shape) > 0.33, num_experts)


ROUTINGS = {
    "uneven": lambda: (spread(20, 2, 5), 5),
    "empty experts": lambda: (spread(9, 2, 3) * 2 + 1, 7),
    "all on one": lambda: (torch.full((70, 1), 2), 4),
    "one slot": lambda: (spread(17, 1, 4), 4),
    "every expert": lambda: (spread(11, 3, 3), 3),
    "prime": lambda: (spread(13, 2, 7), 7),
    "skew": lambda: (skewed(20, 2, 6), 6),
    "dropped": lambda: (dropped(spread(15, 2, 5), 5), 5),
    "all dropped": lambda: (torch.full((6, 2), 4), 4),
    "one token": lambda: (spread(1, 2, 4), 4),
    "no tokens": lambda: (torch.zeros(0, 2, dtype=torch.int64), 3),
}


def problem(routing, dtype, device, width=WIDTH, hidden=HIDDEN):
    """(x, gates, gate_up, down) of unit scale, and the routing table; a slot that goes nowhere has a gate of NaN."""
    torch.manual_seed(1)
    chosen_NK, num_experts = ROUTINGS[routing]()
    tensors = (
        torch.randn(len(chosen_NK), width, dtype=torch.float64),
        torch.rand(chosen_NK.shape, dtype=torch.float64).where(chosen_NK < num_experts, torch.nan),
        torch.randn(num_experts, 2 * hidden, width, dtype=torch.float64) / width**0.5,
        torch.randn(num_experts, width, hidden, dtype=torch.float64) / hidden**0.5,
    )
    dtypes = (dtype, torch.promote_types(dtype, torch.float32), dtype, dtype)
    return [t.to(device, d) for t, d in zip(tensors, dtypes, strict=True)], chosen_NK.to(device)


def run(matmul, tensors, plan, grad_ND, recompute_up=False):
    """The output and the gradients of all four inputs."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    out_ND = matmul(*tensors, plan, recompute_up)
    return [out_ND.detach(), *torch.autograd.grad(out_ND, tensors, grad_ND, allow_unused=True)]


def error(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def check(matmul, tensors, plan):
    """At most twice as wrong as the loop in the same dtype."""
    grad_ND = torch.randn_like(tensors[0])
    exact = run(loop, [t.double() for t in tensors], plan, grad_ND.double())
    plain = run(loop, tensors, plan, grad_ND)
    for name, ours, theirs, truth in zip(NAMES, run(matmul, tensors, plan, grad_ND), plain, exact, strict=True):
        assert ours.shape == truth.shape and not ours.isnan().any(), name
        assert error(ours, truth) <= max(2 * error(theirs, truth), FLOOR), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.usefixtures("fresh_memory_is_nan")
def test_equals_the_loop(way, routing, device):
    tensors, chosen_NK = problem(routing, torch.float32, device)
    check(WAYS[way], tensors, sort_rows(chosen_NK, len(tensors[2])))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("routing", ["empty experts", "dropped", "skew"])
@pytest.mark.usefixtures("fresh_memory_is_nan")
def test_low_precision_is_at_most_twice_as_wrong_as_torch(way, routing, low_precision, device):
    tensors, chosen_NK = problem(routing, low_precision, device)
    check(WAYS[way], tensors, sort_rows(chosen_NK, len(tensors[2])))


def test_our_own_products_take_any_size(device):
    tensors, chosen_NK = problem("dropped", torch.float32, device, width=83, hidden=37)
    check(grouped.triton, tensors, sort_rows(chosen_NK, len(tensors[2])))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("fresh_memory_is_nan")
def test_recomputing_changes_no_bit_and_two_runs_are_the_same(way, device):
    tensors, chosen_NK = problem("dropped", torch.float32, device)
    plan = sort_rows(chosen_NK, len(tensors[2]))
    grad_ND = torch.randn_like(tensors[0])
    first, second = (run(WAYS[way], tensors, plan, grad_ND, recompute_up) for recompute_up in (False, True))
    for name, ours, again in zip(NAMES, first, second, strict=True):
        assert torch.equal(ours, again), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("fresh_memory_is_nan")
def test_a_plan_with_no_more_rows_than_needed(way, device):
    tensors, chosen_NK = problem("dropped", torch.float32, device)
    num_experts = len(tensors[2])
    needed = int((chosen_NK < num_experts).sum())
    grad_ND = torch.randn_like(tensors[0])
    long, short = sort_rows(chosen_NK, num_experts), sort_rows(chosen_NK, num_experts, needed)
    assert len(short.order_R) == needed < len(long.order_R)
    for name, ours, theirs in zip(
        NAMES, run(WAYS[way], tensors, short, grad_ND), run(WAYS[way], tensors, long, grad_ND), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_of_stride_0(way, device):
    tensors, chosen_NK = problem("uneven", torch.float32, device)
    plan = sort_rows(chosen_NK, len(tensors[2]))
    x_ND = tensors[0].clone().requires_grad_()
    WAYS[way](x_ND, *tensors[1:], plan, False).sum().backward()
    truth = run(loop, [t.double() for t in tensors], plan, torch.ones_like(x_ND).double())[1]
    assert error(x_ND.grad, truth) < FLOOR


@pytest.mark.parametrize("way", WAYS)
def test_nothing_comes_back_from_experts_that_a_token_did_not_choose(way, device):
    tensors, chosen_NK = problem("uneven", torch.float32, device)
    plan = sort_rows(chosen_NK, len(tensors[2]))
    before = WAYS[way](*tensors, plan, False)
    tensors[2][3], tensors[3][3] = torch.nan, torch.nan
    after = WAYS[way](*tensors, plan, False)
    meets_N = (chosen_NK == 3).any(dim=1)
    assert torch.equal(before[~meets_N], after[~meets_N]) and after[meets_N].isnan().all()
