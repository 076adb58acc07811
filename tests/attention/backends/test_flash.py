"""The flash libraries' calls, by stand-ins that take what each version takes, against the plain backend."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.backends import flash_libraries
from attention.backends.band import band_of
from attention.backends.flash import Flash
from attention.backends.flash_libraries import (
    LIBRARIES,
    FlashAttention2,
    FlashAttention3,
    FlashAttention4,
    Library,
    TorchFlash,
)
from attention.contract import Options
from attention.mask import Documents, Mask
from settings import Refusal
from tests.attention import stand_ins
from tests.attention.cases import Case, assert_like_reference, cases

INF = float("inf")
VERSIONS = {
    "flash-attn 2": (FlashAttention2, stand_ins.flash_attention_2, INF),
    "flash-attn 3 of 2025": (FlashAttention3, stand_ins.flash_attention_3_of_2025, -INF),
    "flash-attn 3 of 2026": (FlashAttention3, stand_ins.flash_attention_3_of_2026, -INF),
    "flash-attn 4": (FlashAttention4, stand_ins.flash_attention_4, -INF),
}


def installed(patch: pytest.MonkeyPatch, version: str) -> tuple[Flash, stand_ins.Varlen]:
    """A backend on the stand-in of this version, and what the stand-in was asked."""
    library, build, empty = VERSIONS[version]
    core = stand_ins.Varlen(empty)
    module = build(core)
    patch.setattr(flash_libraries, "import_module", lambda name: {library.module: module}[name])
    return Flash(library()), core


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 30),
    st.integers(0, 30),
    st.one_of(st.none(), st.integers(-35, 45)),
    st.one_of(st.none(), st.integers(1, 35)),
)
def test_a_band_is_what_the_mask_leaves_and_no_token_more(
    T: int, S: int, offset: int | None, window: int | None
) -> None:
    seen_TS = Mask(window=window, offset=offset).dense(1, T, S, "cpu")[0]
    band = band_of(T, S, Mask(window=window, offset=offset))
    if band is None:
        assert not seen_TS.any()
        return
    inside = seen_TS[band.queries, band.keys]
    assert torch.equal(inside, stand_ins.band(*inside.shape, band.left, band.right))
    assert inside.any(1).all() and inside.any(0).all() and inside.sum() == seen_TS.sum()


def in_reach(case: Case) -> Case:
    return replace(case, mask=replace(case.mask, prefix=0, first_tokens=0))


@pytest.mark.parametrize("version", VERSIONS)
def test_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    backend, _ = installed(monkeypatch, version)

    @settings(max_examples=60, deadline=None)
    @given(cases())
    def check(case: Case) -> None:
        assert_like_reference(backend, in_reach(case))

    check()


@pytest.mark.parametrize("version", VERSIONS)
def test_windows_are_in_the_words_of_each_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    backend, core = installed(monkeypatch, version)
    q = torch.randn(1, 6, 2, 8)
    for mask in (Mask(), Mask(is_causal=False), Mask(window=3), Mask(window=6), Mask(documents=Documents((2, 4)))):
        backend.forward(q, q, q, mask, Options())
    backend.forward(q, q, q, Mask(window=5, offset=2), Options())
    assert core.windows == [(None, 0), (None, None), (2, 0), (None, 0), (None, 0), (2, 2)]


def test_minus_one_beside_causal_is_what_makes_flash_attention_4_answer_zeros() -> None:
    core = stand_ins.Varlen(-INF)
    q, starts = torch.randn(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    out, lse, *_ = stand_ins.flash_attention_4(core)._flash_attn_fwd(
        *(q, q, q), cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=6, max_seqlen_k=6, softmax_scale=1.0,
        causal=True, window_size_left=-1, window_size_right=0, return_lse=True,
    )  # fmt: skip
    assert not out.any() and (lse == -INF).all()


def test_torch_flash_fits_the_schema_and_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    core = stand_ins.Varlen(INF)

    def _flash_attention_forward(q, k, v, *rest, **named):  # type: ignore[no-untyped-def]
        meta = [x.to("meta", torch.bfloat16) for x in (q, k, v)]
        shapes = torch.ops.aten._flash_attention_forward(*meta, *(to_meta(x) for x in rest), **named)
        starts, longest, (dropout, is_causal, debug) = rest[:2], rest[2:4], rest[4:]
        assert not dropout and not is_causal and not debug
        window = stand_ins.unbounded_is_minus_one(named["window_size_left"], named["window_size_right"], is_causal)
        out, lse = core.forward(q, k, v, starts, longest, window, named["scale"], 0.0)
        assert out.shape == shapes[0].shape and lse.shape == shapes[1].shape
        return out, lse, None, None, None

    def _flash_attention_backward(*args, **named):  # type: ignore[no-untyped-def]
        tensors, starts, longest, rest = args[:6], args[6:8], args[8:10], args[10:]
        meta = [x.to("meta", torch.bfloat16) for x in tensors[:5]] + [tensors[5].to("meta", torch.float32)]
        torch.ops.aten._flash_attention_backward(*meta, *(to_meta(x) for x in args[6:]), **named)
        assert rest[:2] == (0.0, False)
        window = stand_ins.unbounded_is_minus_one(named["window_size_left"], named["window_size_right"], False)
        return core.backward(tensors, starts, longest, window, named["scale"], 0.0)

    ops = SimpleNamespace(
        _flash_attention_forward=_flash_attention_forward, _flash_attention_backward=_flash_attention_backward
    )
    monkeypatch.setattr("attention.backends.aten.ops", ops)

    @settings(max_examples=60, deadline=None)
    @given(cases())
    def check(case: Case) -> None:
        assert_like_reference(Flash(TorchFlash()), replace(in_reach(case), options=replace(case.options, softcap=0.0)))

    check()


def to_meta(x: object) -> object:
    return x.to("meta") if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize(
    ("major", "there", "chosen"),
    [
        (9, (True, True, True), FlashAttention3),
        (9, (False, True, True), FlashAttention4),
        (9, (False, False, True), FlashAttention2),
        (9, (False, False, False), TorchFlash),
        (10, (True, True, True), FlashAttention4),
        (8, (True, False, True), FlashAttention2),
        (7, (True, True, True), None),
    ],
)
def test_the_best_library_for_the_gpu_is_taken(
    monkeypatch: pytest.MonkeyPatch, major: int, there: tuple[bool, ...], chosen: type[Library] | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    for library, is_there in zip(LIBRARIES, (*there, True), strict=True):
        monkeypatch.setattr(type(library), "is_there", lambda self, is_there=is_there: is_there)
    backend = Flash()
    assert type(backend.library) is (chosen or type(None))
    assert backend.unavailable() == (None if chosen else "needs an NVIDIA GPU of compute capability 8.0 or newer")
    assert backend.capability.softcap == (chosen not in {None, TorchFlash})


def test_a_library_that_does_not_load_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    flash_libraries.found.cache_clear()
    monkeypatch.setattr(flash_libraries, "import_module", broken)
    assert not any(library.is_there() for library in LIBRARIES[:3])
    flash_libraries.found.cache_clear()
    # flash-attn 4 alone: a package of the same name, without the modules of 2.
    monkeypatch.setattr(
        flash_libraries, "import_module", lambda name: SimpleNamespace(_flash_attn_fwd=1, _flash_attn_bwd=1)
    )
    assert [library.is_there() for library in LIBRARIES[:3]] == [False, True, False]
    flash_libraries.found.cache_clear()
    for names, is_there in (("q, k, v, window_size", False), ("q, k, v, window_size_left", True)):
        old = SimpleNamespace(_flash_attn_varlen_forward=eval(f"lambda {names}: None"))
        monkeypatch.setattr(flash_libraries, "import_module", lambda name, old=old: old)
        assert LIBRARIES[2].is_there() == is_there
        flash_libraries.found.cache_clear()
    flash_libraries.found.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_not() -> None:
    assert Flash().unavailable() == "needs an NVIDIA GPU; torch sees none here"


def test_too_wide_for_a_gradient_of_the_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = installed(monkeypatch, "flash-attn 2")
    q = torch.randn(1, 3, 1, 256)
    out, lse = backend.forward(q, q, q, Mask(), Options())
    backend.backward(out, q, q, q, out, lse, Mask(), Options())
    with pytest.raises(Refusal, match="less than 256 channels a head"):
        backend.backward(out, q, q, q, out, lse, Mask(), Options(), lse)
