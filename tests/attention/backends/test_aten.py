"""torch's CUDA operators: each call against the operator's own shapes, the arithmetic around it against stand-ins."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from attention.backends import aten, rows
from attention.backends.cudnn import Cudnn
from attention.backends.efficient import CudaEfficient, Efficient
from attention.backends.reference import Reference
from attention.backends.sdpa import CudaFlash, CudaSdpa, Sdpa
from attention.contract import Options
from attention.mask import Documents, Mask
from settings import Refusal
from tests.attention import stand_ins
from tests.attention.cases import Case, assert_like_reference, cases

INF = float("inf")


def to_meta(x: Any) -> Any:
    """As the real operator would see it on a GPU."""
    if not isinstance(x, Tensor):
        return x
    low = {torch.float64: torch.float32 if x.ndim == 3 else torch.bfloat16}
    return torch.empty_strided(x.shape, x.stride(), dtype=low.get(x.dtype, x.dtype), device="meta")


def by_rows(function: Any, *tensors: Tensor) -> list[Tensor]:
    """A function of one row each, on (B, H, T, C) and (B, H, T)."""
    parts = [
        function(*(x[row].transpose(0, 1) if x.ndim == 4 else x[row] for x in tensors))
        for row in range(len(tensors[0]))
    ]
    return [torch.stack([p.transpose(0, 1) if p.ndim == 3 else p for p in part]) for part in zip(*parts, strict=True)]


class Operators:
    """The operators, computed plainly; each call goes past the real one's check of names, order and shapes."""

    def __init__(self, lse_ndim: int = 4) -> None:
        self.lse_ndim = lse_ndim
        self.biases: list[Tensor | None] = []

    def _forward(  # noqa: PLR0917
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
    ) -> Any:
        assert q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0 and q.stride(-1) == 1
        self.biases.append(bias)
        return by_rows(
            lambda q, k, v: stand_ins.dense_forward(q, k, v, self.seen(q, k, bias, is_causal), scale), q, k, v
        )

    def _backward(self, tensors: tuple[Tensor, ...], bias: Tensor | None, is_causal: bool, scale: float) -> Any:
        def row(*parts: Tensor) -> tuple[Tensor, ...]:
            grad, q, k, v, out, lse = parts
            return stand_ins.dense_backward(grad, q, k, v, out, lse, self.seen(q, k, bias, is_causal), scale)

        return by_rows(row, *tensors)

    @staticmethod
    def seen(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
        if bias is None:
            return stand_ins.square(len(q), len(k), is_causal)
        assert not is_causal and bias.ndim == 4 and all(step % 16 == 0 for step in bias.stride()[:3])
        assert (bias[0, 0] == 0).any(1).all(), "a query that sees nothing"
        return bias[0, 0] == 0

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, wants_lse, p, is_causal, *, scale):  # type: ignore[no-untyped-def]  # noqa: PLR0917
        shapes = torch.ops.aten._scaled_dot_product_efficient_attention(
            *map(to_meta, (q, k, v, bias)), wants_lse, p, is_causal, scale=scale
        )
        assert wants_lse and not p and q.shape[1] == k.shape[1] == v.shape[1]
        out, lse = self._forward(q, k, v, bias, is_causal, scale)
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=INF)
        assert out.shape == shapes[0].shape and lse.shape == shapes[1].shape
        return out, lse, torch.empty(()), torch.empty(())

    def _scaled_dot_product_efficient_attention_backward(  # type: ignore[no-untyped-def]  # noqa: PLR0917
        self, grad, q, k, v, bias, out, lse, seed, offset, p, wanted, is_causal, *, scale
    ):
        torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            *map(to_meta, (grad, q, k, v, bias, out, lse, seed, offset)), p, wanted, is_causal, scale=scale
        )
        assert wanted == [True, True, True, False] and not p
        T = q.shape[2]
        assert lse.shape[-1] % 32 == 0 and lse.is_contiguous() and (lse[..., T:] == INF).all()
        return *self._backward((grad, q, k, v, out, lse[..., :T]), bias, is_causal, scale), None

    def _scaled_dot_product_cudnn_attention(self, q, k, v, bias, wants_lse, p, is_causal, debug, *, scale):  # type: ignore[no-untyped-def]  # noqa: PLR0917
        torch.ops.aten._scaled_dot_product_cudnn_attention(
            *map(to_meta, (q, k, v, bias)), wants_lse, p, is_causal, debug, scale=scale
        )
        assert wants_lse and not p and not debug
        out, lse = self._forward(q, k, v, bias, is_causal, scale)
        return out, lse[..., None] if self.lse_ndim == 4 else lse, None, None, 0, 0, None, None, None

    def _scaled_dot_product_cudnn_attention_backward(  # type: ignore[no-untyped-def]  # noqa: PLR0917
        self, grad, q, k, v, out, lse, seed, offset, bias, starts, key_starts, T, S, p, is_causal, *, scale
    ):
        torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *map(to_meta, (grad, q, k, v, out, lse, seed, offset, bias, starts, key_starts)), T, S, p, is_causal,
            scale=scale,
        )  # fmt: skip
        assert (q.shape[2], k.shape[2]) == (T, S) and not p and lse.ndim == self.lse_ndim and lse.is_contiguous()
        return self._backward((grad, q, k, v, out, lse.view(q.shape[:3])), bias, is_causal, scale)

    def _flash_attention_forward(self, q, k, v, starts, key_starts, T, S, p, is_causal, debug, *, scale):  # type: ignore[no-untyped-def]  # noqa: PLR0917
        shapes = torch.ops.aten._flash_attention_forward(
            *map(to_meta, (q, k, v, starts, key_starts)), T, S, p, is_causal, debug, scale=scale
        )
        assert (q.shape[1], k.shape[1]) == (T, S) and q.shape[-1] == v.shape[-1] and not p and starts is None
        out, lse = self._forward(*(x.transpose(1, 2) for x in (q, k, v)), None, is_causal, scale)
        assert out.transpose(1, 2).shape == shapes[0].shape and lse.shape == shapes[1].shape
        return out.transpose(1, 2), lse, None, None, None

    def _flash_attention_backward(  # type: ignore[no-untyped-def]  # noqa: PLR0917
        self, grad, q, k, v, out, lse, starts, key_starts, T, S, p, is_causal, seed, offset, *, scale
    ):
        torch.ops.aten._flash_attention_backward(
            *map(to_meta, (grad, q, k, v, out, lse, starts, key_starts)), T, S, p, is_causal,
            *map(to_meta, (seed, offset)), scale=scale,
        )  # fmt: skip
        assert (q.shape[1], k.shape[1]) == (T, S) and not p and lse.is_contiguous()
        tensors = (*(x.transpose(1, 2) for x in (grad, q, k, v, out)), lse)
        return tuple(x.transpose(1, 2) for x in self._backward(tensors, None, is_causal, scale))


class FlashOrEfficient(CudaSdpa):
    """Flash wherever no mask is drawn, whatever the precision."""

    def _kernel(self, q_BTHC: Tensor, bias_TS: Tensor | None) -> Any:
        return self.efficient if bias_TS is not None else self.flash


def sdpa_on_cuda() -> Sdpa:
    backend = Sdpa()
    backend._kernels["cpu"] = FlashOrEfficient()
    return backend


@pytest.mark.parametrize(("build", "lse_ndim"), [(Efficient, 4), (Cudnn, 4), (Cudnn, 3), (sdpa_on_cuda, 4)])
def test_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, build: Any, lse_ndim: int) -> None:
    operators = Operators(lse_ndim)
    monkeypatch.setattr(aten, "ops", operators)
    monkeypatch.setattr(rows, "QUERY_BLOCK", 8)
    monkeypatch.setattr(rows, "SMALLEST_TILE", 3)
    backend = build()

    @settings(max_examples=40, deadline=None)
    @given(cases())
    def check(case: Case) -> None:
        assert_like_reference(backend, replace(case, options=replace(case.options, softcap=0.0)))

    check()
    assert any(bias is None for bias in operators.biases) and any(bias is not None for bias in operators.biases)


def test_sdpa_takes_flash_where_it_can() -> None:
    kernel, bias = CudaSdpa(), torch.zeros(1, 1)
    kinds = {
        (dtype, C, given is bias): type(kernel._kernel(torch.empty(1, 1, 1, C, dtype=dtype), given))
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for C in (256, 264)
        for given in (None, bias)
    }
    flash = {key for key, kind in kinds.items() if kind is CudaFlash}
    assert flash == {(torch.bfloat16, 256, False), (torch.float16, 256, False)}
    assert {kind for key, kind in kinds.items() if key not in flash} == {CudaEfficient}
    with pytest.raises(Refusal, match="takes no float64 on CUDA"):
        kernel._kernel(torch.empty(1, 1, 1, 8, dtype=torch.float64), None)


def test_gradients_of_shared_key_heads_are_summed_in_fp32() -> None:
    ones_BSHC = torch.ones(1, 1, 512, 8, dtype=torch.bfloat16)
    assert (aten.sum_heads(ones_BSHC + 2**-7, 2) == 258.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [Sdpa, Efficient, Cudnn])
def test_on_a_gpu(build: Any, dtype: torch.dtype) -> None:
    backend, reference = build(), Reference()
    if dtype not in backend.capability.dtypes:
        pytest.skip("not its precision")
    for mask in (Mask(), Mask(is_causal=False), Mask(window=40), Mask(documents=Documents((50, 46, 96)))):
        case = Case(2, 96, 96, 2, 2, 64, 64, mask, Options())
        *inputs, grad, _ = (x.cuda() for x in case.tensors(dtype))
        out, lse = backend.forward(*inputs, mask, case.options)
        right, right_lse = reference.forward(*(x.double() for x in inputs), mask, case.options)
        plain, _ = reference.forward(*inputs, mask, case.options)
        assert (out - right).norm() <= 2 * (plain - right).norm() + 1e-5 * right.norm()
        assert (lse - right_lse).abs().max() < (1e-4 if dtype == torch.float32 else 2e-2)
        parts = backend.backward(grad, *inputs, out, lse, mask, case.options)
        wanted = reference.backward(*(x.double() for x in (grad, *inputs, right)), right_lse, mask, case.options)
        for part, wants in zip(parts, wanted, strict=True):
            assert (part - wants).norm() <= 2e-2 * wants.norm()
