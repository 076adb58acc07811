"""attention(): FlashAttention's layouts and meanings, empty documents, and what does not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.attend import attend
from attention.backends.reference import Reference
from attention.contract import Options
from attention.function import attention
from attention.mask import Documents, Mask
from settings import Refusal


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def test_rows_and_packed_are_the_same() -> None:
    q, k, v = draw((1, 7, 4, 8), (1, 9, 2, 8), (1, 9, 2, 5))
    out, lse = attention(q, k, v, return_lse=True)
    packed, packed_lse = attention(q[0], k[0], v[0], return_lse=True)
    assert out.shape == (1, 7, 4, 5) and lse.shape == (1, 4, 7) and packed_lse.shape == (4, 7)
    assert torch.equal(packed, out[0]) and torch.equal(packed_lse, lse[0])
    only = attention(q, k, v)
    assert isinstance(only, Tensor) and torch.equal(only, out)


def test_arguments_mean_what_the_options_say() -> None:
    q, k, v, sink = draw((2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8), (4,))
    got = attention(q, k, v, Mask(window=3), sink=sink, scale=0.2, softcap=1.5, return_lse=True)
    wanted = attend(Reference(), q, k, v, Mask(window=3), Options(0.2, 1.5), sink_H=sink)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    with pytest.raises(Refusal, match="'sdpa': has no softcap"):
        attention(q, k, v, softcap=1.5, backend="sdpa")
    gradients = torch.autograd.grad(got[0].sum() + got[1].sum(), (q, k, v, sink))
    assert all(gradient.any() for gradient in gradients)


def test_decoding_ends_at_the_last_key() -> None:
    """FlashAttention 2.1: a causal mask of 2 queries over 5 keys hides the last key from the first query."""
    q, k, v = draw((1, 2, 1, 4), (1, 5, 1, 4), (1, 5, 1, 4))
    first = attention(q[:, :1], k[:, :4], v[:, :4], Mask(is_causal=False))
    last = attention(q[:, 1:], k, v, Mask(is_causal=False))
    assert torch.allclose(attention(q, k, v), torch.cat([first, last], 1), atol=1e-12)


lengths = st.lists(st.tuples(st.sampled_from([0, 0, 1, 2, 5]), st.sampled_from([0, 1, 3, 6])), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(lengths, st.booleans(), st.booleans())
def test_documents_one_by_one(pairs: list[tuple[int, int]], has_sink: bool, has_prefixes: bool) -> None:
    """Whatever is empty: what a document answers is what it answers alone, gradients too."""
    T, S = (sum(side) for side in zip(*pairs, strict=True))
    q, k, v, sink = draw((T, 2, 4), (S, 1, 4), (S, 1, 4), (2,))
    leaves = [q, k, v, sink] if has_sink else [q, k, v]
    starts = [torch.tensor([0, *side]).cumsum(0) for side in zip(*pairs, strict=True)]
    prefixes = tuple(range(len(pairs))) if has_prefixes else 0
    out, lse = attention(
        q, k, v, Mask(prefix=prefixes), cu_seqlens=starts[0].int(), key_cu_seqlens=starts[1].tolist(),
        sink=sink if has_sink else None, return_lse=True,
    )  # fmt: skip
    assert out.shape == (T, 2, 4) and lse.shape == (2, T)
    total = wanted = torch.zeros((), dtype=torch.float64)
    for number, (t, s) in enumerate(pairs):
        rows, keys = slice(starts[0][number], starts[0][number] + t), slice(starts[1][number], starts[1][number] + s)
        part, part_lse = attend(
            Reference(), q[None, rows], k[None, keys], v[None, keys], Mask(prefix=number if has_prefixes else 0),
            sink_H=sink if has_sink else None, needs_lse_gradient=True,
        )  # fmt: skip
        assert torch.allclose(out[rows], part[0], atol=1e-12) and torch.allclose(lse[:, rows], part_lse[0], atol=1e-12)
        is_seen = part_lse[0] > float("-inf")
        total = total + out[rows].sin().sum() + lse[:, rows][is_seen].sin().sum()
        wanted = wanted + part.sin().sum() + part_lse[0][is_seen].sin().sum()
    if not T:
        return
    for a, b in zip(*(torch.autograd.grad(x, leaves, materialize_grads=True) for x in (total, wanted)), strict=True):
        assert torch.allclose(a, b, atol=1e-11)
    plain = attention(
        q, k, v, Mask(prefix=prefixes), cu_seqlens=starts[0], key_cu_seqlens=starts[1], sink=sink if has_sink else None
    )
    assert isinstance(plain, Tensor) and torch.allclose(plain, out, atol=1e-12)


def test_documents_of_rows() -> None:
    q, k, v = draw(*[(2, 6, 2, 4)] * 3)
    wanted = attention(q, k, v, Mask(documents=Documents((2, 4, 6))))
    assert isinstance(wanted, Tensor)
    assert torch.equal(attention(q, k, v, cu_seqlens=[0, 2, 2, 6, 12, 12]), wanted)
    flat = attention(*(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens=torch.tensor([0, 2, 6, 12]))
    assert torch.allclose(flat, wanted.flatten(0, 1), atol=1e-12)
    # Keys that no document has are nobody's: with two rows and a document without queries too.
    out = attention(q, k, v, cu_seqlens=[0, 2, 2, 12], key_cu_seqlens=[0, 2, 6, 12])
    assert torch.allclose(out[:, :2][0], wanted[0, :2], atol=1e-12)


Q, K = torch.zeros(2, 6, 4, 8), torch.zeros(2, 9, 2, 8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: attention(Q[0, 0], K, K), r"give \(B, T, H, C\), or \(T, H, C\)"),
        (lambda: attention(Q, K[0], K[0]), r"give \(B, T, H, C\), or \(T, H, C\)"),
        (lambda: attention(Q, K, K[:, 1:]), "k and v must agree"),
        (lambda: attention(Q, K[..., 1:], K), "q and k in rows and channels"),
        (lambda: attention(Q[:1], K, K), "q and k in rows and channels"),
        (lambda: attention(Q[:, :, :3], K, K), "key heads must divide"),
        (lambda: attention(Q, K, K.double()), "float32, torch.float32 and torch.float64"),
        (lambda: attention(Q, K, K, sink=torch.zeros(2)), r"sink has shape \(2,\); one score for each of the 4"),
        (lambda: attention(Q, K, K, backend="flsh"), "unknown backend"),
        (lambda: attention(Q, Q, Q, cu_seqlens=[0, 5]), "ends at 5, but there are 2 x 6 tokens"),
        (lambda: attention(Q, Q, Q, cu_seqlens=[1, 12]), "give 0, then where each document ends"),
        (lambda: attention(Q, Q, Q, cu_seqlens=[0, 8, 6, 12]), "none before the one before"),
        (lambda: attention(Q, Q, Q, cu_seqlens=[0, 8, 12]), "crosses the end of row 0"),
        (lambda: attention(Q, K, K, key_cu_seqlens=[0, 18]), "give that too"),
        (lambda: attention(Q, K, K, cu_seqlens=[0, 12], key_cu_seqlens=[0, 9, 18]), "1 documents and key_cu_seqlens 2"),
        (lambda: attention(Q, Q, Q, Mask(offset=0), cu_seqlens=[0, 12]), "takes the place of documents and offset"),
        (lambda: attention(Q, Q, Q, Mask(prefix=(1,)), cu_seqlens=[0, 6, 12]), "1 numbers for 2 documents"),
    ],
)  # fmt: skip
def test_refusals(call, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        call()
