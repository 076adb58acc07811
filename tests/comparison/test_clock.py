"""Steps are timed by training a few of them, and nothing of that is left."""

from pathlib import Path

import pytest

from comparison import clock
from comparison.clock import STEPS, shortened, time_steps
from run.config import load_config
from settings import Refusal
from tests.words import write_words

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path)


def test_a_few_steps_of_each_stage_and_nothing_else() -> None:
    config = load_config(ROOT / "tests/tiny.toml", ["name=t"])
    short = shortened(config)
    assert [stage.num_steps for stage in short.stages] == [STEPS, STEPS] and short.name == "t.clock"
    assert short.model == config.model and short.data == config.data and short.evals.needle is None
    assert [stage.sequence_length for stage in short.stages] == [64, 128]


@pytest.mark.parametrize("name", ["moe_1b_32k", "quickstart", "context/extension/moe"])
def test_every_kind_of_run_can_be_shortened(name: str) -> None:
    config = load_config(ROOT / f"configs/{name}.toml", [])
    assert all(stage.num_steps == STEPS for stage in shortened(config).stages)


def test_steps_are_timed_and_the_folder_is_gone() -> None:
    config = load_config(ROOT / "tests/tiny.toml", ["name=t"])
    seconds = time_steps(config)
    assert len(seconds) == 2 and all(0 < each < 60 for each in seconds)
    assert list(Path("runs").iterdir()) == []


def test_what_cannot_be_trained_is_told_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trainer.py").write_text("import sys\nprint('no memory')\nsys.exit(2)")
    monkeypatch.setattr(clock, "TRAIN", tmp_path / "trainer.py")
    with pytest.raises(Refusal, match=r"(?s)t: its steps could not be timed:.*no memory"):
        time_steps(load_config(ROOT / "tests/tiny.toml", ["name=t"]))
    assert list(Path("runs").iterdir()) == []
