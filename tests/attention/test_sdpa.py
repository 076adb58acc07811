"""The fast backend against the plain one: values, gradients, log-sum-exp, and who can see whom."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.mask import Documents, Mask
from attention.reference import Reference
from attention.sdpa import Kernel, Sdpa, band

sdpa, reference = Sdpa(), Reference()

DOCUMENTS = {
    "none": None,
    "ragged": (5, 1, 26, 20, 12, 1, 31),
    "uniform": (16,) * 6,
    "rows": (32,) * 3,
    "ones": (1,) * 96,
    "few lengths": (8, 8, 16, 16, 16, 16, 8, 8),
}
HEADS = [(4, 4), (4, 2), (4, 1)]


def draw(B: int, T: int, S: int, H: int, G: int, *, C: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(B * 1000 + T * 100 + S * 10 + G)
    shapes = [(B, T, H, C), (B, S, G, C), (B, S, G, C), (B, T, H, C)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(backend, tensors: list[Tensor], mask: Mask, scale: float | None = None) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    out, lse = backend(q, k, v, mask, scale=scale, needs_lse=True)
    assert not lse.requires_grad
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3]), lse]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def assert_agree(tensors: list[Tensor], mask: Mask, scale: float | None = None) -> None:
    """fp32 through the fast backend against fp64 through the plain one."""
    wanted = run(reference, [x.double() for x in tensors], mask, scale)
    got = run(sdpa, tensors, mask, scale)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got[:4], wanted[:4], strict=True):
        assert a.shape == b.shape and a.dtype == tensors[0].dtype
        # Against dout where that is larger: the gradient of a softmax over one key is 0, and rounding leaves dust.
        assert (a - b).norm() <= 2e-6 * max(b.norm(), tensors[3].norm()), name
    assert got[4].shape == wanted[4].shape
    empty = wanted[4] == float("-inf")
    assert torch.equal(got[4] == float("-inf"), empty)
    assert torch.allclose(got[4].double()[~empty], wanted[4][~empty], atol=3e-6)


@pytest.mark.parametrize("window", [None, 1, 7, 32])
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents(name: str, H: int, G: int, window: int | None) -> None:
    lengths = DOCUMENTS[name]
    assert_agree(draw(3, 32, 32, H, G), Mask(window=window, documents=Documents(lengths) if lengths else None))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_that_see_forward(name: str) -> None:
    lengths = DOCUMENTS[name]
    assert_agree(draw(3, 32, 32, 4, 2), Mask(is_causal=False, documents=Documents(lengths) if lengths else None))


@pytest.mark.parametrize("window", [None, 1, 3, 8, 50])
@pytest.mark.parametrize(("T", "S"), [(1, 9), (4, 9), (9, 4), (9, 1), (1, 1), (3, 0), (0, 3), (40, 41)])
def test_unequal_lengths(T: int, S: int, window: int | None) -> None:
    assert_agree(draw(2, T, S, 4, 2), Mask(window=window)) if T * S else run(
        sdpa, draw(2, T, S, 4, 2), Mask(window=window)
    )


def test_empty_rows_are_zero_and_minus_infinity() -> None:
    for backend in (sdpa, reference):
        for S in (2, 0):
            q, k, v, _ = draw(1, 5, S, 2, 2)
            if backend is reference and S == 0:
                continue
            out, lse = backend(q, k, v, Mask(), needs_lse=True)
            assert (out[:, : 5 - S] == 0).all() and (lse[:, :, : 5 - S] == float("-inf")).all()
            assert lse[:, :, 5 - S :].isfinite().all()


def test_queries_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention.sdpa.QUERY_BLOCK", 8)
    for window in (None, 5):
        assert_agree(draw(2, 17, 30, 2, 1), Mask(window=window))


def test_scale() -> None:
    assert_agree(draw(3, 32, 32, 4, 2), Mask(documents=Documents(DOCUMENTS["ragged"])), scale=0.7)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=10), st.sampled_from([None, 3, 16]), st.booleans())
def test_any_documents(lengths: list[int], window: int | None, is_causal: bool) -> None:
    mask = Mask(is_causal, window if is_causal else None, Documents(tuple(lengths)))
    assert_agree(draw(1, sum(lengths), sum(lengths), 2, 1, C=8), mask)


@pytest.mark.parametrize("window", [None, 6])
def test_bf16_is_as_good_as_plain_bf16(window: int | None) -> None:
    tensors = draw(2, 64, 64, 4, 4, dtype=torch.bfloat16)
    mask = Mask(window=window, documents=Documents((40, 24, 64)))
    wanted = run(reference, [x.double() for x in tensors], mask)
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    dense = mask.dense(2, 64, 64, "cpu")[:, None]
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=dense).transpose(1, 2)
    plain = [plain, *torch.autograd.grad(plain, (q, k, v), tensors[3])]
    for a, b, c in zip(run(sdpa, tensors, mask)[:4], plain, wanted[:4], strict=True):
        assert relative(a.double(), c) <= 2 * relative(b.double(), c)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("backend", [sdpa, reference], ids=lambda backend: backend.name)
def test_other_documents_do_not_matter_at_all(backend, window: int | None) -> None:
    lengths = (5, 9, 11, 7, 9, 23)
    mask = Mask(window=window, documents=Documents(lengths))
    q, k, v, dout = draw(2, 32, 32, 2, 1)
    start, stop = 14, 25
    inside = torch.zeros(64, dtype=torch.bool)
    inside[start:stop] = True
    inside = inside.view(2, 32, 1, 1)
    other = [torch.where(inside, x, torch.randn_like(x) * 3) for x in (q, k, v, dout)]
    for a, b in zip(run(backend, [q, k, v, dout], mask)[:4], run(backend, other, mask)[:4], strict=True):
        assert torch.equal(a[inside.expand_as(a)], b[inside.expand_as(b)])


@pytest.mark.parametrize("lengths", [None, (20, 12), (9, 23), (16, 16)])
@pytest.mark.parametrize("window", [None, 5])
def test_the_future_never_changes_the_past(lengths: tuple[int, ...] | None, window: int | None) -> None:
    mask = Mask(window=window, documents=Documents(lengths) if lengths else None)
    q, k, v, _ = draw(1, 32, 32, 2, 2)
    out = sdpa(q, k, v, mask)[0]
    for t in (1, 8, 17, 31):
        changed = [torch.cat((x[:, :t], torch.randn_like(x[:, t:])), dim=1) for x in (q, k, v)]
        assert torch.equal(sdpa(*changed, mask)[0][:, :t], out[:, :t])
        assert not torch.equal(sdpa(*changed, mask)[0][:, t:], out[:, t:])


def test_the_window_is_as_wide_as_it_says() -> None:
    W, T = 4, 19
    q, k, v, _ = draw(1, T, T, 1, 1)
    v.requires_grad_()
    out = sdpa(q, k, v, Mask(window=W))[0]
    for t in range(T):
        reach = torch.autograd.grad(out[0, t].sum(), v, retain_graph=True)[0][0, :, 0, 0].nonzero().flatten()
        assert reach.tolist() == list(range(max(0, t - W + 1), t + 1))


def test_a_window_over_a_long_document_draws_one_small_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr("attention.sdpa.band", lambda T, S, *rest: drawn.append(T * S) or band(T, S, *rest))
    q, k, v, _ = draw(1, 2050, 2050, 1, 1, C=8)
    sdpa(q, k, v, Mask(window=32))
    assert drawn and max(drawn) <= 2 * 32 * 32


def test_gradients_in_fp64() -> None:
    mask = Mask(window=3, documents=Documents((5, 2, 4)))
    q, k, v = (x.double().requires_grad_() for x in draw(1, 11, 11, 2, 1, C=2)[:3])
    assert torch.autograd.gradcheck(lambda *x: sdpa(*x, mask)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: reference(*x, mask)[0], (q, k, v))


def test_uniform_documents_are_views(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = Kernel.__call__
    monkeypatch.setattr(
        Kernel, "__call__", lambda self, q, *rest, **more: seen.append(q) or plain(self, q, *rest, **more)
    )
    q, k, v, _ = draw(2, 32, 32, 2, 2)
    sdpa(q, k, v, Mask(documents=Documents((16,) * 4)))
    assert len(seen) == 1 and seen[0].data_ptr() == q.data_ptr() and seen[0].shape == (4, 16, 2, 16)
