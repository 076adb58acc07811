"""Blocks against the whole: every mask, linear memory, no block visited in vain, low precision no worse than plain."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.backends.blockwise import Blockwise
from attention.backends.reference import Reference
from attention.backends.strips import strips
from attention.contract import Options
from attention.mask import Documents, Mask
from tests.attention.cases import Case, assert_like_reference, cases


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([3, 16, None]))
def test_is_the_plain_one_on_any_mask(case: Case, edge: int | None) -> None:
    assert_like_reference(Blockwise(edge), case)


@pytest.mark.parametrize("edge", [1, 2, 3])
def test_strips_of_every_small_tile(edge: int) -> None:
    for window, offset, prefix, first_tokens in product((None, 1, 2, 3), range(-3, 6), (0, 2), (0, 2)):
        mask = Mask(window=window, offset=offset, prefix=prefix, first_tokens=first_tokens)
        check_strips(Case(1, 5, 6, 1, 1, 1, 1, mask, Options()), edge)


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([1, 5, 16]))
def test_strips_hold_what_is_seen_once_and_nothing_in_vain(case: Case, edge: int) -> None:
    check_strips(case, edge)


def check_strips(case: Case, edge: int) -> None:
    mask = case.mask
    rows = 1 if mask.documents is None else case.B
    drawn = mask.dense(case.B, case.T, case.S, "cpu")
    if mask.documents is not None:
        drawn = torch.block_diag(*drawn)[None]
    count = torch.zeros_like(drawn, dtype=torch.int)
    queries = []
    for strip in strips(rows * case.T, rows * case.S, mask, edge):
        queries.append(strip.queries)
        assert strip.blocks and strip.queries.stop - strip.queries.start <= edge
        for block in strip.blocks:
            inside = drawn[:, strip.queries, block.keys]
            assert inside.any(), "a block in which nothing is seen"
            assert inside.all() or not block.is_full
            assert block.keys.stop - block.keys.start <= edge
            count[:, strip.queries, block.keys] += 1
    assert (count <= 1).all() and (count[drawn.bool()] == 1).all()
    assert all(before.stop <= after.start for before, after in pairwise(queries))


def visited(T: int, S: int, mask: Mask, edge: int) -> tuple[int, int]:
    """(cells computed, cells masked)"""
    cells = masked = 0
    for strip in strips(T, S, mask, edge):
        for block in strip.blocks:
            size = (strip.queries.stop - strip.queries.start) * (block.keys.stop - block.keys.start)
            cells, masked = cells + size, masked + size * (not block.is_full)
    return cells, masked


def test_work_is_what_the_mask_leaves() -> None:
    T, edge = 4096, 256
    cells, masked = visited(T, T, Mask(), edge)
    assert cells <= T * (T + edge) / 2 and masked == T * edge
    cells, _ = visited(T, T, Mask(window=256), edge)
    assert cells <= 2 * T * 256
    cells, _ = visited(T, T, Mask(window=256, first_tokens=4), edge)
    assert cells <= T * (2 * 256 + 4)
    cells, _ = visited(T, T, Mask(documents=Documents((64,) * 64)), edge)
    assert cells == 16 * 256 * 256
    cells, _ = visited(T, T, Mask(documents=Documents((1024,) * 4)), edge)
    assert cells <= 4 * 1024 * (1024 + edge) / 2
    assert visited(T, 64, Mask(window=8, offset=40), edge)[0] <= 64 * 64
    assert visited(64, 64, Mask(offset=-64), edge) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_partial", [False, True])
def test_low_precision_is_the_rounding_of_the_right_answer(dtype: torch.dtype, is_partial: bool) -> None:
    case = Case(2, 40, 40, 2, 3, 8, 8, Mask(window=9), Options(is_partial=is_partial, softcap=3.0))
    *inputs, grad, _ = case.tensors(dtype)
    backend, options = Blockwise(16), case.options
    out, lse = backend.forward(*inputs, case.mask, options)
    grads = backend.backward(grad, *inputs, out, lse, case.mask, options)
    assert lse.dtype == torch.float32
    assert {x.dtype for x in (out, *grads)} == {torch.float32 if is_partial else dtype}
    wide = [x.double() for x in (*inputs, grad)]
    right, right_lse = Reference().forward(*wide[:3], case.mask, options)
    expected = Reference().backward(wide[3], *wide[:3], out.double(), right_lse, case.mask, options)
    for got, wanted in zip((out, *grads), (right, *expected), strict=True):
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error <= (2e-6 if is_partial else torch.finfo(dtype).eps / 2)


def test_memory_is_linear_in_the_length() -> None:
    """The largest tensor of a pass over 8 times the tokens is 8 times as large at most, and far below T * T."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    T, mask, options = 1024, Mask(), Options()
    q = torch.randn(1, T, 1, 8)
    with Watch():
        out, lse = Blockwise().forward(q, q, q, mask, options)
        Blockwise().backward(q, q, q, q, out, lse, mask, options)
    assert largest <= max(4 * T * 8, 4 * 256 * 256)


def test_nothing_to_see_and_nothing_to_ask() -> None:
    q, none = torch.randn(2, 3, 2, 4), torch.randn(2, 0, 1, 4)
    out, lse = Blockwise().forward(q, none, none, Mask(), Options())
    assert not out.any() and (lse == float("-inf")).all()
    grads = Blockwise().backward(q, q, none, none, out, lse, Mask(), Options())
    assert not grads[0].any() and grads[1].shape == grads[2].shape == none.shape
    out, lse = Blockwise().forward(q[:, :0], q[:, :, :1], q[:, :, :1], Mask(), Options())
    assert out.shape == (2, 0, 2, 4) and lse.shape == (2, 2, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_answers_as_the_processor_does(dtype: torch.dtype) -> None:
    case = Case(2, 300, 300, 2, 3, 16, 8, Mask(window=70, documents=Documents((100, 200, 1, 299))), Options())
    *inputs, grad, grad_lse = case.tensors(dtype)
    answers = []
    for device in ("cpu", "cuda"):
        q, k, v, given, given_lse = (x.to(device) for x in (*inputs, grad, grad_lse))
        out, lse = Blockwise().forward(q, k, v, case.mask, case.options)
        grads = Blockwise().backward(given, q, k, v, out, lse, case.mask, case.options, given_lse.float())
        answers.append([x.cpu().double() for x in (out, lse, *grads)])
    for a, b in zip(*answers, strict=True):
        assert (a - b).norm() <= (1e-6 if dtype == torch.float32 else 2**-8) * b.norm()
