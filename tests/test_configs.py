"""Every configuration that is shipped loads, and its model builds."""

from pathlib import Path

import pytest

from comparison.arms import expand, read_arms
from data.tokenizer import ByteSettings
from model.size import count
from model.transformer import build_model
from run.config import load_config
from settings import to_toml

ROOT = Path(__file__).parents[1]
COMPARISONS = sorted(path for path in (ROOT / "configs").rglob("*.toml") if "\n[bases]\n" in path.read_text())
DEVICES = sorted((ROOT / "configs" / "devices").glob("*.toml"))  # whose tests are in tests/planning
CONFIGS = sorted({*(ROOT / "configs").rglob("*.toml")} - {*COMPARISONS} - {*DEVICES})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_loads_and_builds_on_the_meta_device(path: Path) -> None:
    config = load_config(path, [])
    vocab_size = 257 if isinstance(config.data.tokenizer, ByteSettings) else 32_768
    model = build_model(config.model, vocab_size)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == count(config.model, vocab_size).total


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.parametrize("is_small", [False, True])
def test_every_run_of_a_comparison_is_one(path: Path, is_small: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert expand(read_arms(path, [], is_small=is_small), path, "all")


def test_any_file_name_gives_a_name_that_loads_again(tmp_path: Path) -> None:
    path = tmp_path / "my run_(é).toml"
    path.write_text((ROOT / "configs" / "quickstart.toml").read_text())
    config = load_config(path, [])
    assert config.name == "my-run"
    path.write_text(to_toml(config))
    assert load_config(path, []) == config
