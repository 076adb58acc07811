"""Steps are timed by training a few of them, and nothing of that is left."""

import os
import signal
import threading
import time
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_no_process_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The first to be told of it ends it; one that does not listen is ended all the same."""
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if number == signal.SIGHUP else ""
    wait = "import os, pathlib, time\npathlib.Path('pid').write_text(f'{os.getpid()}.')\ntime.sleep(60)"
    (tmp_path / "trainer.py").write_text(deaf + wait)
    monkeypatch.setattr(clock, "TRAIN", tmp_path / "trainer.py")
    monkeypatch.setattr(clock, "GRACE", 0.2)
    pid = tmp_path / "pid"

    def send() -> None:
        while not pid.exists() or not pid.read_text().endswith("."):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        time_steps(load_config(ROOT / "tests/tiny.toml", ["name=t"]))
    assert list(Path("runs").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text().rstrip(".")), 0)
