"""The module: decoding equals the whole forward, each setting does what it says, and what cannot be is refused."""

import pytest
import torch
from pydantic import ValidationError

from attention.attend import Kept
from attention.attention import Attention, AttentionSettings, channels_per_head
from attention.cache import Room
from attention.contract import Options
from attention.core import BACKENDS
from attention.mask import Documents, Mask
from attention.temperature import StepTemperature
from settings import Refusal

T = 13


def make(window: int | None = None, *, has_rotary: bool = True, **kwargs) -> Attention:
    torch.manual_seed(0)
    kwargs = {"num_heads": 4, "num_kv_heads": 2, "head_norms": True, **kwargs}
    attention = Attention(AttentionSettings(**kwargs), 32, window=window, has_rotary=has_rotary)
    if attention.sink_H is not None:
        torch.nn.init.normal_(attention.sink_H)
    return attention


class Turn:
    """A rotation that depends on the position, so that a wrong position shows."""

    def __init__(self, first: int = 0, count: int = T) -> None:
        self.positions_BT = torch.arange(first, first + count)[None]
        self.seen: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        angles = 0.3 * self.positions_BT[..., None, None] + torch.arange(x.shape[-1])
        return (x * torch.cos(angles)).to(x.dtype)


EXTRAS = {
    "plain": {},
    "sink": {"sink": True},
    "softcap": {"softcap": 2.0, "scale": 0.4},
    "temperature": {"temperature": StepTemperature(length=3, beta=0.5)},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("window", [None, 1, 4, 99])
@pytest.mark.parametrize("chunks", [(1,) * T, (5, 8), (6, 1, 1, 1, 4), (T,)])
def test_decoding_from_a_cache_equals_the_whole_forward(window: int | None, chunks: tuple, extra: str) -> None:
    attention, x = make(window, **EXTRAS[extra]), torch.randn(2, T, 32)
    with torch.no_grad():
        whole = attention(x, Turn(), Mask())
        cache = attention.new_cache(Room(2, T))
        parts = []
        for part in x.split(chunks, dim=1):
            parts.append(attention(part, Turn(cache.length, part.shape[1]), Mask(), cache))
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-6)
    assert cache.length == T


@pytest.mark.parametrize("name", ["sdpa", "blockwise"])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_backends_agree_through_the_module(window: int | None, sink: bool, name: str) -> None:
    fast, plain = make(window, backend=name, sink=sink), make(window, backend="reference", sink=sink)
    x, mask = torch.randn(2, 12, 32), Mask(documents=Documents((5, 7, 1, 11)))
    outs = [attention(x, Turn(count=12), mask) for attention in (fast, plain)]
    assert torch.allclose(*outs, atol=1e-6)
    for out in outs:
        out.square().sum().backward()
    assert ("sink_H" in dict(fast.named_parameters())) == sink
    for (key, a), (_, b) in zip(fast.named_parameters(), plain.named_parameters(), strict=True):
        assert b.grad.any() and ((a.grad - b.grad).norm() / b.grad.norm()) < 1e-5, key


def test_head_norms_come_before_the_rotation() -> None:
    attention, rotation = make(), Turn()
    attention(torch.randn(1, T, 32), rotation, Mask())
    assert [head.shape for head in rotation.seen] == [(1, T, 4, 8), (1, T, 2, 8)]
    for head in rotation.seen:
        assert torch.allclose(head.square().mean(-1), torch.ones(()), atol=1e-4)


def test_a_layer_without_rotation_knows_no_positions() -> None:
    attention, rotation, x = make(has_rotary=False), Turn(), torch.randn(1, T, 32)
    out = attention(x, rotation, Mask(is_causal=False))
    assert not rotation.seen
    order = torch.randperm(T)
    assert torch.allclose(attention(x[:, order], rotation, Mask(is_causal=False)), out[:, order], atol=1e-6)


def heads_of(attention: Attention, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What the module hands to what attends."""
    taken = {}

    def take(q, k, v, mask, *, sink_H=None, kept=None):
        taken.update(q=q, k=k, v=v, sink=sink_H)
        return q

    monkeypatch.setattr(attention, "attend", take)
    attention(x, Turn(), Mask())
    return taken


@pytest.mark.parametrize("where", ["everywhere", "unrotated"])
@pytest.mark.parametrize("has_rotary", [True, False])
def test_temperature_scales_queries_alone_where_it_is_set(
    where: str, has_rotary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, x = StepTemperature(length=4, beta=0.5, where=where), torch.randn(1, T, 32)
    plain = heads_of(make(has_rotary=has_rotary), x, monkeypatch)
    heads = heads_of(make(has_rotary=has_rotary, temperature=settings), x, monkeypatch)
    factor = heads["q"] / plain["q"]
    wanted = torch.ones(T)
    if where == "everywhere" or not has_rotary:
        wanted = 1 + 0.5 * torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]).float().log1p()
    assert torch.allclose(factor, wanted[None, :, None, None].expand_as(factor), atol=1e-5)
    assert torch.equal(heads["k"], plain["k"]) and torch.equal(heads["v"], plain["v"])


def test_scale_and_softcap_reach_the_scores() -> None:
    attention = make(scale=0.3, softcap=5.0)
    assert attention.attend.options == Options(0.3, 5.0)
    assert make().attend.options == Options()
    sharp = make(scale=50.0, head_norms=False)
    x = torch.randn(1, T, 32)
    assert not torch.allclose(sharp(x, Turn(), Mask()), make(head_norms=False)(x, Turn(), Mask()), atol=1e-3)


def test_a_layer_computes_once_where_its_answer_is_kept() -> None:
    attention, x, kept = make(sink=True), torch.randn(1, T, 32), Kept()
    first = attention(x, Turn(), Mask(), kept=kept)
    assert kept.out_BTHE is not None
    kept.out_BTHE.zero_()
    assert not attention(x, Turn(), Mask(), kept=kept).any() and first.any()


def test_parameters_are_plain_matrices() -> None:
    shapes = {name: tuple(p.shape) for name, p in make(channels=16, head_norms=False).named_parameters()}
    assert shapes == {
        "query.weight": (64, 32), "key.weight": (32, 32), "value.weight": (32, 32), "output.weight": (32, 64)
    }  # fmt: skip
    assert {"query_norm.weight", "key_norm.weight"} <= dict(make().named_parameters()).keys()


def test_autocast() -> None:
    attention, x = make(sink=True), torch.randn(1, T, 32)
    wanted = attention(x, Turn(), Mask())
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x, Turn(), Mask())
    assert out.dtype == torch.bfloat16
    assert ((out - wanted).norm() / wanted.norm()) < 0.03
    assert list(attention.attend.picked) == ["cpu float32: training", "cpu bfloat16: training"]


def test_start_up_can_ask_for_the_backend_of_a_layer() -> None:
    attention = make(4)
    needs = attention.training_needs("cpu", torch.float32)
    assert attention.attend.backend(needs).name == "sdpa"
    attention(torch.randn(2, 12, 32), Turn(count=12), Mask(documents=Documents((5, 7, 1, 11))))
    assert list(attention.attend.picked) == [str(needs)], "what a step then asks for"
    capped = make(backend="sdpa", softcap=1.0)
    with pytest.raises(Refusal, match="has no softcap"):
        capped.attend.backend(capped.training_needs("cpu", torch.float32))
    with pytest.raises(Refusal, match="not int64"):
        attention.attend.backend(attention.training_needs("cpu", torch.int64))


def test_settings_refuse_what_cannot_be() -> None:
    with pytest.raises(ValidationError, match="num_kv_heads=3 must divide num_heads=8; try 2 or 4"):
        AttentionSettings(num_heads=8, num_kv_heads=3)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        AttentionSettings(num_heads=8, num_kv_heads=8, window=0)
    with pytest.raises(Refusal, match="num_heads=3 must divide width=32"):
        channels_per_head(AttentionSettings(num_heads=3, num_kv_heads=3), 32)
    assert channels_per_head(AttentionSettings(num_heads=3, num_kv_heads=3, channels=5), 32) == 5
    with pytest.raises(ValidationError, match="unknown backend; did you mean 'sdpa'"):
        AttentionSettings(num_heads=8, num_kv_heads=8, backend="spda")
    with pytest.raises(ValidationError, match="greater than 0"):
        AttentionSettings(num_heads=8, num_kv_heads=8, softcap=0.0)


def test_every_backend_of_the_table_can_be_named() -> None:
    for name in ("auto", *BACKENDS):
        assert AttentionSettings(num_heads=4, num_kv_heads=4, backend=name).backend == name
