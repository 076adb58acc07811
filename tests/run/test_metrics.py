"""Metrics: valid JSON, no step twice, whatever moment the run died at."""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from run.metrics import Metrics, ProgressLine, clock, read_rows, short
from settings import Refusal


@dataclass
class Probe:
    score: float
    task: str = "needle"
    length: int = 128

    def row(self, step: int, tokens: int) -> dict:
        return {"step": step, "tokens": tokens, "task": self.task, "length": self.length, "score": self.score}


def write(folder: Path, steps: range, resumed_step: int | None = None) -> None:
    metrics = Metrics(folder, resumed_step, tensorboard=False)
    for step in steps:
        metrics.log({"step": step, "tokens": step * 10, "loss": 1.0 / step})
        if step % 4 == 0:
            metrics.log_evals(step, step * 10, [Probe(0.25), Probe(0.75)])
    metrics.close()


def test_rows_come_back_as_they_were_logged(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, None, tensorboard=False)
    row = {"step": 1, "tokens": 10, "loss": 0.1, "stage": 0, "load": [0.5, 0.5], "note": "é"}
    metrics.log(row)
    metrics.log_evals(1, 10, [{"task": "held_out/web", "length": 4, "depth": None, "score": 2.0, "count": 3}])
    assert read_rows(tmp_path / "metrics.jsonl") == [row], "a row must be on the disk as soon as it is logged"
    evals = read_rows(tmp_path / "evals.jsonl")
    assert evals == [
        {"step": 1, "tokens": 10, "task": "held_out/web", "length": 4, "depth": None, "score": 2.0, "count": 3}
    ]


@pytest.mark.parametrize("resumed", [0, 3, 4, 7, 8, 10])
def test_a_resumed_run_leaves_the_files_of_an_unbroken_one(tmp_path: Path, resumed: int) -> None:
    write(tmp_path / "unbroken", range(1, 13))
    write(tmp_path / "broken", range(1, 11))
    write(tmp_path / "broken", range(resumed + 1, 13), resumed_step=resumed)
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    assert not list(tmp_path.rglob(".partial*"))


def test_any_moment_of_death_leaves_whole_rows(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for cut in range(0, len(whole), 5):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:cut])
        steps = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")]
        write(tmp_path, range(6, 7), resumed_step=5)
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [*steps, 6]


def test_zeros_left_by_a_power_cut_are_no_row(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "tokens": 1}\n\0\0\0\0\n{"step": 2, "tokens": 2}\n\0\0')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("row", ['{"tokens": 1}', '{"step": 1}', '{"step": null, "tokens": 1}'])
def test_a_row_without_step_or_tokens_is_refused_by_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "tokens": 1}\n' + row + "\n")
    for read in (lambda: read_rows(path), lambda: Metrics(tmp_path, 1, tensorboard=False)):
        with pytest.raises(Refusal, match=r"metrics\.jsonl, line 2: .*(step|tokens)"):
            read()
    assert row in path.read_text(), "nothing is lost by a refusal"


def test_evals_asked_again_at_the_resumed_step_replace_the_old_ones(tmp_path: Path) -> None:
    write(tmp_path, range(1, 9))
    metrics = Metrics(tmp_path, 8, tensorboard=False)
    metrics.log_evals(8, 80, [Probe(0.9)])
    metrics.log_evals(8, 80, [Probe(0.1, task="positions")])
    metrics.close()
    rows = read_rows(tmp_path / "evals.jsonl")
    assert [(row["step"], row["score"]) for row in rows] == [(4, 0.25), (4, 0.75), (8, 0.9), (8, 0.1)]


def test_a_new_run_starts_with_empty_files(tmp_path: Path) -> None:
    write(tmp_path, range(1, 9))
    Metrics(tmp_path, None, tensorboard=False).close()
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(tmp_path / "evals.jsonl") == []
    assert read_rows(tmp_path / "nowhere.jsonl") == []


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, None, tensorboard=False)
    nan, inf = math.nan, math.inf
    metrics.log({"step": 1, "tokens": 1, "a": nan, "b": [inf, 1.0], "c": {"d": -inf}, "e": torch.tensor(nan)})
    metrics.log({"step": 2, "tokens": 2, "a": np.float32(0.5), "b": torch.tensor([1, 2]), "c": np.int64(3)})
    metrics.log_evals(2, 2, [Probe(nan)])
    metrics.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    for name in ("metrics.jsonl", "evals.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    first, second = read_rows(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, "tokens": 1, "a": None, "b": [None, 1.0], "c": {"d": None}, "e": None}
    assert second == {"step": 2, "tokens": 2, "a": 0.5, "b": [1, 2], "c": 3}


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((None, range(1, 6)), (3, range(4, 7))):
        metrics = Metrics(tmp_path, resumed)
        for step in steps:
            metrics.log({"step": step, "tokens": step, "loss": float(step), "note": "text", "none": None})
        metrics.log_evals(steps[-1], 0, [Probe(0.5), Probe(1.0)])
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "evals/needle/128"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, float(step)) for step in range(1, 7)
    ]
    assert [event.value for event in events.Scalars("evals/needle/128")] == [0.75]


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_without_a_terminal_the_first_and_the_last_state_are_plain_lines() -> None:
    console = Console(file=io.StringIO(), width=40)
    progress = ProgressLine("tiny", 1000, every_seconds=1e9, console=console)
    for step in range(1, 11):
        progress.update({"step": step, "tokens": step * 100, "loss": 2.0, "tokens_per_second": 50.0, "stage": 0})
    progress.close()
    first, last = lines_of(console)
    assert first == "tiny: 100/1K tokens  loss 2.000  50 tokens/s  0:18 left  stage 0"
    assert last.startswith("tiny: 1K/1K tokens") and "\x1b" not in first + last


def test_a_row_that_was_printed_is_not_printed_again() -> None:
    console = Console(file=io.StringIO())
    progress = ProgressLine("tiny", 1000, every_seconds=0, console=console)
    progress.update({"step": 1, "tokens": 500, "loss": None})
    progress.close()
    assert lines_of(console) == ["tiny: 500/1K tokens"]


def test_in_a_terminal_the_line_is_alive_and_things_are_shown_above_it() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    progress = ProgressLine("tiny", 1000, console=console)
    progress.update({"step": 1, "tokens": 500, "loss": 1.25, "sequence_length": 64, "stage": 1})
    progress.show("a needle grid")
    progress.close()
    text = "\n".join(lines_of(console))
    assert "50%" in text and "loss 1.250" in text and "stage 1 (length 64)" in text and "a needle grid" in text


def test_numbers_for_people() -> None:
    numbers = [0, 950, 999, 1000, 12_345, 999_499, 999_600, 6_553_600, 7.89e9, 0.5]
    assert [short(number) for number in numbers] == [
        "0",
        "950",
        "999",
        "1K",
        "12.3K",
        "999K",
        "1M",
        "6.55M",
        "7.89B",
        "0.5",
    ]
    assert [clock(seconds) for seconds in (0, 59.6, 725, 11_220, math.inf)] == ["0:00", "1:00", "12:05", "3:07:00", "–"]
