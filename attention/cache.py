"""Keys and values of the tokens seen so far, for generation and evaluation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from settings import Refusal


class KVCache:
    """Room for `capacity` tokens a layer, taken once. Holds no gradients: use it under `torch.no_grad()`."""

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        capacity: int,
        num_kv_heads: int,
        channels: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (num_layers, num_rows, capacity, num_kv_heads, channels)
        self.keys_LBSGC = torch.empty(shape, device=device, dtype=dtype)
        self.values_LBSGC = torch.empty(shape, device=device, dtype=dtype)
        self.lengths = [0] * num_layers

    @property
    def capacity(self) -> int:
        return self.keys_LBSGC.shape[2]

    @property
    def length(self) -> int:
        """Tokens that every layer holds: the position of the next token."""
        return min(self.lengths)

    def append(self, layer: int, k_BTGC: Tensor, v_BTGC: Tensor) -> tuple[Tensor, Tensor]:
        """Keep T more tokens of one layer; returns views of all its keys and values so far, (B, S, G, C)."""
        start = self.lengths[layer]
        stop = start + k_BTGC.shape[1]
        if stop > self.capacity:
            raise Refusal(
                f"the cache holds {self.capacity} tokens and was given {stop}; make it with capacity={stop} or trim it"
            )
        if k_BTGC.requires_grad or v_BTGC.requires_grad:
            raise Refusal("the cache holds no gradients; run under torch.no_grad()")
        self.keys_LBSGC[layer, :, start:stop] = k_BTGC
        self.values_LBSGC[layer, :, start:stop] = v_BTGC
        self.lengths[layer] = stop
        return self.keys_LBSGC[layer, :, :stop], self.values_LBSGC[layer, :, :stop]

    def trim(self, length: int) -> None:
        """Forget every token from position `length` on."""
        if not 0 <= length <= self.length:
            raise Refusal(
                f"the cache holds {self.length} tokens; trim to a length from 0 to {self.length}, not {length}"
            )
        self.lengths = [length] * len(self.lengths)

    def layer(self, index: int) -> "LayerCache":
        """The part of one layer, to be handed to its attention."""
        return LayerCache(self, index)


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of a cache."""

    cache: KVCache
    index: int

    def append(self, k_BTGC: Tensor, v_BTGC: Tensor) -> tuple[Tensor, Tensor]:
        """Keep T more tokens; returns all keys and values of this layer so far."""
        return self.cache.append(self.index, k_BTGC, v_BTGC)
