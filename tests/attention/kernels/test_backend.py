"""The backend of our kernels against the reference in fp64, over every mask it claims to know."""

import pytest
import torch

pytest.importorskip("triton")

from attention.backends.reference import Reference
from attention.contract import Options
from attention.kernels import launch
from attention.kernels.tiles import Tile
from attention.mask import Documents, Mask

SMALL = dict.fromkeys(("forward", "key_gradients", "query_gradients"), Tile(16, 16, 4, 2))
"""Smaller than any problem here, so that every loop turns and every edge is cut."""
RAGGED = Documents((3, 1, 20, 16))
PLAIN = Options()

MASKS = {
    "full": (Mask(is_causal=False), (1, 19, 19)),
    "causal": (Mask(), (2, 19, 19)),
    "few queries": (Mask(), (1, 5, 40)),
    "few keys": (Mask(), (1, 40, 9)),
    "window": (Mask(window=7), (1, 37, 37)),
    "window of one": (Mask(window=1), (1, 20, 20)),
    "window past the end": (Mask(window=5, offset=30), (1, 20, 33)),
    "tile before the keys": (Mask(window=9, offset=-6), (1, 40, 20)),
    "tile that sees nothing": (Mask(offset=-50), (1, 20, 20)),
    "documents": (Mask(documents=RAGGED), (1, 40, 40)),
    "documents, full": (Mask(is_causal=False, documents=RAGGED), (1, 40, 40)),
    "documents of more keys": (
        Mask(window=6, documents=Documents((3, 17, 20)), key_documents=Documents((33, 7, 40))),
        (2, 20, 40),
    ),
    "prefix": (Mask(prefix=(2, 1, 7, 20), documents=RAGGED), (1, 40, 40)),
    "first tokens": (Mask(window=4, first_tokens=3), (1, 40, 40)),
    "all at once": (Mask(window=4, first_tokens=2, prefix=5, documents=RAGGED), (1, 40, 40)),
}
HEADS = {"one each": (2, 2), "three to one": (3, 1), "four to two": (4, 2)}


def tensors(shape, heads, channels, dtype=torch.float32, device="cpu"):
    """(grad, q, k, v, grad_lse) from N(0, 1)."""
    torch.manual_seed(0)
    (B, T, S), (H, G), (C, E) = shape, heads, channels
    sizes = ((B, T, H, E), (B, T, H, C), (B, S, G, C), (B, S, G, E))
    return *(torch.randn(size).to(device, dtype) for size in sizes), torch.randn(B, H, T, device=device)


def both_ways(backend, inputs, mask, options):
    """(out, lse, dq, dk, dv) of a backend: `launch` or the reference."""
    grad, q, k, v, grad_lse = inputs
    own = (SMALL,) if backend is launch else ()
    out, lse = backend.forward(q, k, v, mask, options, *own)
    return out, lse, *backend.backward(grad, q, k, v, out, lse, mask, options, grad_lse, *own)


def check(inputs, mask, options=PLAIN, out=2e-6, grads=1e-5):
    ours = both_ways(launch, inputs, mask, options)
    truth = both_ways(Reference(), [x.double() for x in inputs], mask, options)
    for mine, exact, atol in zip(ours, truth, (out, out, grads, grads, grads), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=atol)  # -inf equals -inf
    return ours


@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name, device):
    mask, shape = MASKS[name]
    check(tensors(shape, (4, 2), (16, 16), device=device), mask)


@pytest.mark.parametrize("name", HEADS)
def test_query_heads_that_share_a_key_head(name, device):
    check(tensors((2, 11, 11), HEADS[name], (16, 16), device=device), Mask(window=6))


@pytest.mark.parametrize("channels", [(16, 24), (24, 16), (3, 1), (40, 33)])
def test_heads_of_any_width(channels, device):
    check(tensors((1, 18, 18), (2, 1), channels, device=device), Mask())


@pytest.mark.parametrize("name", ["causal", "all at once"])
def test_softcap(name, device):
    mask, shape = MASKS[name]
    check(tensors(shape, (2, 1), (16, 16), device=device), mask, Options(softcap=1.5, scale=0.7))


def test_a_mask_that_is_seen_in_part_only_where_it_has_to_be(device):
    """Whole blocks are not masked, others are: with NaN in every key that nobody sees, nothing becomes NaN."""
    inputs = tensors((1, 40, 40), (2, 1), (16, 16), device=device)
    for x in inputs[2:4]:
        x[:, 24:] = torch.nan
    documents = Documents((24, 16))
    out, lse, dq, dk, dv = both_ways(launch, inputs, Mask(documents=documents), Options())
    for x in (out, dq, dk, dv):
        assert x[:, :24].isfinite().all() and x[:, 24:].isnan().all()
    assert lse[..., :24].isfinite().all()


def test_no_queries_no_keys_no_rows(device):
    for shape in ((1, 0, 5), (1, 5, 0), (0, 5, 5)):
        out, lse, *_ = check(tensors(shape, (2, 1), (16, 16), device=device), Mask())
        assert not out.any() and (lse == -torch.inf).all()


def test_views_of_one_tensor_need_no_copy(device):
    torch.manual_seed(0)
    qkv = torch.randn(2, 12, 8, 16, device=device)
    q, k, v = qkv.split((4, 2, 2), dim=2)
    inputs = (torch.randn(2, 4, 12, 16, device=device).transpose(1, 2), q, k, v, torch.randn(2, 4, 12, device=device))
    strided = check(inputs, Mask())
    packed = check([x.contiguous() for x in inputs], Mask())
    assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))


def test_channels_that_do_not_stand_side_by_side(device):
    inputs = tensors((1, 20, 20), (2, 1), (16, 16), device=device)
    check([x.transpose(1, -1).contiguous().transpose(1, -1) for x in inputs], Mask())


def test_gradients_of_a_part_of_a_larger_softmax(device):
    """Two tiles and a sink, merged outside; the backward of each takes the merged out and log-sum-exp."""
    grad, q, k, v, _ = tensors((1, 20, 33), (4, 2), (16, 16), device=device)
    sink_H, tiles = torch.randn(4, device=device), ((slice(0, 13), 0), (slice(13, 33), 13))
    whole = Mask(offset=15)

    def merged(backend, inputs, tiles, own):
        q, k, v, sink_H = inputs
        masks = [Mask(offset=15 - first) for _, first in tiles]
        parts = [
            backend.forward(q, k[:, keys], v[:, keys], mask, Options(is_partial=True), *own)
            for (keys, _), mask in zip(tiles, masks, strict=True)
        ]
        scores = [lse for _, lse in parts] + [sink_H[:, None].expand_as(parts[0][1])]
        lse = torch.stack(scores).logsumexp(0)
        out = sum(part * (own_lse - lse).exp().transpose(1, 2)[..., None] for part, own_lse in parts)
        return out, lse, masks

    out, lse, masks = merged(launch, (q, k, v, sink_H), tiles, (SMALL,))
    parts = [
        launch.backward(grad, q, k[:, keys], v[:, keys], out, lse, mask, Options(is_partial=True), None, SMALL)
        for (keys, _), mask in zip(tiles, masks, strict=True)
    ]
    exact = [x.double() for x in (q, k, v, sink_H)]
    true_out, true_lse, _ = merged(Reference(), exact, ((slice(0, 33), 0),), ())
    truth = Reference().backward(grad.double(), *exact[:3], true_out, true_lse, whole, Options())
    torch.testing.assert_close(out.double(), true_out, rtol=0, atol=2e-6)
    ours = (sum(part[0] for part in parts), *(torch.cat([p[i] for p in parts], 1) for i in (1, 2)))
    for mine, theirs in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-5)
