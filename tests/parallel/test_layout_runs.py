"""Whole runs whose ranks hold parts of layers: the numbers, questions and checkpoints of one process, in any order."""

from pathlib import Path

import pytest
import torch

import train
from checkpoint.checkpoints import read_checkpoint
from run import record
from run.config import load_config
from tests.parallel.test_run import TINY, assert_same_numbers, before_the_last_checkpoint, rows, torchrun
from tests.words import write_words

MODEL = ("model.attention.num_kv_heads=2", "model.moe.num_shared_experts=1", "tokens_per_microbatch=128")
LAYOUTS = {"shard": "parallel.shard=2", "tensor": "parallel.tensor=2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a run of one process, and the same run in each layout of two ranks."""
    folder = tmp_path_factory.mktemp("layouts")
    write_words(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(record, "write_report", lambda path: path)
        train.main(load_config(TINY, ["name=one", *MODEL]))
        for name, layout in LAYOUTS.items():
            said, status = torchrun(f"name={name}", layout, *MODEL)
            assert status == 0, said
    return folder


@pytest.fixture(autouse=True)
def in_that_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(record, "write_report", lambda path: path)


def assert_same_questions(ours: str, theirs: str) -> None:
    one, two = rows(theirs, "evals.jsonl"), rows(ours, "evals.jsonl")
    assert [row["task"] for row in two] == [row["task"] for row in one] and len(one) > 10
    for expected, row in zip(one, two, strict=True):
        assert row["score"] == pytest.approx(expected["score"], rel=1e-4), row["task"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_give_the_numbers_of_one_process(name: str) -> None:
    assert_same_numbers(name, "one")
    assert_same_questions(name, "one")


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_is_that_of_one_process(name: str) -> None:
    """Of whole tensors, whoever wrote them."""
    (state, _, ours), (expected_state, _, theirs) = (read_checkpoint(f"runs/{each}") for each in (name, "one"))
    assert (state["step"], state["tokens"]) == (expected_state["step"], expected_state["tokens"]) == (12, 6144)
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert ours[key].shape == expected.shape
        # AdamW divides by the gradient's own size: where there is none, rounding alone decides.
        assert (ours[key] - expected).norm() <= 2e-3 * expected.norm() + 1e-6, key


@pytest.mark.distributed
@pytest.mark.parametrize(("saved", "other"), [("shard", "tensor"), ("tensor", "shard")])
def test_a_run_goes_on_in_another_layout(saved: str, other: str) -> None:
    name = f"{saved}-then-{other}"
    before_the_last_checkpoint(saved, name)
    said, status = torchrun(f"name={name}", LAYOUTS[other], *MODEL)
    assert status == 0, said
    assert "continues at step 9" in said
    assert_same_numbers(name, "one")


@pytest.mark.distributed
@pytest.mark.parametrize("saved", LAYOUTS)
def test_a_run_goes_on_in_one_process(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{saved}-then-one"
    before_the_last_checkpoint(saved, name)
    train.main(load_config(TINY, [f"name={name}", *MODEL]))
    assert "continues at step 9" in capsys.readouterr().out
    assert_same_numbers(name, "one")
    assert_same_questions(name, "one")


@pytest.mark.distributed
def test_a_run_goes_on_in_the_same_layout_bit_for_bit() -> None:
    before_the_last_checkpoint("shard", "shard-again")
    said, status = torchrun("name=shard-again", LAYOUTS["shard"], *MODEL)
    assert status == 0, said
    (_, _, ours), (_, _, theirs) = (read_checkpoint(f"runs/{name}") for name in ("shard-again", "shard"))
    assert all(torch.equal(ours[key], expected) for key, expected in theirs.items())
