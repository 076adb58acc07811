"""How keys and values travel between ranks: both, or the keys alone where they hold the values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Wire:
    """The form in which keys (..., G, C) and values (..., G, E) of the same tokens go from rank to rank.

    Their gradients take it too: what is added to the two views that `unpack` gives of a buffer lands where it belongs.
    """

    key_channels: int
    value_channels: int
    is_latent: bool
    """The values are the keys' first channels, as in absorbed latent attention: the keys say it all."""

    @staticmethod
    def of(k_BSGC: Tensor, v_BSGE: Tensor) -> "Wire":
        """The form for these; whether the values are the keys' first channels shows in where they lie in memory."""
        C, E = k_BSGC.shape[-1], v_BSGE.shape[-1]
        is_latent = (
            k_BSGC.data_ptr() == v_BSGE.data_ptr()
            and k_BSGC.stride() == v_BSGE.stride()
            and k_BSGC.dtype == v_BSGE.dtype
            and E <= C
        )
        return Wire(C, E, is_latent)

    @property
    def channels(self) -> int:
        """X: of a token and key head on the way."""
        return self.key_channels + (0 if self.is_latent else self.value_channels)

    def parts(self, k_SGC: Tensor, v_SGE: Tensor) -> list[Tensor]:
        """What has to travel."""
        return [k_SGC] if self.is_latent else [k_SGC, v_SGE]

    def whole(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(keys, values) of what has travelled."""
        return (parts[0], parts[0][..., : self.value_channels]) if self.is_latent else (parts[0], parts[1])

    def gradient_parts(self, grad_k_SGC: Tensor, grad_v_SGE: Tensor) -> list[Tensor]:
        """What has to travel of gradients; writes to that of the keys."""
        if self.is_latent:
            grad_k_SGC[..., : self.value_channels] += grad_v_SGE
        return self.parts(grad_k_SGC, grad_v_SGE)

    def pack(self, k_SGC: Tensor, v_SGE: Tensor) -> Tensor:
        """What has to travel as one tensor (..., G, X)."""
        return k_SGC if self.is_latent else torch.cat([k_SGC, v_SGE], dim=-1)

    def unpack(self, kv_SGX: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values), views of what was packed."""
        start = 0 if self.is_latent else self.key_channels
        return kv_SGX[..., : self.key_channels], kv_SGX[..., start : start + self.value_channels]

    def gradients(self, grad_k_SGC: Tensor, grad_v_SGE: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys and values, for those who add them up where values are part of the keys: each counts once."""
        return grad_k_SGC, grad_v_SGE.new_zeros(()).expand_as(grad_v_SGE) if self.is_latent else grad_v_SGE
