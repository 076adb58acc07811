"""Random numbers as a function of integers: the same wherever, whenever and in whatever order they are drawn.

A generator's state would depend on how a step is cut and on recomputation; these do not. The mixing function is the
finalizer of SplitMix64 (Steele, Lea and Flood 2014, figure 15).
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def mix(*parts: Tensor | int) -> Tensor:
    """A well-mixed int64 for each position of the broadcast int64 parts, of which at least one is a tensor."""
    state: Tensor | int = 0
    for part in parts:
        state = _finalize((state ^ part) + torch.full((), GOLDEN, dtype=torch.int64, device=_device(parts)))
    assert isinstance(state, Tensor)
    return state


def uniform(*parts: Tensor | int) -> Tensor:
    """A float32 in [0, 1) for each position of the parts."""
    return _shift(mix(*parts), 40).to(torch.float32) * 2**-24


def _finalize(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros: torch's own shift of a signed number repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _device(parts: tuple[Tensor | int, ...]) -> torch.device:
    return next(part.device for part in parts if isinstance(part, Tensor))
