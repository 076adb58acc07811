"""Attention: projections, head norms, rotation, core, output."""

from typing import Annotated, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from attention.attend import Kept
from attention.attending import Attending
from attention.cache import LayerCache, Room
from attention.contract import Needs
from attention.core import BACKENDS
from attention.mask import Mask
from attention.temperature import TemperatureSettings, scaled
from settings import Refusal, Section, nearest


def _known(name: str) -> str:
    if name not in {"auto", *BACKENDS}:
        raise ValueError(f"unknown backend{nearest(name, ['auto', *BACKENDS])}")
    return name


BackendName = Annotated[str, AfterValidator(_known)]
"""What a configuration may say: "auto", or one of the table."""


MOST_HEADS, MOST_CHANNELS = 10_000, 1_000_000
"""Bounds under which the sizes of all tensors are numbers."""


class AttentionSettings(Section):
    """Grouped-query attention: as many key/value heads as query heads is multi-head, one is multi-query."""

    kind: Literal["grouped"] = "grouped"
    num_heads: int = Field(ge=1, le=MOST_HEADS)
    num_kv_heads: int = Field(ge=1, le=MOST_HEADS)
    channels: int | None = Field(default=None, ge=1, le=MOST_CHANNELS)
    """Channels per head; left out: width // num_heads."""
    window: int | None = Field(default=None, ge=1)
    """Tokens that a layer of pattern "window" sees back, itself included."""
    head_norms: bool = False
    """RMS norm of each query and key head, before the rotation."""
    sink: bool = False
    """A learned score for each head that joins every softmax and holds no value, so that a head may look at nothing
    (gpt-oss)."""
    softcap: float | None = Field(default=None, gt=0)
    """Scores become softcap * tanh(scores / softcap) (Gemma 2, section 2); left out, they stay."""
    scale: float | None = Field(default=None, gt=0)
    """Multiplies the scores; left out: 1 / sqrt(channels)."""
    temperature: TemperatureSettings | None = None
    """Queries that grow with their position; left out, they do not."""
    backend: BackendName = "auto"
    """How it is computed: "auto", or a name that `python -m run doctor` lists."""
    norm_epsilon: float = Field(default=1e-6, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            divisors = [g for g in range(1, self.num_heads + 1) if self.num_heads % g == 0]
            near = sorted(divisors, key=lambda g: abs(g - self.num_kv_heads))[:2]
            choices = " or ".join(str(g) for g in sorted(near))
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; try {choices}")
        return self

    def rotary_channels(self, width: int) -> int:
        """How many channels of a head a rotation turns."""
        return channels_per_head(self, width)


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


class Rotation(Protocol):
    """Turns heads by the positions of their tokens."""

    positions_BT: Tensor

    def __call__(self, x_BTHC: Tensor, /) -> Tensor: ...


class Attention(nn.Module):
    """x -> output(softmax(q k^T / sqrt(C)) v), its window fixed when it is built.

    `attend` computes softmax attention of heads; what puts another in its place (ranks that hold a row together) keeps
    its call. A window of None: all is seen. has_rotary=False: nothing is rotated (NoPE; Kazemnejad et al. 2023).
    """

    def __init__(self, settings: AttentionSettings, width: int, *, window: int | None, has_rotary: bool = True) -> None:
        super().__init__()
        H, G, C = settings.num_heads, settings.num_kv_heads, channels_per_head(settings, width)
        self.channels = C
        self.window = window
        self.has_rotary = has_rotary
        self.query = nn.Linear(width, H * C, bias=False)
        self.key = nn.Linear(width, G * C, bias=False)
        self.value = nn.Linear(width, G * C, bias=False)
        self.output = nn.Linear(H * C, width, bias=False)
        has_norms = settings.head_norms
        self.query_norm = HeadNorm(C, settings.norm_epsilon) if has_norms else nn.Identity()
        self.key_norm = HeadNorm(C, settings.norm_epsilon) if has_norms else nn.Identity()
        self.sink_H = nn.Parameter(torch.zeros(H)) if settings.sink else None
        self.temperature = settings.temperature
        if settings.temperature is not None and settings.temperature.where == "unrotated" and has_rotary:
            self.temperature = None
        self.attend = Attending(settings.backend, scale=settings.scale, softcap=settings.softcap or 0.0)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation,
        mask: Mask,
        cache: LayerCache | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """(B, T, D) to (B, T, D). With a cache the T tokens are the last ones, and see all that it holds."""
        q_BTHC, k_BSGC, v_BSGC = (
            projection(x_BTD).unflatten(-1, (-1, self.channels)) for projection in (self.query, self.key, self.value)
        )
        q_BTHC, k_BSGC = self.query_norm(q_BTHC), self.key_norm(k_BSGC)
        if self.has_rotary:
            q_BTHC, k_BSGC = rotation(q_BTHC), rotation(k_BSGC)
        if self.temperature is not None:
            q_BTHC = scaled(self.temperature, q_BTHC, rotation.positions_BT)
        if cache is not None:
            k_BSGC, v_BSGC = cache.append(k_BSGC, v_BSGC)
        out_BTHC = self.attend(q_BTHC, k_BSGC, v_BSGC, mask.within(self.window), sink_H=self.sink_H, kept=kept)
        return self.output(out_BTHC.flatten(-2))

    def training_needs(self, device: str, dtype: torch.dtype) -> Needs:
        """What a training step on packed documents asks of the backend: `attend.backend` of it refuses at start-up."""
        return Needs(
            device,
            dtype,
            window=self.window is not None,
            documents=True,
            softcap=self.attend.options.softcap > 0,
            channels=self.channels,
            training=True,
        )

    def new_cache(self, room: Room) -> LayerCache:
        """An empty cache for this layer's keys and values."""
        shape = self.key.out_features // self.channels, self.channels
        return room.layer(shape, shape, window=self.window)
