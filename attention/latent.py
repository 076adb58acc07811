"""Multi-head latent attention: keys and values of all heads are made of one small vector a token, which is all that a
cache has to hold and all that ranks have to send.

DeepSeek-V2 (arXiv 2405.04434), section 2.1; unchanged in DeepSeek-V3 (arXiv 2412.19437), section 2.1.1.
Letters here: Z channels of the latent, Y rotated channels, C = plain and rotated channels of a head, E of its values.
"""

from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from attention.attend import Kept
from attention.attending import Attending
from attention.attention import MOST_CHANNELS, MOST_HEADS, BackendName, HeadNorm, Rotation
from attention.cache import LayerCache, Room
from attention.contract import Needs
from attention.mask import Mask
from settings import Section


class LatentSettings(Section):
    """Sizes as DeepSeek-V3 has them: 128 heads, query_rank 1536, latent_rank 512, channels 128, 64 and 128."""

    kind: Literal["latent"] = "latent"
    num_heads: int = Field(ge=1, le=MOST_HEADS)
    query_rank: int | None = Field(default=None, ge=1, le=MOST_CHANNELS)
    """Queries are made of a normalised vector of so many channels; left out, of the token itself."""
    latent_rank: int = Field(ge=1, le=MOST_CHANNELS)
    """Channels of the normalised vector that keys and values are made of."""
    nope_channels: int = Field(ge=1, le=MOST_CHANNELS)
    """Channels of a query or key head that are not rotated."""
    rope_channels: int = Field(ge=2, le=MOST_CHANNELS)
    """Channels of a query head that are rotated; the key has them once for all heads."""
    value_channels: int = Field(ge=1, le=MOST_CHANNELS)
    window: int | None = Field(default=None, ge=1)
    """Tokens that a layer of pattern "window" sees back, itself included."""
    backend: BackendName = "auto"
    """How it is computed: "auto", or a name that `python -m run doctor` lists."""
    norm_epsilon: float = Field(default=1e-6, gt=0)

    def rotary_channels(self, width: int) -> int:
        """How many channels of a head a rotation turns."""
        return self.rope_channels


class ScalingRotation(Rotation, Protocol):
    """A rotation that says by how much it scales what it turns."""

    attention_factor: float


class LatentAttention(nn.Module):
    """x -> latent; out_h = softmax(q_h [up_h latent, rotated key]^T / sqrt(C)) down_h latent, in one of two orders.

    Expanded, as written: keys and values of all heads are made, the fewest operations for many queries. Absorbed: each
    head's products with the latent move to its query and its output, so that all heads share one key, the latent with
    the rotated channels, and one value, the latent: nothing is made of what lies in a cache or on another rank, for
    (2Z + Y) / (C + E) times the operations in attention.
    """

    def __init__(self, settings: LatentSettings, width: int, *, window: int | None, has_rotary: bool = True) -> None:
        super().__init__()
        H, Z, Y = settings.num_heads, settings.latent_rank, settings.rope_channels
        C = settings.nope_channels + Y
        self.settings = settings
        self.window = window
        self.has_rotary = has_rotary
        rank = settings.query_rank
        self.query_down = nn.Identity() if rank is None else nn.Linear(width, rank, bias=False)
        self.query_norm = nn.Identity() if rank is None else HeadNorm(rank, settings.norm_epsilon)
        self.query = nn.Linear(rank or width, H * C, bias=False)
        self.latent = nn.Linear(width, Z + Y, bias=False)
        self.latent_norm = HeadNorm(Z, settings.norm_epsilon)
        self.expand = nn.Linear(Z, H * (settings.nope_channels + settings.value_channels), bias=False)
        self.output = nn.Linear(H * settings.value_channels, width, bias=False)
        self.attend = Attending(settings.backend, scale=C**-0.5)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: ScalingRotation,
        mask: Mask,
        cache: LayerCache | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """(B, T, D) to (B, T, D). With a cache the T tokens are the last ones, and see all that it holds."""
        plain_BTHC, rotated_BTHY = self._queries(x_BTD, rotation)
        key_BSX = self._keys(x_BTD, rotation)
        if cache is not None:
            (key_BSX,) = cache.append(key_BSX)
        is_far = mask.is_split or key_BSX.shape[1] > x_BTD.shape[1]
        way = self._absorbed if is_far else self._expanded
        out_BTHE = way(plain_BTHC, rotated_BTHY, key_BSX, mask.within(self.window), kept)
        return self.output(out_BTHE.flatten(-2))

    def training_needs(self, device: str, dtype: torch.dtype) -> Needs:
        """What a training step on packed documents asks of the backend: `attend.backend` of it refuses at start-up."""
        C, E = self.settings.nope_channels + self.settings.rope_channels, self.settings.value_channels
        return Needs(
            device,
            dtype,
            window=self.window is not None,
            documents=True,
            value_channels=C != E,
            channels=max(C, E),
            training=True,
        )

    def new_cache(self, room: Room) -> LayerCache:
        """An empty cache of one vector a token: the latent, and the key's rotated channels."""
        return room.layer((self.latent.out_features,), window=self.window)

    def _queries(self, x_BTD: Tensor, rotation: ScalingRotation) -> tuple[Tensor, Tensor]:
        """(not rotated (B, T, H, C - Y), rotated (B, T, H, Y))."""
        settings = self.settings
        q_BTHC = self.query(self.query_norm(self.query_down(x_BTD))).unflatten(-1, (settings.num_heads, -1))
        plain_BTHC, rotated_BTHY = q_BTHC.split((settings.nope_channels, settings.rope_channels), dim=-1)
        if not self.has_rotary:
            return plain_BTHC, rotated_BTHY
        # The rotation scales its part of queries and keys; published models scale all of a score (YaRN's mscale).
        if rotation.attention_factor != 1:
            plain_BTHC = plain_BTHC * rotation.attention_factor**2
        return plain_BTHC, rotation(rotated_BTHY)

    def _keys(self, x_BTD: Tensor, rotation: ScalingRotation) -> Tensor:
        """The normalised latent and the rotated channels, side by side: (B, T, Z + Y)."""
        settings = self.settings
        latent_BTZ, rotated_BTY = self.latent(x_BTD).split((settings.latent_rank, settings.rope_channels), dim=-1)
        if self.has_rotary:
            rotated_BTY = rotation(rotated_BTY.unsqueeze(2)).squeeze(2)
        return torch.cat((self.latent_norm(latent_BTZ), rotated_BTY), dim=-1)

    def _expanded(
        self, plain_BTHC: Tensor, rotated_BTHY: Tensor, key_BSX: Tensor, mask: Mask, kept: Kept | None
    ) -> Tensor:
        settings = self.settings
        latent_BSZ, rotated_BSY = key_BSX.split((settings.latent_rank, settings.rope_channels), dim=-1)
        k_and_v_BSHX = self.expand(latent_BSZ).unflatten(-1, (settings.num_heads, -1))
        k_BSHC, v_BSHE = k_and_v_BSHX.split((settings.nope_channels, settings.value_channels), dim=-1)
        rotated_BSHY = rotated_BSY.unsqueeze(2).expand(-1, -1, settings.num_heads, -1)
        q_BTHC, k_BSHC = torch.cat((plain_BTHC, rotated_BTHY), dim=-1), torch.cat((k_BSHC, rotated_BSHY), dim=-1)
        return self.attend(q_BTHC, k_BSHC, v_BSHE, mask, kept=kept)

    def _absorbed(
        self, plain_BTHC: Tensor, rotated_BTHY: Tensor, key_BSX: Tensor, mask: Mask, kept: Kept | None
    ) -> Tensor:
        settings = self.settings
        weight_HXZ = self.expand.weight.unflatten(0, (settings.num_heads, -1))
        up_HCZ, down_HEZ = weight_HXZ.split((settings.nope_channels, settings.value_channels), dim=1)
        q_BTHX = torch.cat((torch.einsum("bthc,hcz->bthz", plain_BTHC, up_HCZ), rotated_BTHY), dim=-1)
        k_BSGX = key_BSX.unsqueeze(2)
        out_BTHZ = self.attend(q_BTHX, k_BSGX, k_BSGX[..., : settings.latent_rank], mask, kept=kept)
        return torch.einsum("bthz,hez->bthe", out_BTHZ, down_HEZ)
