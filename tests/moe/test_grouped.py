"""The autograd function over stages, whichever they are, and torch's own stages."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe import grouped as room
from moe.dispatch import Plan, pad_rows, sort_rows
from moe.experts import MATMULS, loop
from moe.grouped import (
    TorchStages,
    grouped_product,
    grouped_weight_grad,
    leaves_empty_groups,
    padded_product,
    padded_weight_grad,
)

N, K, E, D, HIDDEN = 30, 3, 7, 8, 16


def leaves(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """x, gates, gate_up, down."""
    shapes = ((N, D), (N, K), (E, 2 * HIDDEN, D), (E, D, HIDDEN))
    own = (dtype, torch.float32, dtype, dtype)
    return [torch.randn(s, dtype=d, device=device, requires_grad=True) for s, d in zip(shapes, own, strict=True)]


def table() -> Tensor:
    """Slots of which every fourth goes nowhere, and an expert that nobody chose."""
    torch.manual_seed(0)
    chosen_NK = torch.rand(N, E).topk(K, dim=1).indices
    chosen_NK.flatten()[::4] = E
    return chosen_NK.masked_fill(chosen_NK == 2, 5)


STAGES = {
    "grouped_mm": (lambda: TorchStages(grouped_product, grouped_weight_grad), lambda plan: plan),
    "bmm": (lambda: TorchStages(padded_product, padded_weight_grad), pad_rows),
}


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_does_what_its_promise_says(name: str) -> None:
    make, padding = STAGES[name]
    stages, plan = make(), padding(sort_rows(table(), E))
    x_ND, gates_NK, gate_up, down = (t.detach() for t in leaves())
    grad_ND = torch.randn(N, D)
    ends = [0, *plan.offsets_E.tolist()]
    expert_R = torch.full((len(plan.tokens_R),), 0)
    for e, (start, stop) in enumerate(itertools.pairwise(ends)):
        expert_R[start:stop] = e
    end, slots = ends[-1], torch.cat([gates_NK.flatten(), torch.zeros(1)])
    is_row_R = (torch.arange(len(plan.tokens_R)) < end) & (plan.order_R < N * K)
    gates_R = slots[plan.order_R]
    z = torch.einsum("rd,rjd->rj", x_ND[plan.tokens_R], gate_up[expert_R])
    h = F.silu(z[:, :HIDDEN]) * z[:, HIDDEN:]
    y = torch.einsum("rf,rdf->rd", h, down[expert_R])
    dh = torch.einsum("rd,rdf->rf", grad_ND[plan.tokens_R], down[expert_R])
    z_leaf, gates_leaf = z.clone().requires_grad_(), gates_R.clone().requires_grad_()
    weighted = gates_leaf[:, None] * F.silu(z_leaf[:, :HIDDEN]) * z_leaf[:, HIDDEN:]
    dz, grad_gates = torch.autograd.grad(weighted, (z_leaf, gates_leaf), dh)
    one_hot_RE = F.one_hot(expert_R, E) * is_row_R[:, None]

    def close(ours: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(ours[:end], expected[:end])

    poison = torch.where(torch.arange(len(z))[:, None] < end, 0.0, torch.nan)
    close(stages.up(x_ND, plan, gate_up), z)
    close(stages.activate(z + poison, plan), h)
    close(stages.down(h + poison, plan, down), y)
    by_token = torch.zeros(N, D).index_add(0, plan.tokens_R, y * gates_R[:, None] * is_row_R[:, None])
    torch.testing.assert_close(stages.combine(y + poison, gates_NK, plan), by_token)
    close(stages.grad_hidden(grad_ND, plan, down), dh)
    dz_own, weighted_own, grad_gates_own = stages.activate_backward(z + poison, dh + poison, gates_R, plan)
    close(dz_own, dz), close(weighted_own, weighted.detach()), close(grad_gates_own, grad_gates)
    grad_down = torch.einsum("re,rd,rf->edf", one_hot_RE.float(), grad_ND[plan.tokens_R], weighted.detach())
    torch.testing.assert_close(stages.grad_down(grad_ND, weighted.detach() + poison, plan, E), grad_down)
    grad_gate_up = torch.einsum("re,rj,rd->ejd", one_hot_RE.float(), dz, x_ND[plan.tokens_R])
    torch.testing.assert_close(stages.grad_gate_up(dz + poison, x_ND, plan, E), grad_gate_up)
    dx_RD = torch.einsum("rj,rjd->rd", dz, gate_up[expert_R]) * is_row_R[:, None]
    dx_ND = torch.zeros(N, D).index_add(0, plan.tokens_R, dx_RD)
    torch.testing.assert_close(stages.grad_input(dz + poison, plan, gate_up), dx_ND)


@pytest.mark.parametrize("recompute_up", [False, True])
@pytest.mark.parametrize("max_rows", [None, N * K - 10])
def test_grouped_mm_never_waits_for_the_device(recompute_up: bool, max_rows: int | None) -> None:
    def step(device: str) -> None:
        tensors = leaves(torch.bfloat16, device)
        plan = sort_rows(torch.zeros(N, K, dtype=torch.int64, device=device), E, max_rows)
        out_ND = MATMULS["grouped_mm"](*tensors, plan, recompute_up)
        gradients = torch.autograd.grad(out_ND.sum(), tensors)
        assert [g.shape for g in gradients] == [t.shape for t in tensors]

    step("meta")  # tensors without values, on a device that is no CPU
    with FakeTensorMode():
        step("cpu")
        with pytest.raises(Exception, match="_local_scalar_dense"):
            MATMULS["bmm"](*leaves(), sort_rows(torch.zeros(N, K, dtype=torch.int64), E), recompute_up)


def test_gradients_of_empty_experts_are_zero_on_gpus_that_leave_them_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grouped_mm = F.grouped_mm

    def careless(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
        out = grouped_mm(left, right, offs=offs)
        is_empty_E = offs.diff(prepend=offs.new_zeros(1)) == 0
        return out if right.ndim == 3 else out.masked_fill(is_empty_E[:, None, None], torch.nan)

    monkeypatch.setattr(F, "grouped_mm", careless)
    plan, tensors = sort_rows(table(), E), leaves()
    exact = torch.autograd.grad(loop(*tensors, plan, False).sum(), tensors)
    for is_known in (True, False):
        monkeypatch.setattr(room, "leaves_empty_groups", lambda device, answer=is_known: answer)
        gradients = torch.autograd.grad(MATMULS["grouped_mm"](*tensors, plan, False).sum(), tensors)
        are_right = [torch.allclose(*pair, atol=1e-5) for pair in zip(gradients, exact, strict=True)]
        assert are_right == [True, True, is_known, is_known]
    assert not leaves_empty_groups(torch.device("cpu"))


def test_stages_see_a_gradient_whose_rows_lie_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    grad_hidden, seen = TorchStages.grad_hidden, []

    def watch(self: TorchStages, grad_ND: Tensor, plan: Plan, down: Tensor) -> Tensor:
        seen.append(grad_ND.is_contiguous())
        return grad_hidden(self, grad_ND, plan, down)

    monkeypatch.setattr(TorchStages, "grad_hidden", watch)
    MATMULS["grouped_mm"](*leaves(), sort_rows(table(), E), False).sum().backward()
    assert seen == [True]


def test_the_gathered_gradient_is_let_go() -> None:
    """It is as large as all rows: kept from one stage of the backward pass to the next, and no longer."""
    stages, plan = TorchStages(grouped_product, grouped_weight_grad), sort_rows(table(), E)
    room._Grouped.apply(*leaves(), plan, stages, False).sum().backward()
    assert stages.grad_RD is None


@pytest.mark.parametrize("name", STAGES)
def test_a_plan_of_no_rows_at_all(name: str) -> None:
    make, padding = STAGES[name]
    plan: Plan = padding(sort_rows(torch.full((N, K), E), E))
    stages = make()
    z_RJ = stages.up(torch.randn(N, D), plan, torch.randn(E, 2 * HIDDEN, D))
    y_RD = stages.down(stages.activate(z_RJ, plan), plan, torch.randn(E, D, HIDDEN))
    assert (stages.combine(y_RD, torch.rand(N, K), plan) == 0).all()
    assert (stages.grad_gate_up(z_RJ, torch.randn(N, D), plan, E) == 0).all()
