"""The module and its cache: decoding equals the whole forward, settings refuse what cannot be."""

import pytest
import torch
from pydantic import ValidationError

from attention.attention import Attention, AttentionSettings, channels_per_head
from attention.cache import KVCache
from attention.mask import Documents, Mask
from settings import Refusal

T = 13


def make(window: int | None = None, **kwargs) -> Attention:
    torch.manual_seed(0)
    kwargs = {"num_heads": 4, "num_kv_heads": 2, "head_norms": True, **kwargs}
    return Attention(AttentionSettings(**kwargs), 32, window=window)


def turn_by(first: int):
    """A rotation that depends on the position, so that a wrong position shows."""

    def rotation(x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(first, first + x.shape[1])[None, :, None, None]
        return x * torch.cos(0.3 * positions + torch.arange(x.shape[-1]))

    return rotation


@pytest.mark.parametrize("window", [None, 1, 4, 99])
@pytest.mark.parametrize("chunks", [(1,) * T, (5, 8), (6, 1, 1, 1, 4), (T,)])
def test_decoding_from_a_cache_equals_the_whole_forward(window: int | None, chunks: tuple[int, ...]) -> None:
    attention, x = make(window), torch.randn(2, T, 32)
    with torch.no_grad():
        whole = attention(x, turn_by(0), Mask())
        cache = KVCache(3, 2, T, 2, 8)
        parts = []
        for part in x.split(chunks, dim=1):
            parts.append(attention(part, turn_by(cache.lengths[1]), Mask(), cache.layer(1)))
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-6)
    assert cache.lengths == [0, T, 0] and cache.length == 0


def test_trimmed_cache_goes_on_from_there() -> None:
    attention, x = make(), torch.randn(1, T, 32)
    cache = KVCache(1, 1, T + 2, 2, 8)
    with torch.no_grad():
        whole = attention(x, turn_by(0), Mask())
        attention(torch.cat((x[:, :6], torch.randn(1, 4, 32)), dim=1), turn_by(0), Mask(), cache.layer(0))
        cache.trim(6)
        rest = attention(x[:, 6:], turn_by(6), Mask(), cache.layer(0))
    assert cache.length == T
    assert torch.allclose(rest, whole[:, 6:], atol=1e-6)


def test_cache_refusals() -> None:
    cache = KVCache(2, 1, 4, 1, 2)
    with pytest.raises(Refusal, match="holds 4 tokens and was given 5"):
        cache.append(0, torch.zeros(1, 5, 1, 2), torch.zeros(1, 5, 1, 2))
    with pytest.raises(Refusal, match="no_grad"):
        cache.append(0, torch.zeros(1, 1, 1, 2, requires_grad=True), torch.zeros(1, 1, 1, 2))
    cache.append(0, torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2))
    with pytest.raises(Refusal, match="from 0 to 0, not 1"):
        cache.trim(1)
    with pytest.raises(Refusal, match="not -1"):
        cache.trim(-1)


@pytest.mark.parametrize("window", [None, 4])
def test_backends_agree_through_the_module(window: int | None) -> None:
    fast, plain = make(window, backend="sdpa"), make(window, backend="reference")
    x, mask = torch.randn(2, 12, 32), Mask(documents=Documents((5, 7, 1, 11)))
    outs = [attention(x, turn_by(0), mask) for attention in (fast, plain)]
    assert torch.allclose(*outs, atol=1e-6)
    for out in outs:
        out.square().sum().backward()
    for (name, a), (_, b) in zip(fast.named_parameters(), plain.named_parameters(), strict=True):
        assert ((a.grad - b.grad).norm() / b.grad.norm()) < 1e-5, name


def test_head_norms_come_before_the_rotation() -> None:
    attention = make()
    heads = []
    attention(torch.randn(1, 4, 32), lambda x: heads.append(x) or x, Mask())
    assert [head.shape for head in heads] == [(1, 4, 4, 8), (1, 4, 2, 8)]
    for head in heads:
        assert torch.allclose(head.square().mean(-1), torch.ones(()), atol=1e-4)


def test_parameters_are_plain_matrices() -> None:
    shapes = {name: tuple(p.shape) for name, p in make(channels=16, head_norms=False).named_parameters()}
    assert shapes == {
        "query.weight": (64, 32), "key.weight": (32, 32), "value.weight": (32, 32), "output.weight": (32, 64)
    }  # fmt: skip
    assert {"query_norm.weight", "key_norm.weight"} <= dict(make().named_parameters()).keys()


def test_autocast() -> None:
    attention, x = make(), torch.randn(1, 8, 32)
    wanted = attention(x, turn_by(0), Mask())
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x, lambda h: turn_by(0)(h).to(h.dtype), Mask())
    assert out.dtype == torch.bfloat16
    assert ((out - wanted).norm() / wanted.norm()) < 0.03


def test_backend_is_chosen_once() -> None:
    attention = make()
    assert attention.backend(torch.zeros(1)) is attention.backend(torch.zeros(2))
    assert attention.backend(torch.zeros(1)).name == "sdpa"
    with pytest.raises(Refusal, match="not int64"):
        attention.backend(torch.zeros(1, dtype=torch.int64))


def test_settings_refuse_what_cannot_be() -> None:
    with pytest.raises(ValidationError, match="num_kv_heads=3 must divide num_heads=8; try 2 or 4"):
        AttentionSettings(num_heads=8, num_kv_heads=3)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        AttentionSettings(num_heads=8, num_kv_heads=8, window=0)
    with pytest.raises(Refusal, match="num_heads=3 must divide width=32"):
        channels_per_head(AttentionSettings(num_heads=3, num_kv_heads=3), 32)
    assert channels_per_head(AttentionSettings(num_heads=3, num_kv_heads=3, channels=5), 32) == 5
