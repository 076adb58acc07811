"""Every configuration that is shipped loads, and its model builds."""

from pathlib import Path

import pytest

from data.tokenizer import ByteSettings
from model.size import count
from model.transformer import build_model
from run.config import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_loads_and_builds_on_the_meta_device(path: Path) -> None:
    config = load_config(path, [])
    vocab_size = 257 if isinstance(config.data.tokenizer, ByteSettings) else 32_768
    model = build_model(config.model, vocab_size)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == count(config.model, vocab_size).total
