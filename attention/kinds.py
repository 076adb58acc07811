"""The kinds of attention a layer can have: their settings told apart by `kind`, and what each builds."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from attention.attention import Attention, AttentionSettings
from attention.latent import LatentAttention, LatentSettings

AnyAttentionSettings = Annotated[
    AttentionSettings | LatentSettings,
    Field(discriminator="kind"),
    # Grouped attention can be set without naming it.
    BeforeValidator(lambda given: {"kind": "grouped", **given} if isinstance(given, dict) else given),
]

AnyAttention = Attention | LatentAttention

KINDS: dict[str, Any] = {"grouped": Attention, "latent": LatentAttention}


def build_attention(
    settings: AttentionSettings | LatentSettings, width: int, window: int | None, *, has_rotary: bool = True
) -> AnyAttention:
    """The attention of one layer. window: how many tokens it sees back; None: all."""
    return KINDS[settings.kind](settings, width, window=window, has_rotary=has_rotary)
