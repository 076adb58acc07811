"""Keys and values of the tokens seen so far, for generation and evaluation.

Full layers keep every token. Window layers keep a strip of the latest: when it is full, what the window still needs
moves to its front. Every backend can read such a strip as it lies. Pages of fixed size would need a table of blocks
and kernels that follow it, and would save nothing here, where all rows of a batch are equally long.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from attention.mask import Mask
from settings import Refusal


class LayerCache(Protocol):
    """What one layer keeps of B rows of tokens, in one or more streams (B, S, ...). Holds no gradients."""

    @property
    def length(self) -> int:
        """Tokens appended so far and not trimmed: the position of the next one."""

    @property
    def num_bytes(self) -> int:
        """Memory taken, whether it is filled or not."""

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep T more tokens, (B, T, ...) of each stream; returns views (B, S, ...) of all that these tokens may see,
        themselves last. The views are true until the next call."""

    def check_trim(self, length: int) -> None:
        """Refuse a length that `trim` could not go back to."""

    def trim(self, length: int) -> None:
        """Forget every token from position `length` on."""

    def repeat(self, times: int) -> "LayerCache":
        """A copy in which each row stands `times` times, one behind the other."""


@dataclass(frozen=True)
class Room:
    """How much a cache has to hold; decided before the first token, as memory is taken once."""

    num_rows: int
    capacity: int
    """Tokens at most; window layers need less."""
    chunk: int = 64
    """Tokens that window layers take up before they move. More at once they answer, but keep only what they must."""
    reach: int = 0
    """How many tokens window layers can be trimmed by at any time; a last append of one chunk can be taken back anyway.
    """
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def layer(self, *shapes: tuple[int, ...], window: int | None = None) -> LayerCache:
        """An empty cache of one layer: a stream for each shape that one token has in it."""
        kept = 0 if window is None else window - 1 + self.reach
        length = self.capacity if window is None else min(self.capacity, kept + self.chunk)
        streams = tuple(
            torch.empty((self.num_rows, length, *shape), device=self.device, dtype=self.dtype) for shape in shapes
        )
        return WholeLayer(streams) if window is None else WindowLayer(streams, self.capacity, window, kept)


class WholeLayer:
    """Every token."""

    def __init__(self, streams: tuple[Tensor, ...], length: int = 0) -> None:
        self.streams = streams
        self.length = length

    @property
    def num_bytes(self) -> int:
        return sum(stream.nbytes for stream in self.streams)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """See LayerCache."""
        stop = _stop_after(new, self.length, self.streams[0].shape[1])
        _write(self.streams, self.length, new)
        self.length = stop
        return tuple(stream[:, :stop] for stream in self.streams)

    def check_trim(self, length: int) -> None:
        """See LayerCache."""
        if not 0 <= length <= self.length:
            raise Refusal(f"the cache holds {self.length} tokens; trim to a length from 0 to that, not {length}")

    def trim(self, length: int) -> None:
        """See LayerCache."""
        self.check_trim(length)
        self.length = length

    def repeat(self, times: int) -> "WholeLayer":
        """See LayerCache."""
        return WholeLayer(_repeat(self.streams, self.length, times), self.length)


class WindowLayer:
    """The latest tokens: as many as the window of the next one needs, and as many more as can still be trimmed."""

    def __init__(self, streams: tuple[Tensor, ...], capacity: int, window: int, kept: int) -> None:
        """kept: how many tokens outlive a move to the front, window - 1 at least."""
        self.streams = streams
        self.capacity = capacity
        self.window = window
        self.kept = kept
        self.length = 0
        self.num_held = 0

    @property
    def num_bytes(self) -> int:
        return sum(stream.nbytes for stream in self.streams)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """See LayerCache."""
        self.length = _stop_after(new, self.length, self.capacity)
        size, num_new = self.streams[0].shape[1], new[0].shape[1]
        if self.num_held + num_new > size:
            self._hold(tuple(stream[:, : self.num_held] for stream in self.streams))
        first_seen = max(0, self.num_held - (self.window - 1))
        if self.num_held + num_new > size:
            joined = tuple(
                torch.cat((stream[:, : self.num_held], part), dim=1)
                for stream, part in zip(self.streams, new, strict=True)
            )
            self._hold(joined)
            return tuple(stream[:, first_seen:] for stream in joined)
        _write(self.streams, self.num_held, new)
        self.num_held += num_new
        return tuple(stream[:, first_seen : self.num_held] for stream in self.streams)

    def check_trim(self, length: int) -> None:
        """See LayerCache."""
        if not 0 <= length <= self.length:
            raise Refusal(f"the cache holds {self.length} tokens; trim to a length from 0 to that, not {length}")
        back = self.length - length
        if self.num_held - back < min(length, self.window - 1):
            raise Refusal(
                f"a window layer cannot be trimmed from {self.length} to {length} tokens: what the window of "
                f"{self.window} needs there is gone; make the cache with reach={back}"
            )

    def trim(self, length: int) -> None:
        """See LayerCache."""
        self.check_trim(length)
        self.num_held -= self.length - length
        self.length = length

    def repeat(self, times: int) -> "WindowLayer":
        """See LayerCache."""
        copy = WindowLayer(_repeat(self.streams, self.num_held, times), self.capacity, self.window, self.kept)
        copy.length, copy.num_held = self.length, self.num_held
        return copy

    def _hold(self, streams: tuple[Tensor, ...]) -> None:
        """Keep what has to be kept of these, at the front."""
        length = streams[0].shape[1]
        self.num_held = min(length, self.kept)
        # Cloned: a tensor may not be copied onto a part of itself.
        _write(self.streams, 0, tuple(stream[:, length - self.num_held :].clone() for stream in streams))


class KVCache:
    """The caches of all layers. Use it under `torch.no_grad()`."""

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self.layers = tuple(layers)

    @property
    def length(self) -> int:
        """Tokens that every layer has seen: the position of the next one."""
        return min(layer.length for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Memory taken, whether it is filled or not."""
        return sum(layer.num_bytes for layer in self.layers)

    def layer(self, index: int) -> LayerCache:
        """The part of one layer, to be handed to its attention."""
        return self.layers[index]

    def trim(self, length: int) -> None:
        """Forget every token from position `length` on, or nothing: Refusal where a window layer kept too little."""
        for layer in self.layers:
            layer.check_trim(length)
        for layer in self.layers:
            layer.trim(length)

    def repeat(self, times: int) -> "KVCache":
        """A copy in which each row stands `times` times, one behind the other: several continuations of one prompt,
        or with 1 a snapshot."""
        return KVCache([layer.repeat(times) for layer in self.layers])

    def check(self, mask: Mask) -> None:
        """Refuse a mask that asks more than causal rows and windows: what it speaks of may be held no more."""
        for field in fields(Mask):
            value = getattr(mask, field.name)
            if field.name != "window" and value != field.default:
                raise Refusal(f"{field.name}={value} cannot be read from a cache; leave out {field.name} or the cache")


def _stop_after(new: tuple[Tensor, ...], length: int, capacity: int) -> int:
    """The length with these tokens; Refusal if there is no room for them."""
    stop = length + new[0].shape[1]
    if stop > capacity:
        raise Refusal(
            f"the cache holds {capacity} tokens and was given {stop}; make it with capacity={stop} or trim it"
        )
    if any(part.requires_grad for part in new):
        raise Refusal("the cache holds no gradients; run under torch.no_grad()")
    return stop


def _write(streams: tuple[Tensor, ...], start: int, new: tuple[Tensor, ...]) -> None:
    for stream, part in zip(streams, new, strict=True):
        stream[:, start : start + part.shape[1]] = part


def _repeat(streams: tuple[Tensor, ...], length: int, times: int) -> tuple[Tensor, ...]:
    copies = tuple(stream.new_empty((len(stream) * times, *stream.shape[1:])) for stream in streams)
    _write(copies, 0, tuple(stream[:, :length].repeat_interleave(times, dim=0) for stream in streams))
    return copies
