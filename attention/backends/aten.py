"""What calls of torch's fused CUDA operators have in common.

Their callers are written against the schemas of torch 2.11 and 2.13; tests hold the calls to those schemas and the
arithmetic around them to stand-ins. What they cannot see: the kernels themselves, and which head widths a GPU takes.
"""

from typing import Any

import torch
from torch import Tensor

ops: Any = torch.ops.aten

LOW_PRECISION = (torch.bfloat16, torch.float16)


def needs_gpu() -> str | None:
    """Why a CUDA kernel cannot run here, in one clause."""
    return None if torch.cuda.is_available() else "needs an NVIDIA GPU; torch sees none here"


def no_dropout(like: Tensor) -> tuple[Tensor, Tensor]:
    """The random state that a backward pass asks for; without dropout nothing depends on it, but flash reads two."""
    state = torch.zeros(2, dtype=torch.int64, device=like.device)
    return state, state


def spread(bias_TS: Tensor | None, q_BHTC: Tensor) -> Tensor | None:
    """One drawing for all rows and heads, without copying it."""
    return None if bias_TS is None else bias_TS.expand(*q_BHTC.shape[:2], *bias_TS.shape)


def repeat_heads(x_BSGC: Tensor, num_heads: int) -> Tensor:
    """Each key head as often as query heads read it."""
    return x_BSGC if x_BSGC.shape[2] == num_heads else x_BSGC.repeat_interleave(num_heads // x_BSGC.shape[2], dim=2)


def sum_heads(x_BSHC: Tensor, num_key_heads: int) -> Tensor:
    """The gradients of the copies, added up."""
    if x_BSHC.shape[2] == num_key_heads:
        return x_BSHC
    # torch adds low precision up in fp32 and rounds once.
    return x_BSHC.unflatten(2, (num_key_heads, -1)).sum(dim=3)
