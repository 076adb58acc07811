"""Parts of a softmax join to the whole, values that are keys travel once, and heads are shared out evenly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from context.heads import check_heads, fits, largest_group, share
from context.tiles import merge
from context.wire import Wire
from settings import Refusal


@pytest.mark.parametrize(("num_parts", "tolerance"), [(2, 1e-6), (512, 1e-5)])
def test_parts_join_to_the_softmax_of_all(num_parts: int, tolerance: float) -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(1, 3, 50, num_parts) * 4, torch.randn(num_parts, 4)
    whole = torch.einsum("bhts,se->bthe", scores.double().softmax(-1), values.double())
    out, lse = values[0].expand(1, 50, 3, 4).clone(), scores[..., 0].clone()
    for part in range(1, num_parts):
        merge(out, lse, values[part].expand(1, 50, 3, 4), scores[..., part])
    assert (out - whole).abs().max() < tolerance
    # A sum of so many rounded logarithms; out does not suffer from it as much.
    assert (lse - scores.double().logsumexp(-1)).abs().max() < 5 * tolerance


@pytest.mark.parametrize("left", [-math.inf, -200.0, 0.0, 200.0])
@pytest.mark.parametrize("right", [-math.inf, -200.0, 0.0, 200.0])
def test_any_two_parts_join_to_numbers(left: float, right: float) -> None:
    out, lse = torch.full((1, 2, 1, 3), 0.0 if left == -math.inf else 1.0), torch.full((1, 1, 2), left)
    part = torch.full((1, 2, 1, 3), 0.0 if right == -math.inf else 2.0)
    merge(out, lse, part, torch.full((1, 1, 2), right))
    total = torch.tensor([left, right]).double().logsumexp(0)
    weights = [0.0 if side == -math.inf else math.exp(side - total) for side in (left, right)]
    assert torch.allclose(out, torch.full_like(out, weights[0] + 2 * weights[1]))
    assert torch.allclose(lse, total.float().expand(1, 1, 2))


def test_a_merge_into_some_queries_leaves_the_others() -> None:
    out, lse = torch.randn(1, 6, 2, 3), torch.randn(1, 2, 6)
    before, lse_before = out.clone(), lse.clone()
    merge(out[:, 2:4], lse[..., 2:4], torch.randn(1, 2, 2, 3), torch.randn(1, 2, 2))
    changed = (out != before).any(-1).any(-1)[0]
    assert changed.tolist() == [False, False, True, True, False, False]
    assert (lse != lse_before)[0, 0].tolist() == changed.tolist()


def test_values_that_are_the_keys_first_channels_are_not_sent_beside_them() -> None:
    k = torch.randn(2, 3, 1, 8)
    v = k[..., :6]
    latent, wire = Wire.of(k, v), Wire.of(k, v.clone())
    assert (latent.channels, wire.channels) == (8, 14)
    assert len(latent.parts(k, v)) == 1 and len(wire.parts(k, v)) == 2
    for way in (latent, wire):
        packed = way.pack(k, v)
        assert packed.shape[-1] == way.channels
        for keys, values in (way.unpack(packed), way.whole(way.parts(k, v))):
            assert torch.equal(keys, k) and torch.equal(values, v)


@pytest.mark.parametrize(
    "values",
    [
        lambda k: k[..., 2:],  # not the first
        lambda k: k[:, 1:, :, :6],  # of other tokens
        lambda k: k.transpose(0, 1)[..., :6],
        lambda k: torch.randn(2, 2, 1, 6),
        lambda k: k.view(torch.int32)[..., :6],
    ],
)
def test_other_values_travel(values) -> None:
    k = torch.randn(2, 2, 1, 8)
    assert not Wire.of(k, values(k)).is_latent


def test_wider_values_travel_even_where_they_begin_with_the_keys() -> None:
    v = torch.randn(2, 2, 1, 8)
    assert not Wire.of(v[..., :6], v).is_latent


def test_gradients_of_a_latent_land_in_one_place_and_count_once() -> None:
    k, v = torch.randn(2, 1, 8), torch.randn(2, 1, 6)
    grad_k, grad_v = torch.randn(2, 1, 8), torch.randn(2, 1, 6)
    both, latent = Wire.of(k, v), Wire.of(k, k[..., :6])
    for wire, expected in ((both, grad_k), (latent, grad_k + torch.nn.functional.pad(grad_v, (0, 2)))):
        room = torch.zeros(2, 1, wire.channels)
        for total, one in zip(wire.unpack(room), (grad_k, grad_v), strict=True):
            total += one
        of_k, of_v = wire.gradients(*wire.unpack(room))
        assert torch.equal(of_k, expected)
        assert torch.equal(of_v, grad_v if wire is both else torch.zeros_like(grad_v))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 12))
def test_every_rank_has_the_key_heads_of_its_query_heads(G: int, group: int, size: int) -> None:
    H = G * group
    if not fits(H, G, size):
        return
    for rank in range(size):
        queries, keys = range(H)[share(H, size, rank)], range(G)[share(G, size, rank)]
        assert len(queries) == H // size
        assert sorted({head // group for head in queries}) == list(keys)
        # Heads of a rank still read one key head after another, each as many.
        assert [head // group - keys[0] for head in queries] == [
            i // (len(queries) // len(keys)) for i in range(H // size)
        ]
    assert sorted({head for rank in range(size) for head in range(H)[share(H, size, rank)]}) == list(range(H))


def test_heads_that_cannot_be_shared_are_refused_with_what_can() -> None:
    for H, G, size in ((8, 2, 8), (8, 2, 4), (8, 2, 2), (8, 8, 8), (6, 3, 3), (8, 1, 8)):
        check_heads(H, G, size)
    for H, G, size, way_out in ((8, 2, 3, "2 or 4"), (12, 4, 6, "2 or 4"), (12, 4, 3, "2 or 4"), (4, 4, 8, "2 or 4")):
        with pytest.raises(Refusal, match=f"{size} ranks .* {H} query heads and {G} key heads; use {way_out} ranks"):
            check_heads(H, G, size)


def test_the_largest_group_that_the_heads_and_ranks_allow() -> None:
    assert [largest_group(8, 2, 8, at_most) for at_most in (None, 16, 8, 7, 4, 3, 2, 1)] == [8, 8, 8, 4, 4, 2, 2, 1]
    assert [largest_group(8, 2, ranks) for ranks in (1, 2, 3, 4, 6, 8, 16)] == [1, 2, 1, 4, 2, 8, 8]
    assert [largest_group(12, 4, 12, at_most) for at_most in (None, 11, 6, 3)] == [12, 4, 4, 2]
