"""torch's fused kernels against the plain backend: every mask, every width, every part of a larger softmax."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.attend import attend
from attention.backends import fused, packed, rows
from attention.backends.reference import Reference
from attention.backends.sdpa import CpuFlash, Sdpa
from attention.contract import PLAIN, Options
from attention.mask import Documents, Mask
from tests.attention.cases import Case, assert_like_reference, cases

sdpa, reference = Sdpa(), Reference()

DOCUMENTS = {
    "none": None,
    "ragged": (5, 1, 26, 20, 12, 1, 31),
    "uniform": (16,) * 6,
    "rows": (32,) * 3,
    "ones": (1,) * 96,
    "few lengths": (8, 8, 16, 16, 16, 16, 8, 8),
}


def draw(B: int, T: int, S: int, H: int, G: int, *, C: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(B * 1000 + T * 100 + S * 10 + G)
    shapes = [(B, T, H, C), (B, S, G, C), (B, S, G, C), (B, T, H, C)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(backend: Sdpa | Reference, tensors: list[Tensor], mask: Mask, options: Options = PLAIN) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    out, lse = attend(backend, q, k, v, mask, options)
    assert not lse.requires_grad
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3].to(out.dtype)), lse]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.fixture
def small() -> Iterator[None]:
    """Sizes at which blocks, tiles and groups all occur in rows of 40 tokens."""
    rows._draw.cache_clear()
    packed.arrange.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "QUERY_BLOCK", 8)
        patch.setattr(rows, "SMALLEST_TILE", 3)
        patch.setattr(rows, "CACHED_CELLS", 50)
        patch.setattr(packed, "LONG", 8)
        yield
    packed.arrange.cache_clear()


@settings(max_examples=150, deadline=None)
@given(cases())
def test_is_the_plain_one_on_any_mask(case: Case) -> None:
    assert_like_reference(sdpa, replace(case, options=replace(case.options, softcap=0.0)))


@pytest.mark.usefixtures("small")
def test_is_the_plain_one_in_blocks_tiles_and_groups() -> None:
    @settings(max_examples=300, deadline=None)
    @given(cases())
    def check(case: Case) -> None:
        assert_like_reference(sdpa, replace(case, options=replace(case.options, softcap=0.0)))

    check()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(0, 40),
    st.one_of(st.none(), st.integers(-50, 60)),
    st.one_of(st.none(), st.integers(1, 45)),
    st.sampled_from([0, 0, 1, 7]),
    st.sampled_from([0, 0, 1, 7]),
)
@example(T=9, S=4, offset=0, window=None, prefix=0, first_tokens=0)
def test_calls_are_the_mask_cut_up(  # noqa: PLR0917
    T: int, S: int, offset: int | None, window: int | None, prefix: int, first_tokens: int
) -> None:
    """No key twice, none left out, and no query in a call that sees nothing there: kernels answer garbage to it."""
    mask = Mask(window=window, offset=offset, prefix=prefix, first_tokens=first_tokens)
    seen_TS = torch.zeros(T, S, dtype=torch.int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "QUERY_BLOCK", 8)
        patch.setattr(rows, "SMALLEST_TILE", 3)
        for call in rows.calls(T, S, mask):
            queries = rows.cut_queries(torch.arange(T)[None], call)
            keys = rows.cut_keys(torch.arange(S)[None], call)
            bias = rows.drawn(call, torch.zeros(()))
            for tile_queries, tile_keys in zip(queries, keys, strict=True):
                view = torch.ones(len(tile_queries), len(tile_keys), dtype=torch.bool)
                if call.is_causal:
                    assert len(tile_queries) == len(tile_keys) and bias is None
                    view = view.tril()
                elif bias is not None:
                    view = bias == 0
                assert view.any(1).all()
                seen_TS[tile_queries[:, None], tile_keys[None]] += view
    assert torch.equal(seen_TS, mask.dense(1, T, S, "cpu")[0].int())


@pytest.mark.parametrize("window", [None, 1, 7, 32])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_fp32_is_close_to_fp64(name: str, H: int, G: int, window: int | None) -> None:
    lengths = DOCUMENTS[name]
    mask = Mask(window=window, documents=Documents(lengths) if lengths else None)
    tensors = draw(3, 32, 32, H, G)
    got, wanted = run(sdpa, tensors, mask), run(reference, [x.double() for x in tensors], mask)
    for part, a, b in zip(("out", "dq", "dk", "dv"), got[:4], wanted[:4], strict=True):
        assert a.dtype == torch.float32
        # Against dout where that is larger: the gradient of a softmax over one key is 0, and rounding leaves dust.
        assert (a - b).norm() <= 2e-6 * max(b.norm(), tensors[3].norm()), part
    assert got[4].dtype == torch.float32 and torch.allclose(got[4].double(), wanted[4], atol=3e-6)


@pytest.mark.parametrize(("T", "S"), [(3, 0), (0, 3), (0, 0)])
def test_nothing_to_attend_does_not_end_the_process(T: int, S: int) -> None:
    for mask in (Mask(), Mask(window=2), Mask(is_causal=False), Mask(prefix=(1, 2))):
        out, dq, dk, dv, lse = run(sdpa, draw(2, T, S, 4, 2), mask)
        assert not out.any() and (lse == float("-inf")).all() and lse.shape == (2, 4, T)
        assert not dq.any() and not dk.any() and not dv.any()


def low_precision_units(monkeypatch: pytest.MonkeyPatch, have: bool) -> None:
    monkeypatch.setattr(fused, "has_units", lambda dtype: have)


@pytest.mark.parametrize("have", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 6])
def test_low_precision_is_as_good_as_plain(
    monkeypatch: pytest.MonkeyPatch, window: int | None, dtype: torch.dtype, have: bool
) -> None:
    low_precision_units(monkeypatch, have)
    tensors = draw(2, 64, 64, 4, 4, dtype=dtype)
    mask = Mask(window=window, documents=Documents((40, 24, 64)))
    wanted = run(reference, [x.double() for x in tensors], mask)
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    dense = mask.dense(2, 64, 64, "cpu")[:, None]
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=dense).transpose(1, 2)
    plain = [plain, *torch.autograd.grad(plain, (q, k, v), tensors[3])]
    got = run(sdpa, tensors, mask)
    for a, b, c in zip(got[:4], plain, wanted[:4], strict=True):
        assert a.dtype == dtype and relative(a.double(), c) <= 2 * relative(b.double(), c)
    assert got[4].dtype == torch.float32


@pytest.mark.parametrize("have", [False, True])
def test_parts_are_in_fp32(monkeypatch: pytest.MonkeyPatch, have: bool) -> None:
    """All but as exact as if the bf16 inputs had been fp32: no rounding happens on the way."""
    low_precision_units(monkeypatch, have)
    tensors, mask = draw(2, 32, 32, 4, 2, dtype=torch.bfloat16), Mask(window=7, documents=Documents((20, 12, 32)))
    wanted = [x.double() for x in tensors]
    out, lse = reference.forward(*wanted[:3], mask, Options())
    got = [*sdpa.forward(*tensors[:3], mask, Options(is_partial=True))]
    got += sdpa.backward(tensors[3], *tensors[:3], out.float(), lse.float(), mask, Options(is_partial=True))
    right = [out, lse, *reference.backward(wanted[3], *wanted[:3], out, lse, mask, Options())]
    for a, b in zip(got, right, strict=True):
        assert a.dtype == torch.float32 and relative(a.double(), b) < 1e-6


def test_sums_over_many_blocks_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "QUERY_BLOCK", 4)
    low_precision_units(monkeypatch, True)
    tensors, mask = draw(1, 128, 160, 2, 2, dtype=torch.bfloat16), Mask(prefix=3)
    wanted = run(reference, [x.double() for x in tensors], mask)
    monkeypatch.undo()
    low_precision_units(monkeypatch, True)
    alone = run(sdpa, tensors, mask)
    monkeypatch.setattr(rows, "QUERY_BLOCK", 4)
    blocks = run(sdpa, tensors, mask)
    for a, b, c in zip(blocks[2:4], alone[2:4], wanted[2:4], strict=True):
        assert relative(a.double(), c) <= 1.1 * relative(b.double(), c)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("backend", [sdpa, reference], ids=lambda backend: backend.name)
def test_other_documents_do_not_matter_at_all(backend: Sdpa | Reference, window: int | None) -> None:
    mask = Mask(window=window, documents=Documents((5, 9, 11, 7, 9, 23)))
    tensors = draw(2, 32, 32, 2, 1)
    inside = torch.zeros(64, dtype=torch.bool)
    inside[14:25] = True
    inside = inside.view(2, 32, 1, 1)
    other = [torch.where(inside, x, torch.randn_like(x) * 3) for x in tensors]
    for a, b in zip(run(backend, tensors, mask)[:4], run(backend, other, mask)[:4], strict=True):
        assert torch.equal(a[inside.expand_as(a)], b[inside.expand_as(b)])


@pytest.mark.parametrize("lengths", [None, (20, 12), (9, 23), (16, 16)])
@pytest.mark.parametrize("window", [None, 5])
def test_the_future_never_changes_the_past(lengths: tuple[int, ...] | None, window: int | None) -> None:
    mask = Mask(window=window, documents=Documents(lengths) if lengths else None)
    q, k, v, _ = draw(1, 32, 32, 2, 2)
    out = sdpa.forward(q, k, v, mask, Options())[0]
    for t in (1, 8, 17, 31):
        changed = [torch.cat((x[:, :t], torch.randn_like(x[:, t:])), dim=1) for x in (q, k, v)]
        other = sdpa.forward(*changed, mask, Options())[0]
        assert torch.equal(other[:, :t], out[:, :t]) and not torch.equal(other[:, t:], out[:, t:])


def test_a_long_window_draws_one_small_mask_and_no_call_is_idle() -> None:
    for mask, T, S in ((Mask(window=32), 2050, 2050), (Mask(window=64, first_tokens=4), 2050, 3000)):
        todo = list(rows.calls(T, S, mask))
        assert len(todo) <= 4
        for call in todo:
            assert call.tile_queries <= rows.SMALLEST_TILE
            assert call.head + call.tile_keys <= 4 + call.tile_queries + mask.window
    (decoding,) = rows.calls(1, 500, Mask(window=64))
    assert decoding == rows.Call(slice(0, 1), slice(436, 500))


def test_a_drawing_stays_small_over_many_keys() -> None:
    drawn = [call for call in rows.calls(4096, 2**20, Mask(prefix=1)) if call.mask is not None]
    assert drawn
    for call in drawn:
        assert call.tile_queries * call.tile_keys <= max(rows.DRAWN_CELLS, rows.SMALLEST_TILE * 2**20)


@pytest.mark.parametrize(("T", "S", "offset"), [(5, 12, None), (2, 40, None), (7, 30, 11), (9, 12, 3), (6, 12, -2)])
def test_a_chunk_after_older_keys_is_two_calls_that_draw_nothing(T: int, S: int, offset: int | None) -> None:
    mask, tensors = Mask(offset=offset), draw(2, T, S, 4, 2)
    calls = list(rows.calls(T, S, mask))
    assert all(call.mask is None for call in calls) and sum(call.is_more for call in calls) == (offset != -2)
    expected = run(reference, [x.double() for x in tensors], mask)
    for one, other in zip(run(sdpa, tensors, mask), expected, strict=True):
        assert torch.equal(one.isinf(), other.isinf())
        assert relative(one.nan_to_num(neginf=0), other.nan_to_num(neginf=0)) <= 2e-6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=30), st.sampled_from([2, 64, 10**9]), st.booleans())
def test_batches_hold_each_token_once(lengths: list[int], shortest_alone: int, is_filled: bool) -> None:
    documents = Documents(tuple(lengths))
    N = documents.num_tokens
    x_NH = torch.arange(1.0, N + 1)[:, None].expand(N, 3).contiguous()
    batches = list(packed.arrange(documents, shortest_alone, is_filled, torch.device("cpu")))
    taken = [batch.take(x_NH) for batch in batches]
    assert torch.equal(packed.gather_answers(batches, taken, N), x_NH)
    assert sum(batch.take(x_NH, is_gradient=True).sum() for batch in batches) == x_NH.sum()
    assert all((rows_[:, 1:] - rows_[:, :-1] >= 0).all() for rows_ in taken)
    assert is_filled or sum(batch.count * batch.length for batch in batches) == N
    assert sum(batch.count * batch.length for batch in batches) <= 1.25 * N


def test_uniform_documents_are_views(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = CpuFlash.forward
    monkeypatch.setattr(CpuFlash, "forward", lambda self, q, *rest: seen.append(q) or plain(self, q, *rest))
    q, k, v, _ = draw(2, 32, 32, 2, 2)
    sdpa.forward(q, k, v, Mask(documents=Documents((16,) * 4)), Options())
    assert len(seen) == 1 and seen[0].data_ptr() == q.data_ptr() and seen[0].shape == (4, 16, 2, 16)


def test_gradients_in_fp64() -> None:
    mask = Mask(window=3, documents=Documents((5, 2, 4)))
    tensors = [x.double().requires_grad_() for x in draw(1, 11, 11, 2, 1, C=2)[:3]]

    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        return attend(sdpa, *x, mask, Options(), needs_lse_gradient=True)

    assert torch.autograd.gradcheck(both, tensors)
