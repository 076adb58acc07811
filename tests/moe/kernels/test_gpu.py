"""What only a GPU's memory can show: rows so many that their numbers times the width pass 2^31."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

ROWS, WIDTH, TAIL = 1_100_000, 2048, 5

pytestmark = pytest.mark.gpu


@pytest.fixture
def offsets_E():
    return torch.tensor([ROWS // 2, ROWS], dtype=torch.int32, device="cuda")


def long_rows(width):
    """Zeros, but for the last rows."""
    rows = torch.zeros(ROWS, width, dtype=torch.bfloat16, device="cuda")
    rows[-TAIL:].normal_()
    return rows


def close(ours, truth):
    torch.testing.assert_close(ours.double(), truth, rtol=1e-2, atol=1e-2)


def test_glue_reaches_the_last_of_a_million_rows(offsets_E):
    from moe.kernels import glue

    z_RJ = long_rows(WIDTH)
    gate, up = z_RJ[-TAIL:].double().chunk(2, dim=1)
    close(glue.swiglu(z_RJ, offsets_E)[-TAIL:], F.silu(gate) * up)
    places_NK = torch.arange(ROWS - TAIL, ROWS, device="cuda")[:, None]
    close(glue.gather_sum(z_RJ, places_NK, offsets_E), z_RJ[-TAIL:].double())
    dh_RF, gates_R = torch.ones(ROWS, WIDTH // 2, dtype=torch.bfloat16, device="cuda"), torch.ones(ROWS, device="cuda")
    dz_RJ, _, grad_gates_R = glue.swiglu_backward(z_RJ, dh_RF, gates_R, offsets_E)
    close(dz_RJ[-TAIL:, WIDTH // 2 :], F.silu(gate))
    torch.testing.assert_close(grad_gates_R[-TAIL:].double(), (F.silu(gate) * up).sum(dim=1), rtol=1e-4, atol=1e-3)


def test_products_reach_the_last_of_a_million_rows(offsets_E):
    from moe.kernels import grouped

    x_ND, weights = torch.randn(16, 64, device="cuda").bfloat16(), torch.randn(2, 64, WIDTH, device="cuda").bfloat16()
    tokens_R = torch.randint(16, (ROWS,), device="cuda")
    truth = x_ND[tokens_R[-TAIL:]].double() @ weights[1].double()
    close(grouped.product(x_ND, weights, offsets_E, tokens_R)[-TAIL:], truth)
    close(grouped.up(x_ND, weights.transpose(1, 2), offsets_E, tokens_R)[0][-TAIL:], truth)
    rows = long_rows(WIDTH)
    grad = grouped.weight_grad(rows, x_ND, offsets_E, tokens_R, gathers_first=False)
    assert not grad[0].any()
    close(grad[1], rows[-TAIL:].double().T @ x_ND[tokens_R[-TAIL:]].double())
