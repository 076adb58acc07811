"""xformers' two functions and its mask objects, by stand-ins that refuse what version 0.0.35 refuses."""

import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from attention.backends import xformers
from attention.backends.xformers import Xformers
from attention.mask import Mask
from tests.attention import stand_ins
from tests.attention.cases import Case, assert_like_reference, cases

INF = float("inf")


@dataclass(frozen=True)
class Blocks:
    """BlockDiagonalMask and what can be made of it: documents side by side in one row."""

    lengths: tuple[int, ...]
    left: int | None = None
    right: int | None = None

    @classmethod
    def from_seqlens(
        cls, q_seqlen: list[int], kv_seqlen: list[int] | None = None, *, device: torch.device | None = None
    ) -> "Blocks":
        assert kv_seqlen is None and device is not None, "without a device it would be the current GPU"
        return cls(tuple(q_seqlen))

    def make_causal_from_bottomright(self) -> "Blocks":
        return Blocks(self.lengths, None, 0)

    def make_local_attention_from_bottomright(self, window_size: int) -> "Blocks":
        assert window_size > 0
        return Blocks(self.lengths, window_size - 1, 0)

    def draw(self, T: int, S: int) -> Tensor:
        assert sum(self.lengths) == T == S
        return torch.block_diag(*(stand_ins.band(n, n, self.left, self.right) for n in self.lengths)).bool()


@dataclass(frozen=True)
class Local:
    """LocalAttentionFromBottomRightMask."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        assert self.window_left >= 0 and self.window_right >= 0

    def draw(self, T: int, S: int) -> Tensor:
        return stand_ins.band(T, S, self.window_left, self.window_right)


class LowerTriangular:
    """LowerTriangularFromBottomRightMask."""

    def draw(self, T: int, S: int) -> Tensor:
        return stand_ins.band(T, S, None, 0)


def draw(bias: Any, T: int, S: int) -> Tensor:
    seen = torch.ones(T, S, dtype=torch.bool) if bias is None else bias.draw(T, S)
    assert seen.any(1).all(), "a query that sees nothing"
    return seen


def check(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> None:
    assert q.ndim == 4 and q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    assert q.shape[2] == k.shape[2] == v.shape[2], "its backward pass has no grouped heads"
    assert all(x.stride(-1) == 1 for x in (q, k, v, *more))


def memory_efficient_attention_forward_requires_grad(  # noqa: PLR0917
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None, *,
    op: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check(query, key, value)
    assert op == "forward" and scale is not None and not p
    seen = draw(attn_bias, query.shape[1], key.shape[1])
    rows = [stand_ins.dense_forward(*row, seen, scale) for row in zip(query, key, value, strict=True)]
    outs, lses = zip(*rows, strict=True)
    return torch.stack(outs), torch.stack(lses)


def memory_efficient_attention_backward(  # noqa: PLR0917
    grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None,
    p: float = 0.0, scale: float | None = None, *, op: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    check(query, key, value, grad, output)
    assert op == "backward" and scale is not None and not p
    assert lse.is_contiguous() and lse.shape == (query.shape[0], query.shape[2], query.shape[1])
    seen = draw(attn_bias, query.shape[1], key.shape[1])
    tensors = (grad, query, key, value, output, lse)
    rows = [stand_ins.dense_backward(*row, seen, scale) for row in zip(*tensors, strict=True)]
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


FMHA = SimpleNamespace(
    memory_efficient_attention_forward_requires_grad=memory_efficient_attention_forward_requires_grad,
    memory_efficient_attention_backward=memory_efficient_attention_backward,
    flash=SimpleNamespace(FwOp="forward", BwOp="backward"),
    attn_bias=SimpleNamespace(
        BlockDiagonalMask=Blocks,
        LowerTriangularFromBottomRightMask=LowerTriangular,
        LocalAttentionFromBottomRightMask=Local,
    ),
)


def test_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers, "found", lambda: FMHA)

    @settings(max_examples=100, deadline=None)
    @given(cases().filter(lambda case: case.mask.key_documents is None))
    def check(case: Case) -> None:
        mask = replace(case.mask, prefix=0, first_tokens=0)
        assert_like_reference(Xformers(), replace(case, mask=mask, options=replace(case.options, softcap=0.0)))

    check()


def with_module(patch: pytest.MonkeyPatch, is_available: bool) -> None:
    xformers.found.cache_clear()
    for name in ("xformers", "xformers.ops"):
        patch.setitem(sys.modules, name, ModuleType(name))
    operator = SimpleNamespace(is_available=lambda: is_available)
    sys.modules["xformers.ops"].fmha = SimpleNamespace(flash=SimpleNamespace(FwOp=operator))


def test_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "xformers is not installed, or not for this torch"
    for is_there, is_gpu, reason in (
        (True, True, None),
        (True, False, "needs an NVIDIA GPU; torch sees none here"),
        (False, True, missing),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_gpu=is_gpu: is_gpu)
        with_module(monkeypatch, is_there)
        assert Xformers().unavailable() == reason
    xformers.found.cache_clear()
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert Xformers().unavailable() == missing
    xformers.found.cache_clear()


def test_masks_are_in_its_own_words() -> None:
    def bias(T: int, S: int, mask: Mask) -> Any:
        return xformers._bias(FMHA, mask, xformers.band_of(T, S, mask), torch.device("cpu"))

    assert bias(4, 6, Mask(is_causal=False)) is None
    assert isinstance(bias(4, 6, Mask()), LowerTriangular) and isinstance(bias(6, 4, Mask(window=9)), LowerTriangular)
    assert bias(4, 4, Mask(window=3)) == Local(2, 0)
    assert bias(4, 4, Mask(offset=2)) == Local(6, 2)
