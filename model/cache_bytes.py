"""How many bytes a key/value cache takes: arithmetic on settings, nothing is built."""

from attention.attention import AttentionSettings, channels_per_head
from attention.cache import Room
from model.transformer import ModelSettings


def cache_bytes(settings: ModelSettings, room: Room) -> int:
    """Of all layers of a model in such a room, as `model.prefill.new_cache` makes it."""
    number, capacity = numbers_a_token(settings), room.capacity
    views = (settings.window(layer) for layer in range(settings.num_layers))
    strips = (min(capacity, view - 1 + room.reach + room.chunk) if view is not None else capacity for view in views)
    return room.num_rows * sum(strips) * number * room.dtype.itemsize


def numbers_a_token(settings: ModelSettings) -> int:
    """What one layer keeps of a token: keys and values of all their heads, or one latent with its rotated channels."""
    attention = settings.attention
    if isinstance(attention, AttentionSettings):
        return 2 * attention.num_kv_heads * channels_per_head(attention, settings.width)
    return attention.latent_rank + attention.rope_channels
