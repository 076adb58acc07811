"""Many parts in one launch are what the backend gives for each of them, and their gradients add up."""

from collections import namedtuple

import pytest
import torch

pytest.importorskip("triton")

from attention.contract import Options
from attention.kernels import launch, parts
from attention.kernels.tiles import Tile
from attention.mask import Documents, Mask
from settings import Refusal

SMALL = dict.fromkeys(("forward", "key_gradients", "query_gradients"), Tile(16, 16, 4, 2))
Part = namedtuple("Part", "queries keys mask")
FULL = Mask(is_causal=False)
PARTS = [
    Part(slice(3, 20), slice(0, 9), FULL),
    Part(slice(3, 12), slice(9, 30), Mask(window=11, offset=14)),
    Part(slice(20, 24), slice(4, 9), FULL),  # keys of the first part once more
    Part(slice(5, 12), slice(30, 33), Mask(window=11, offset=2)),  # queries of the second once more
]
OPTIONS = Options(is_partial=True)


@pytest.fixture
def tensors(device):
    torch.manual_seed(0)
    sizes = ((1, 24, 4, 16), (1, 24, 4, 16), (1, 33, 2, 16), (1, 33, 2, 16), (1, 24, 4, 16), (1, 4, 24))
    return [torch.randn(size, device=device) for size in sizes]


def test_each_part_is_what_the_backend_gives_for_it(tensors):
    _, q, k, v, *_ = tensors
    together = parts.forward_parts(q, k, v, PARTS, OPTIONS, SMALL)
    assert len(together) == len(PARTS)
    for part, (out, lse) in zip(PARTS, together, strict=True):
        arguments = (q[:, part.queries], k[:, part.keys], v[:, part.keys], part.mask, OPTIONS, SMALL)
        alone_out, alone_lse = launch.forward(*arguments)
        assert torch.equal(out, alone_out) and torch.equal(lse, alone_lse)


def test_gradients_add_up(tensors):
    grad, q, k, v, out, lse = tensors
    together = parts.backward_parts(grad, q, k, v, out, lse, PARTS, OPTIONS, -lse, SMALL)
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    for part in PARTS:
        pieces = launch.backward(
            *(x[:, part.queries] for x in (grad, q)),
            *(x[:, part.keys] for x in (k, v)),
            out[:, part.queries],
            lse[..., part.queries],
            part.mask,
            OPTIONS,
            -lse[..., part.queries],
            SMALL,
        )
        for total, piece, where in zip(sums, pieces, (part.queries, part.keys, part.keys), strict=True):
            total[:, where] += piece
    for ours, expected in zip(together, sums, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_one_launch_for_each_kind_of_mask(tensors, monkeypatch):
    works = []
    monkeypatch.setattr(launch.Call, "forward", lambda call, work, queries: (works.append(work), Stop())[1])
    with pytest.raises(TypeError):  # a Stop is no pair
        parts.forward_parts(*tensors[1:4], PARTS[::2], OPTIONS)
    assert len(works) == 1 and len(works[0].parts) == 2


class Stop:
    pass


def test_no_parts(tensors):
    _, q, k, v, *_ = tensors
    assert parts.forward_parts(q, k, v, [], OPTIONS, SMALL) == []
    assert not any(x.any() for x in parts.backward_parts(*tensors, [], OPTIONS, None, SMALL))


def test_documents_are_refused(tensors):
    part = Part(slice(0, 4), slice(0, 4), Mask(documents=Documents((4,))))
    with pytest.raises(Refusal, match="no documents"):
        parts.forward_parts(*tensors[1:4], [part], OPTIONS, SMALL)
