"""One thread for every test: numbers depend on how many there are, and on busy cores more of them are slower."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from run import record
from tests.words import write_words

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also what takes too long for every change")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs an NVIDIA GPU",
        "nightly": None if config.getoption("--nightly") else "takes long: pytest --nightly",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to train in, with a text; signal handlers are put back afterwards."""
    write_words(tmp_path)
    monkeypatch.chdir(tmp_path)
    # Drawing takes longer than training here; a test that looks at a report puts it back.
    monkeypatch.setattr(record, "write_report", lambda folder: folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def run_on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[int, dict[str, str]]]:
    """Runs the cases of a test file (tests/ranks.py) on groups of gloo ranks: {size: {case: "" or what went wrong}}."""

    def run(file: str, *sizes: int) -> dict[int, dict[str, str]]:
        folder = tmp_path_factory.mktemp("ranks")
        command = [sys.executable, str(Path(__file__).with_name("ranks.py")), file, str(folder), *map(str, sizes)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        subprocess.run(command, env=environment, cwd=folder, timeout=600, check=True)
        outcomes: dict[int, dict[str, str]] = {}
        for size in sizes:
            paths = [folder / f"outcome_{size}_{rank}.json" for rank in range(size)]
            by_rank = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
            outcomes[size] = {
                case: "".join(rank.get(case, "a rank never came here\n") for rank in by_rank)
                for case in max(by_rank, key=len)
            }
        return outcomes

    return run
