"""What only a GPU can show: tokens so many that their addresses pass 2^31, bf16, and tiles as they are shipped."""

import pytest
import torch

pytest.importorskip("triton")

from attention.backends.reference import Reference
from attention.contract import Options
from attention.mask import Documents, Mask

pytestmark = pytest.mark.gpu


def errors(tensors, mask, keep=slice(None)):
    """Relative L2 errors of out, dq, dk and dv to the reference in fp64, of the tokens that are kept."""
    from attention.backends.triton import Triton

    ours, options, (q, k, v, grad) = Triton(), Options(), tensors
    out, lse = ours.forward(q, k, v, mask, options)
    answers = (out, *ours.backward(grad, q, k, v, out, lse, mask, options))
    own = Mask(window=mask.window)
    q, k, v, grad = (x[:, keep].double() for x in (q, k, v, grad))
    out, lse = Reference().forward(q, k, v, own, options)
    truth = (out, *Reference().backward(grad, q, k, v, out, lse, own, options))
    return [((a[:, keep].double() - b).norm() / b.norm()).item() for a, b in zip(answers, truth, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [(64, 64), (80, 48), (128, 128), (192, 128), (256, 256)])
def test_the_shipped_tiles(dtype, channels):
    torch.manual_seed(0)
    tensors = [
        torch.randn(1, 700, heads, size, device="cuda", dtype=dtype)
        for heads, size in ((8, channels[0]), (2, channels[0]), (2, channels[1]), (8, channels[1]))
    ]
    bound = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    for mask in (Mask(), Mask(window=150)):
        assert max(errors(tensors, mask)) < bound


def test_addresses_beyond_2_to_the_31():
    """A last document of 500 tokens behind a million others, at a stride of 4096."""
    length, tail = 1_048_576, 500
    q = torch.zeros(1, length, 32, 128, device="cuda", dtype=torch.bfloat16)
    k, v, grad = (torch.zeros_like(q) for _ in range(3))
    for x in (q, k, v, grad):
        x[:, -tail:].normal_()
    documents = Documents((*(1024 for _ in range((length - tail) // 1024)), (length - tail) % 1024, tail))
    assert max(errors((q, k, v, grad), Mask(documents=documents), slice(length - tail, None))) < 8e-3
