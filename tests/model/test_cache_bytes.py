"""What a cache is said to take is what one takes."""

from typing import Any

import pytest
import torch

from attention.cache import Room
from model.cache_bytes import cache_bytes
from model.initialize import initialize
from model.prefill import new_cache
from model.transformer import build_model

GROUPED = {"num_heads": 4, "num_kv_heads": 2, "window": 9}
LATENT = {
    "kind": "latent",
    "num_heads": 4,
    "latent_rank": 12,
    "nope_channels": 6,
    "rope_channels": 2,
    "value_channels": 5,
    "window": 9,
}


@pytest.mark.parametrize("pattern", [["full"], ["window", "full"], ["window"]])
@pytest.mark.parametrize("attention", [GROUPED, LATENT])
@pytest.mark.parametrize(("rows", "capacity", "chunk", "reach"), [(1, 64, 16, 0), (3, 64, 5, 7), (2, 10, 64, 0)])
def test_it_is_counted_to_the_byte(  # noqa: PLR0917 (a model and its room)
    tiny_settings: Any, pattern: list[str], attention: dict[str, Any], rows: int, capacity: int, chunk: int, reach: int
) -> None:
    seen = {key: value for key, value in attention.items() if key != "window" or "window" in pattern}
    settings = tiny_settings(attention=seen, pattern=pattern)
    model = build_model(settings, 61)
    initialize(model, 0, "cpu")
    made = new_cache(model, rows, capacity, chunk, reach)
    assert cache_bytes(settings, Room(rows, capacity, chunk, reach)) == made.num_bytes
    half = Room(rows, capacity, chunk, reach, dtype=torch.bfloat16)
    assert 2 * cache_bytes(settings, half) == made.num_bytes
