"""The CPU path: blocks of any size, and fp32 products where the processor has no units for less."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe import blocked as room
from moe.blocked import blocked, cut, native_dtypes, product_dtype
from moe.dispatch import sort_rows
from moe.experts import Experts


def run(dtype: torch.dtype = torch.float32, recompute_up: bool = False) -> list[Tensor]:
    """out, and the gradients of x, gates, gate_up and down, for 80 tokens that meet 2 of 5 experts, some only one."""
    torch.manual_seed(0)
    chosen_NK = torch.rand(80, 5).topk(2, dim=1).indices
    chosen_NK[::7, 1] = 5
    chosen_NK[chosen_NK == 2] = 3
    gates_NK = torch.rand(80, 2).requires_grad_()
    x, gate_up, down = torch.randn(80, 16), torch.randn(5, 48, 16) / 4, torch.randn(5, 16, 24) / 5
    x, gate_up, down = (t.to(dtype).requires_grad_() for t in (x, gate_up, down))
    out = blocked(x, gates_NK, gate_up, down, sort_rows(chosen_NK, 5), recompute_up)
    return [out.detach(), *torch.autograd.grad(out, (x, gates_NK, gate_up, down), torch.randn(80, 16).to(dtype))]


def test_blocks_hold_all_rows_in_order_and_as_many_as_they_may() -> None:
    for ends_E in ([3, 3, 20, 47], [0], [0, 0, 9], [64], [1, 2, 3], [5, 9, 30, 31, 32, 40]):
        for block_rows in (1, 2, 7, 16, 100):
            blocks = cut(ends_E, block_rows)
            assert all(0 < sum(block.sizes) <= block_rows for block in blocks)
            parts = [part for block in blocks for part in zip(*block, strict=True)]
            assert [expert for expert, *_ in parts] == sorted(expert for expert, *_ in parts)
            for expert, (start, stop) in enumerate(itertools.pairwise([0, *ends_E])):
                own = [size for owner, size, _ in parts if owner == expert]
                assert sum(own) == stop - start and len(own) == -(-sum(own) // block_rows)
                assert not own or max(own) - min(own) <= 1
                assert [beta for owner, _, beta in parts if owner == expert] == [0, *[1] * (len(own) - 1)][: len(own)]
            for block, after in itertools.pairwise(blocks):  # what would fit together is together
                assert after.betas[0] or sum(block.sizes) + after.sizes[0] > block_rows


@pytest.mark.parametrize("recompute_up", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_any_size_give_the_same(
    dtype: torch.dtype, recompute_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(dtype)
    for rows in (1, 7, 17, 50):
        monkeypatch.setattr(room, "BLOCK_ROWS", rows)
        tolerance = {"rtol": 2**-7, "atol": 2**-6} if dtype == torch.bfloat16 else {}
        for ours, theirs in zip(run(dtype, recompute_up), whole, strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)


class Products(TorchDispatchMode):
    """Notes what matrices are multiplied in."""

    def __init__(self, seen: set[torch.dtype]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.seen.update(t.dtype for t in args)
        return function(*args, **(kwargs or {}))


def test_processors_are_asked_for_what_they_multiply_in(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")
    units = dict.fromkeys(names, False)
    for name in names:
        monkeypatch.setattr(torch.cpu, name, lambda name=name: units[name])
    exact = {torch.float32, torch.float64}
    assert native_dtypes() == exact
    units["_is_avx512_bf16_supported"] = True
    assert native_dtypes() == exact | {torch.bfloat16}
    units.update(_is_avx512_bf16_supported=False, _is_amx_tile_supported=True)
    assert native_dtypes() == exact | {torch.bfloat16}
    units["_is_amx_fp16_supported"] = True
    assert native_dtypes() == exact | {torch.bfloat16, torch.float16}


def test_products_are_in_fp32_where_there_are_no_units_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()
    monkeypatch.setattr(room, "NATIVE_DTYPES", frozenset({torch.float32, torch.float64}))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with Products(seen):
            run(dtype)
        assert seen == {torch.float32} and product_dtype(torch.empty(1, dtype=dtype)) == torch.float32
    assert product_dtype(torch.empty(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
    seen.clear()
    monkeypatch.setattr(room, "NATIVE_DTYPES", frozenset({torch.bfloat16}))
    with Products(seen):
        run(torch.bfloat16)
    assert seen == {torch.bfloat16}


def test_autocast_does_not_bring_back_slow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "NATIVE_DTYPES", frozenset({torch.float32}))
    seen: set[torch.dtype] = set()
    experts = Experts(2, 8, 16, "blocked")
    with torch.autocast("cpu", torch.bfloat16), Products(seen):
        out_ND = experts(torch.randn(6, 8), torch.tensor([[0, 1]] * 6), torch.rand(6, 2))
    assert out_ND.dtype == torch.bfloat16 and seen == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_what_was_computed_with(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass goes on from the values of z that the backward pass finds."""
    multiply_up, seen = room._multiply_up, []

    def watch(x_rows: Tensor, ups_DJ: Sequence[Tensor], block: room.Block, kept: Tensor) -> Tensor:
        z = multiply_up(x_rows, ups_DJ, block, kept)
        seen.append((z.clone(), kept))
        return z

    monkeypatch.setattr(room, "_multiply_up", watch)
    run(dtype)
    assert seen and all(kept.dtype == dtype and torch.equal(z, kept.to(z.dtype)) for z, kept in seen)
