"""How far a rotation can tell near from far: notes for a person, never a reason to refuse."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from context.frequencies import frequencies, turned_channels
from context.rotary import AnyRotary, RotarySpec, by_view

CHUNK = 65_536
"""Distances that are looked at together."""
FARTHEST = 1 << 22
"""Distances that are looked at in all: seconds of work, and farther than rows are."""


def liking(speeds_P: Tensor, distances_N: Tensor) -> Tensor:
    """B(m) = sum_i cos(m w_i), fp64 (N,): how much more a key like the query is liked than any other, at distance m.

    Base of RoPE Bounds Context Length (arXiv 2405.14591), section 4: what ought not to be negative.
    """
    return (distances_N.double()[:, None] * speeds_P.double()).cos().sum(dim=1)


def first_distance_disliked(speeds_P: Tensor, length: int) -> int | None:
    """The least distance below `length` and `FARTHEST` at which B(m) is negative; None: there is none."""
    length = min(length, FARTHEST)
    for start in range(0, length, CHUNK):
        distances_N = torch.arange(start, min(start + CHUNK, length))
        below = (liking(speeds_P, distances_N) < 0).nonzero()
        if len(below):
            return start + int(below[0])
    return None


def critical_channels(base: float, channels: int, length: int) -> int:
    """Channels whose pairs made a whole turn within `length` tokens: LongRoPE2's d_tcd (arXiv 2502.20082, sec. 3)."""
    return 2 * math.ceil(channels / 2 * math.log(length / (2 * math.pi), base))


def notes(rotary: AnyRotary, channels: int, length: int) -> Iterator[str]:
    """What is worth knowing of a stage's rotation before it is paid for, one line each."""
    views = by_view(rotary)
    for view, spec in views.items():
        where = f"{view} layers: " if views["full"] != views["window"] else ""
        if view == "full" or where:
            yield from (f"{where}{note}" for note in _notes(spec, channels, length))


def _notes(spec: RotarySpec, channels: int, length: int) -> Iterator[str]:
    distance = first_distance_disliked(frequencies(spec, channels)[0], length)
    if distance is not None:
        yield (
            f"at distance {distance:,} of {length:,} a key like the query is for the first time liked less than others "
            "(the sum of cosines is below 0, arXiv 2405.14591); a larger base mostly reaches farther"
        )
    original = getattr(spec, "original_length", None)
    if original is not None and spec.kind != "none":
        turned = turned_channels(spec, channels)
        whole = min(turned, max(0, critical_channels(spec.base, turned, original))) // 2
        yield f"{turned // 2 - whole} of {turned // 2} pairs made no whole turn within the original {original:,} tokens"
