"""The kernels' tests run on an NVIDIA GPU, or, where there is none, in Triton's interpreter.

The interpreter has to be chosen before triton is imported, which other tests may have done: test_interpreted.py runs
these files in a process of their own.
"""

import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_KERNELS = ["test_backend.py", "test_numbers.py", "test_tile_lists.py"]
ELSEWHERE = [
    "test_interpreted.py",
    "test_compiled.py",
    "test_gpu.py",
    "test_blocks.py",
    "test_tiles.py",
    "test_why_not.py",
]

collect_ignore = ELSEWHERE if IS_INTERPRETED else [] if torch.cuda.is_available() else ON_KERNELS

# bf16 arithmetic is wrong in the interpreter: it adds and multiplies the bits.
LOW_PRECISION = [torch.float16] if IS_INTERPRETED else [torch.float16, torch.bfloat16]


@pytest.fixture(params=LOW_PRECISION, ids=lambda dtype: str(dtype).removeprefix("torch."))
def low_precision(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def device() -> str:
    return "cpu" if IS_INTERPRETED else "cuda"


if IS_INTERPRETED:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: type, scope: object) -> None:
        """A scalar of the interpreter is an array of one element, which numpy 2.4 takes no more for a range's end."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
