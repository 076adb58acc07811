"""What the stage sets promise beyond their sum: no garbage read, no bit lost between one kernel and two."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from moe.dispatch import gather_sum, sort_rows
from moe.kernels import glue
from moe.kernels.stages import FusedStages, TritonStages

SETS = {"fused": FusedStages, "triton": TritonStages}


@pytest.fixture
def plan(device):
    """12 tokens to 2 of 5 experts, of which one is chosen by none and two slots go nowhere."""
    torch.manual_seed(0)
    chosen_NK = torch.randint(4, (12, 2))
    chosen_NK[3, 1] = chosen_NK[7, 0] = 5
    return sort_rows(chosen_NK.to(device), 5)


def poisoned(rows, plan):
    """The same rows, NaN where nobody's are."""
    rows = rows.clone()
    rows[plan.offsets_E[-1] :] = torch.nan
    return rows


@pytest.mark.parametrize("name", SETS)
def test_no_stage_reads_rows_of_nobody(name, plan, device):
    stages, num_rows = SETS[name](), len(plan.order_R)
    x_ND, gates_NK = torch.randn(12, 24, device=device), torch.rand(12, 2, device=device)
    z_RJ, h_RF = torch.randn(num_rows, 80, device=device), torch.randn(num_rows, 40, device=device)
    gate_up, down = torch.randn(5, 80, 24, device=device), torch.randn(5, 24, 40, device=device)

    def outcomes(change):
        z, h = change(z_RJ, plan), change(h_RF, plan)
        backward = stages.activate_backward(z, h, change(gates_NK.flatten()[plan.order_R], plan), plan)
        by_row = [stages.activate(z, plan), stages.down(h, plan, down), *backward]
        yield from (rows[: plan.offsets_E[-1]] for rows in by_row)
        yield stages.combine(change(torch.randn_like(x_ND)[plan.tokens_R], plan), gates_NK, plan)
        stages.grad_hidden(x_ND, plan, down)
        yield stages.grad_down(x_ND, h, plan, 5)
        yield stages.grad_gate_up(z, x_ND, plan, 5)
        yield stages.grad_input(z, plan, gate_up)
        yield backward[2]

    torch.manual_seed(1)
    clean = list(outcomes(lambda rows, plan: rows))
    torch.manual_seed(1)
    for ours, theirs in zip(outcomes(poisoned), clean, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("fresh_memory_is_nan")
def test_a_gate_of_nobody_has_gradient_0(plan, device):
    z_RJ, dh_RF = torch.randn(24, 16, device=device), torch.randn(24, 8, device=device)
    grad_gates_R = glue.swiglu_backward(z_RJ, dh_RF, torch.rand(24, device=device), plan.offsets_E)[2]
    end = int(plan.offsets_E[-1])
    assert end == 22 and not grad_gates_R[end:].any() and grad_gates_R[:end].all()


def test_h_of_the_product_is_h_of_z_bit_for_bit(plan, low_precision, device):
    x_ND = torch.randn(12, 24, device=device, dtype=low_precision)
    gate_up = torch.randn(5, 80, 24, device=device, dtype=low_precision) / 24**0.5
    stages, end = TritonStages(), plan.offsets_E[-1]
    z_RJ = stages.up(x_ND, plan, gate_up)
    assert stages.hidden_RF is not None
    first = stages.activate(z_RJ, plan)
    again = stages.up(x_ND, plan, gate_up)  # as a backward pass does that recomputes z
    assert stages.hidden_RF is None and torch.equal(again[:end], z_RJ[:end])
    assert torch.equal(first[:end], stages.activate(z_RJ, plan)[:end])


@pytest.mark.parametrize("width", [8, 5, 3000])
def test_swiglu_and_its_backward(width, device):
    torch.manual_seed(0)
    z_RJ = 3 * torch.randn(5, 2 * width, dtype=torch.float64)
    z_RJ[0, 0], z_RJ[1, 0], z_RJ[2, 0] = 200, -200, 0  # where exp overflows, and where it is 1
    dh_RF, gates_R = torch.randn(5, width, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    z_RJ.requires_grad_()
    gates_R.requires_grad_()
    gate, up = z_RJ.chunk(2, dim=1)
    h_RF = F.silu(gate) * up
    truth = torch.autograd.grad(h_RF * gates_R[:, None], (z_RJ, gates_R), dh_RF)
    offsets_E = torch.tensor([0, 5], dtype=torch.int32, device=device)
    z, dh, gates = (t.detach().float().to(device) for t in (z_RJ, dh_RF, gates_R))
    dz_RJ, weighted_RF, grad_gates_R = glue.swiglu_backward(z, dh, gates, offsets_E)
    expected = (h_RF, truth[0], h_RF * gates_R[:, None], truth[1])
    for ours, theirs in zip((glue.swiglu(z, offsets_E), dz_RJ, weighted_RF, grad_gates_R), expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 3, 11])
@pytest.mark.parametrize("weighted", [False, True])
def test_gather_sum_is_dispatchs(slots, weighted, low_precision, device):
    torch.manual_seed(0)
    chosen_NK = torch.randint(6, (9, slots), device=device)
    plan = sort_rows(chosen_NK, 5)  # 5 goes nowhere
    rows_RD = poisoned(torch.randn(9 * slots, 21, device=device, dtype=low_precision), plan)
    weights_NK = torch.rand(9, slots, device=device) if weighted else None
    ours = glue.gather_sum(rows_RD, plan.places_NK, plan.offsets_E, weights_NK)
    theirs = gather_sum(rows_RD.double().nan_to_num(), plan, None if weights_NK is None else weights_NK.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(low_precision).eps, atol=1e-5)


def test_weight_gradients_in_the_dtype_asked_for(plan, low_precision, device):
    x_ND, dz_RJ, h_RF = (torch.randn(n, d, device=device).to(low_precision) for n, d in ((12, 24), (24, 80), (24, 40)))
    for grad_dtype in (None, torch.float32):
        stages = TritonStages(grad_dtype)
        for grad in (stages.grad_down(x_ND, h_RF, plan, 5), stages.grad_gate_up(dz_RJ, x_ND, plan, 5)):
            assert grad.dtype == (grad_dtype or low_precision)
