"""A whole run whose ranks share experts: its numbers, its evals, its checkpoints, its refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import evals.__main__ as asking
import train
from run import record
from run.config import load_config
from run.start import refusing
from tests.words import write_words

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parents[1] / "tiny.toml"
SHARED = "model.moe.num_shared_experts=1"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a run of one process, and the same run of two ranks that share experts."""
    folder = tmp_path_factory.mktemp("shared")
    write_words(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(record, "write_report", lambda path: path)
        train.main(load_config(TINY, ["name=one", SHARED]))
        said, status = torchrun("name=two", "parallel.expert=2", SHARED)
        assert status == 0, said
    return folder


@pytest.fixture(autouse=True)
def in_that_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setattr(record, "write_report", lambda path: path)


def torchrun(*overrides: str) -> tuple[str, int]:
    """What two ranks say, and how they end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(TINY), *overrides], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done.stdout + done.stderr, done.returncode


def rows(name: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"runs/{name}/{file}").read_text().splitlines()]


def assert_same_numbers(ours: str, theirs: str) -> None:
    one, two = rows(theirs), rows(ours)
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for expected, row in zip(one, two, strict=True):
        for key in ("loss", "balance_loss", "router_z_loss", "router_entropy", "flops_per_token"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5), key
        assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
        for key in ("max_violation", "dead_experts", "documents", "padding_share"):
            assert row[key] == pytest.approx(expected[key], abs=1e-6), key


def before_the_last_checkpoint(name: str, copy: str) -> None:
    """A copy of a run as it stood after step 9 of 12."""
    shutil.copytree(f"runs/{name}", f"runs/{copy}")
    shutil.rmtree(f"runs/{copy}/checkpoints/step_00000012")


@pytest.mark.distributed
def test_two_ranks_that_share_experts_give_the_numbers_of_one_process() -> None:
    assert_same_numbers("two", "one")
    one, two = rows("one", "evals.jsonl"), rows("two", "evals.jsonl")
    assert [row["task"] for row in two] == [row["task"] for row in one] and len(one) > 10
    for expected, row in zip(one, two, strict=True):
        assert row["score"] == pytest.approx(expected["score"], rel=1e-4), row["task"]


@pytest.mark.distributed
def test_what_they_saved_goes_on_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    before_the_last_checkpoint("two", "two-then-one")
    train.main(load_config(TINY, ["name=two-then-one", SHARED]))
    assert "continues at step 9" in capsys.readouterr().out
    assert_same_numbers("two-then-one", "one")


@pytest.mark.distributed
def test_one_process_asks_what_they_saved() -> None:
    torch.manual_seed(0)
    asking.main(asking.parse_arguments(["runs/two", "--tasks", "needle", "--device", "cpu", "--out", "asked"]))
    answers = [json.loads(line) for line in Path("asked/evals.jsonl").read_text().splitlines()]
    needle = ("needle", "effective_length/needle")
    expected = [row for row in rows("two", "evals.jsonl") if row["task"] in needle and row["step"] == 12]
    assert [row["task"] for row in answers] == [row["task"] for row in expected]
    assert [row["score"] for row in answers] == pytest.approx([row["score"] for row in expected], rel=1e-4)


def test_ranks_that_do_not_divide_are_refused_before_anything_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusing(lambda: train.main(load_config(TINY, ["name=refused", "parallel.expert=2"]))) == 2
    assert "refused: parallel.expert=2 does not divide the 1 ranks of this run; start 2" in capsys.readouterr().err
    assert not Path("runs/refused").exists()
