"""Latent attention: its two orders agree, its cache holds the latent alone, and published models compute the same."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from attention.cache import Room
from attention.kinds import build_attention
from attention.latent import LatentAttention, LatentSettings
from attention.mask import Documents, Mask
from context.layout import Layout
from context.local_comm import LocalComm
from context.methods import Split, build_method
from context.plan import SplitMask
from context.rotary import DefaultRotary, NoRotary, YarnRotary
from context.rotation import Rotary
from context.wire import Wire

transformers = pytest.importorskip("transformers")

WIDTH, T = 24, 13
SIZES = {"num_heads": 3, "latent_rank": 10, "nope_channels": 6, "rope_channels": 4, "value_channels": 5}
# mscale of both kinds 1, as in DeepSeek-V3; 0.707 as in DeepSeek-V2-Lite, there given as attention_factor.
YARN = {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0}
SPECS = {
    "default": (DefaultRotary(base=100.0), {"rope_type": "default", "rope_theta": 100.0}),
    "yarn": (
        YarnRotary(base=100.0, original_length=16, **YARN),
        {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            **YARN,
        },
    ),
    "yarn_0.707": (
        YarnRotary(base=100.0, original_length=16, attention_factor=1.2608037774, **YARN),
        {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            **YARN,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class FarMask(Mask):
    """As of tokens on several ranks, all of which are here."""

    is_split: ClassVar[bool] = True


def make(window: int | None = None, dtype: torch.dtype = torch.float32, **changes) -> LatentAttention:
    torch.manual_seed(0)
    attention = LatentAttention(LatentSettings(**{**SIZES, **changes}), WIDTH, window=window).to(dtype)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.4)
    return attention


def rotation(first: int = 0, count: int = T, spec=SPECS["yarn"][0]):
    return Rotary(spec, SIZES["rope_channels"]).at(torch.arange(first, first + count)[None])


def some_input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, T, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("query_rank", [None, 7])
@pytest.mark.parametrize(("window", "documents"), [(None, None), (4, None), (None, (5, 8, 1, 12)), (3, (5, 8, 1, 12))])
def test_absorbed_equals_expanded_with_every_gradient(
    window: int | None, documents: tuple[int, ...] | None, query_rank: int | None
) -> None:
    attention = make(window, query_rank=query_rank)
    documents_ = None if documents is None else Documents(documents)
    upstream = torch.randn(2, T, WIDTH)
    results = []
    for mask in (Mask(documents=documents_), FarMask(documents=documents_)):
        x_BTD = some_input().requires_grad_()
        out_BTD = attention(x_BTD, rotation(), mask)
        results.append((out_BTD, *torch.autograd.grad(out_BTD, (x_BTD, *attention.parameters()), upstream)))
    assert results[0][0].std() > 0.3
    for expanded, absorbed in zip(*results, strict=True):
        assert (absorbed - expanded).norm() <= 1e-5 * expanded.norm()


@pytest.mark.parametrize("window", [None, 1, 4, 99])
@pytest.mark.parametrize("chunks", [(1,) * T, (5, 8), (6, 1, 1, 1, 4), (T,)])
@torch.no_grad()
def test_decoding_from_the_latent_equals_the_whole_forward(window: int | None, chunks: tuple[int, ...]) -> None:
    attention, x_BTD = make(window), some_input()
    whole_BTD = attention(x_BTD, rotation(), Mask())
    cache = attention.new_cache(Room(2, T, chunk=2))
    parts = [
        attention(part, rotation(cache.length, part.shape[1]), Mask(), cache) for part in x_BTD.split(chunks, dim=1)
    ]
    assert (torch.cat(parts, dim=1) - whole_BTD).abs().max() <= 1e-5
    length = T if window is None else min(T, window - 1 + 2)
    assert cache.num_bytes == 2 * length * (10 + 4) * 4, "a latent and the rotated channels of one key, for all heads"


def test_what_is_far_is_read_as_one_key_and_one_value() -> None:
    """So that ranks send the latent and not what is made of it."""
    attention, calls = make(), []
    attend = attention.attend
    attention.attend = lambda q, k, v, mask, **rest: calls.append((q, k, v)) or attend(q, k, v, mask, **rest)
    attention(some_input(), rotation(), FarMask())
    attention(some_input(), rotation(), Mask())
    with torch.no_grad():
        cache = attention.new_cache(Room(2, T))
        attention(some_input()[:, :9], rotation(0, 9), Mask(), cache)
        attention(some_input()[:, 9:], rotation(9, 4), Mask(), cache)
    shapes = [tuple(tuple(x.shape[1:]) for x in call) for call in calls]
    near = lambda T: ((T, 3, 10), (T, 3, 10), (T, 3, 5))  # noqa: E731
    far = lambda T, S: ((T, 3, 14), (S, 1, 14), (S, 1, 10))  # noqa: E731
    assert shapes == [far(T, T), near(T), near(9), far(4, T)]
    assert [Wire.of(k, v).is_latent for _, k, v in calls] == [True, False, False, True], (
        "and once, not as key and value"
    )


def test_a_layer_without_rotation_knows_no_positions_and_no_factor() -> None:
    settings = LatentSettings(**SIZES)
    torch.manual_seed(0)
    free = build_attention(settings, WIDTH, None, has_rotary=False)
    turned = build_attention(settings, WIDTH, None)
    turned.load_state_dict(free.state_dict())
    unturned = turned(some_input(), rotation(spec=NoRotary()), Mask())
    torch.testing.assert_close(free(some_input(), rotation(), Mask()), unturned)
    assert not torch.allclose(turned(some_input(), rotation(), Mask()), unturned)


def their_attention(
    ours: LatentAttention, rope_parameters: dict, is_interleaved: bool
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(DeepSeek-V3's attention with our weights, its rotary embedding)."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    settings = ours.settings
    config = transformers.DeepseekV3Config(
        hidden_size=WIDTH,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        q_lora_rank=settings.query_rank,
        kv_lora_rank=settings.latent_rank,
        qk_nope_head_dim=settings.nope_channels,
        qk_rope_head_dim=settings.rope_channels,
        v_head_dim=settings.value_channels,
        rope_parameters=rope_parameters,
        rope_interleave=is_interleaved,
        max_position_embeddings=640,
        attn_implementation="eager",
    )
    theirs = DeepseekV3Attention(config, 0)
    query, latent = ours.query.weight.detach().clone(), ours.latent.weight.detach().clone()
    if is_interleaved:
        heads = query.unflatten(0, (settings.num_heads, -1))
        heads[:, settings.nope_channels :] = interleaved(heads[:, settings.nope_channels :])
        latent[settings.latent_rank :] = interleaved(latent[None, settings.latent_rank :])[0]
    weights = {
        "kv_a_proj_with_mqa.weight": latent,
        "kv_a_layernorm.weight": ours.latent_norm.weight,
        "kv_b_proj.weight": ours.expand.weight,
        "o_proj.weight": ours.output.weight,
    }
    if settings.query_rank is None:
        weights["q_proj.weight"] = query
    else:
        weights |= {"q_a_proj.weight": ours.query_down.weight, "q_a_layernorm.weight": ours.query_norm.weight}
        weights["q_b_proj.weight"] = query
    theirs.load_state_dict(weights, strict=True)
    return theirs, DeepseekV3RotaryEmbedding(config)


def interleaved(rows_HYX: Tensor) -> Tensor:
    """Pairs of channels side by side, as published weights have them, where ours are half and half."""
    return rows_HYX.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("query_rank", "is_interleaved"), [(None, False), (7, False), (7, True)])
@pytest.mark.parametrize("mask", [Mask(), FarMask()])
def test_it_is_deepseek_v3s(name: str, query_rank: int | None, is_interleaved: bool, mask: Mask) -> None:
    spec, rope_parameters = SPECS[name]
    ours = make(query_rank=query_rank)
    theirs, their_rotary = their_attention(ours, rope_parameters, is_interleaved)
    x_BTD, positions_BT = some_input(), torch.arange(3, 3 + T)[None]
    hidden = torch.full((T, T), float("-inf")).triu(1)[None, None]
    expected_BTD, _ = theirs(x_BTD, their_rotary(x_BTD, positions_BT), hidden)
    found_BTD = ours(x_BTD, Rotary(spec, 4).at(positions_BT), mask)
    assert expected_BTD.std() > 0.3
    assert (found_BTD - expected_BTD).abs().max() <= 1e-5


@pytest.mark.parametrize("method", ["ring", "groupcast"])
@pytest.mark.parametrize(("window", "num_ranks"), [(None, 2), (5, 4)])
def test_ranks_that_share_rows_attend_as_one(method: str, window: int | None, num_ranks: int) -> None:
    """Each sees the others' latents; outputs and all gradients are those of whole rows."""
    attention, documents = make(window, query_rank=7), Documents((9, 23, 1, 4, 27))
    layout = Layout.make("zigzag", 2, 32, num_ranks, documents.lengths)
    whole = torch.randn(2, 32, WIDTH), torch.arange(32).expand(2, -1), torch.randn(2, 32, WIDTH)

    def learn(attention: LatentAttention, mask: Mask, rows: Sequence[Tensor]) -> list[Tensor]:
        x_BTD, positions_BT, upstream_BTD = rows
        x_BTD = x_BTD.clone().requires_grad_()
        out_BTD = attention(x_BTD, Rotary(SPECS["yarn"][0], 4).at(positions_BT), mask)
        return [out_BTD, *torch.autograd.grad(out_BTD, (x_BTD, *attention.parameters()), upstream_BTD)]

    def work(comm: LocalComm) -> list[Tensor]:
        mine = deepcopy(attention)
        mine.attend = Split(mine.attend, build_method(method, comm))
        mask = SplitMask(documents=documents, layout=layout)
        return learn(mine, mask, [layout.shard(x, comm.rank) for x in whole])

    out, x_gradient, *gradients = zip(*LocalComm.run(num_ranks, work), strict=True)
    found = [layout.unshard(out), layout.unshard(x_gradient), *(sum(shares) for shares in gradients)]
    for one, other in zip(found, learn(attention, Mask(documents=documents), whole), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"num_heads": 0}, {"latent_rank": 0}, {"rope_channels": 1}, {"window": 0}, {"num_kv_heads": 2}):
        with pytest.raises(ValidationError):
            LatentSettings(**{**SIZES, **wrong})
    with pytest.raises(ValidationError, match="did you mean 'sdpa'"):
        LatentSettings(**SIZES, backend="sdp")
