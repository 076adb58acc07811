"""Attention: projections, head norms, rotation, core, output."""

from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from attention.cache import LayerCache
from attention.contract import Backend, Needs
from attention.core import choose
from attention.mask import Mask
from settings import Refusal, Section


class AttentionSettings(Section):
    """Grouped-query attention: as many key/value heads as query heads is multi-head, one is multi-query."""

    kind: Literal["grouped"] = "grouped"
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    channels: int | None = Field(default=None, ge=1)
    """Channels per head; left out: width // num_heads."""
    window: int | None = Field(default=None, ge=1)
    """Tokens that a layer of pattern "window" sees back, itself included."""
    head_norms: bool = False
    """RMS norm of each query and key head, before the rotation."""
    backend: Literal["auto", "reference", "sdpa"] = "auto"
    norm_epsilon: float = Field(default=1e-6, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            divisors = [g for g in range(1, self.num_heads + 1) if self.num_heads % g == 0]
            near = sorted(divisors, key=lambda g: abs(g - self.num_kv_heads))[:2]
            choices = " or ".join(str(g) for g in sorted(near))
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; try {choices}")
        return self


def channels_per_head(settings: AttentionSettings, width: int) -> int:
    """C: as set, or the width shared among the heads."""
    if settings.channels is not None:
        return settings.channels
    if width % settings.num_heads:
        raise Refusal(
            f"attention.num_heads={settings.num_heads} must divide width={width}; change one or set attention.channels"
        )
    return width // settings.num_heads


class HeadNorm(nn.Module):
    """RMS norm of each head: x / rms(x) * weight, computed in the weight's precision, answered in the input's."""

    def __init__(self, channels: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.epsilon = epsilon

    def forward(self, x_BTHC: Tensor) -> Tensor:
        dtype = torch.promote_types(x_BTHC.dtype, self.weight.dtype)
        return F.rms_norm(x_BTHC.to(dtype), self.weight.shape, self.weight.to(dtype), self.epsilon).to(x_BTHC.dtype)


class Attention(nn.Module):
    """x -> output(softmax(q k^T / sqrt(C)) v), its window fixed when it is built."""

    def __init__(self, settings: AttentionSettings, width: int, *, window: int | None) -> None:
        super().__init__()
        H, G, C = settings.num_heads, settings.num_kv_heads, channels_per_head(settings, width)
        self.channels = C
        self.window = window
        self.query = nn.Linear(width, H * C, bias=False)
        self.key = nn.Linear(width, G * C, bias=False)
        self.value = nn.Linear(width, G * C, bias=False)
        self.output = nn.Linear(H * C, width, bias=False)
        has_norms = settings.head_norms
        self.query_norm = HeadNorm(C, settings.norm_epsilon) if has_norms else nn.Identity()
        self.key_norm = HeadNorm(C, settings.norm_epsilon) if has_norms else nn.Identity()
        self.backend_name = settings.backend
        self._backends: dict[tuple[str, torch.dtype], Backend] = {}

    def forward(
        self, x_BTD: Tensor, rotation: Callable[[Tensor], Tensor], mask: Mask, cache: LayerCache | None = None
    ) -> Tensor:
        """(B, T, D) to (B, T, D). With a cache the T tokens are the last ones, and see all that it holds."""
        q_BTHC, k_BSGC, v_BSGC = (
            projection(x_BTD).unflatten(-1, (-1, self.channels)) for projection in (self.query, self.key, self.value)
        )
        q_BTHC = rotation(self.query_norm(q_BTHC))
        k_BSGC = rotation(self.key_norm(k_BSGC))
        if cache is not None:
            k_BSGC, v_BSGC = cache.append(k_BSGC, v_BSGC)
        out_BTHC, _ = self.backend(v_BSGC)(q_BTHC, k_BSGC, v_BSGC, mask.within(self.window))
        return self.output(out_BTHC.flatten(-2))

    def backend(self, like: Tensor) -> Backend:
        """The backend for tensors like this one: chosen the first time a device and dtype are met, then kept."""
        key = (like.device.type, like.dtype)
        if key not in self._backends:
            window = self.window is not None
            needs = Needs(*key, window=window, documents=True, unequal_lengths=True, training=True)
            self._backends[key] = choose(self.backend_name, needs)
        return self._backends[key]
