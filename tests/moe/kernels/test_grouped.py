"""The grouped matmul kernels alone: any tile, any order of tiles, and the map from tiles to rows."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernels
from moe.kernels import grouped
from moe.kernels.tiles import Tile

SIZES = {
    "uneven": [17, 0, 40, 1],
    "empty": [0, 0, 0],
    "one": [33],
    "first and last": [16, 0, 0, 0, 2],
    "even": [16, 16],
}
ORDERS = {"one column after the other": 1, "pairs of rows": 2, "more than there are": 50}


def offsets_of(sizes, device):
    return torch.tensor(sizes).cumsum(0).to(device, torch.int32)


def small(group=2):
    """Smaller than any problem here in every dimension, so that every loop turns and every edge is cut."""
    return Tile(16, 16, 16, warps=4, stages=2, group=group)


def per_expert(sizes):
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def close(ours, truth):
    torch.testing.assert_close(ours.double().cpu(), truth, rtol=1e-4, atol=1e-4 if torch.cuda.is_available() else 1e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("tile_rows", [1, 8, 16, 64])
def test_each_row_stands_in_one_tile_of_its_expert(sizes, tile_rows, device):
    offsets_E, num_rows = offsets_of(sizes, device), sum(sizes) + 3  # 3 that go nowhere
    tiles = grouped.map_tiles(offsets_E, num_rows, tile_rows).cpu()
    seen = torch.full((num_rows,), -1)
    for expert, first, stop in tiles.T.tolist():
        if expert >= 0:
            assert 0 < stop - first <= tile_rows and (seen[first:stop] == -1).all()
            seen[first:stop] = expert
    assert seen.tolist() == [*per_expert(sizes).tolist(), -1, -1, -1]


def test_more_tiles_than_are_written_at_once(device, monkeypatch):
    monkeypatch.setattr(grouped, "TILES_AT_ONCE", 16)
    offsets_E = offsets_of([40, 3, 35], device)
    tiles = grouped.map_tiles(offsets_E, 200, 1).cpu()
    assert tiles.shape == (3, 203)
    assert tiles[0].tolist() == [0] * 40 + [1] * 3 + [2] * 35 + [-1] * 125
    assert tiles[1, :78].tolist() == list(range(78))


@pytest.mark.parametrize("group", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gathers", [False, True])
def test_product(group, transposed, gathers, device):
    torch.manual_seed(0)
    sizes = SIZES["uneven"]
    weights = torch.randn(len(sizes), 40, 37)
    tokens_R = torch.randint(9, (sum(sizes),))
    rows = torch.randn(9 if gathers else sum(sizes), 40)
    out_RN = grouped.product(
        rows.to(device),
        (weights.transpose(1, 2) if transposed else weights).to(device),
        offsets_of(sizes, device),
        tokens_R.to(device) if gathers else None,
        transposed=transposed,
        tile=small(group),
    )
    sorted_rows = rows[tokens_R] if gathers else rows
    close(out_RN, torch.einsum("rk,rkn->rn", sorted_rows.double(), weights.double()[per_expert(sizes)]))


@pytest.mark.parametrize("with_hidden", [False, True])
def test_up(with_hidden, device):
    torch.manual_seed(0)
    sizes = SIZES["first and last"]
    x_ND, tokens_R = torch.randn(7, 40), torch.randint(7, (sum(sizes),))
    gate_up = torch.randn(len(sizes), 2 * 37, 40) / 40**0.5
    z_RJ, h_RF = grouped.up(
        x_ND.to(device),
        gate_up.to(device),
        offsets_of(sizes, device),
        tokens_R.to(device),
        with_hidden=with_hidden,
        tile=small(),
    )
    truth = torch.einsum("rd,rjd->rj", x_ND.double()[tokens_R], gate_up.double()[per_expert(sizes)])
    close(z_RJ, truth)
    assert (h_RF is not None) is with_hidden
    if h_RF is not None:
        gate, up = truth.chunk(2, dim=1)
        close(h_RF, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("gathers_first", [False, True])
@pytest.mark.parametrize("sizes", [SIZES["uneven"], SIZES["empty"]], ids=["uneven", "empty"])
def test_weight_grad(gathers_first, sizes, device):
    torch.manual_seed(0)
    num_rows = sum(sizes) + 2
    tokens_R = torch.randint(9, (num_rows,))
    a = torch.randn(9 if gathers_first else num_rows, 37)
    b = torch.randn(num_rows if gathers_first else 9, 21)
    (b if gathers_first else a)[sum(sizes) :] = torch.nan
    out_EMN = grouped.weight_grad(
        a.to(device),
        b.to(device),
        offsets_of(sizes, device),
        tokens_R.to(device),
        gathers_first=gathers_first,
        tile=small(),
    )
    a, b = (a[tokens_R], b) if gathers_first else (a, b[tokens_R])
    parts = zip(a.double()[: sum(sizes)].split(sizes), b.double()[: sum(sizes)].split(sizes), strict=True)
    close(out_EMN, torch.stack([left.T @ right for left, right in parts]))
    assert all(not out_EMN[e].any() for e, size in enumerate(sizes) if not size)


def test_weight_gradients_in_fp32_are_not_rounded(low_precision, device):
    torch.manual_seed(0)
    a, b = torch.randn(2, 40, 24).to(device, low_precision)
    offsets_E, tokens_R = offsets_of([30, 10], device), torch.arange(40, device=device)
    truth = torch.stack([a[:30].double().T @ b[:30].double(), a[30:].double().T @ b[30:].double()])
    out = grouped.weight_grad(a, b, offsets_E, tokens_R, gathers_first=True, dtype=torch.float32)
    rounded = grouped.weight_grad(a, b, offsets_E, tokens_R, gathers_first=True)
    assert out.dtype == torch.float32 and rounded.dtype == low_precision
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.to(low_precision), rounded)


def test_the_sweep_over_tiles_times_every_kernel(device):
    rows = kernels.sweep(kernels.Shape(16, 16, 2, 1, 4), torch.float32, device, rounds=1)
    assert {row["kernel"] for row in rows} == {*kernels.uses(kernels.OLMOE), *kernels.bytes_moved(kernels.OLMOE)}
    assert all(row["ms"] > 0 for row in rows)
