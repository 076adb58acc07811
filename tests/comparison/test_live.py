"""The table of runs that train: what it says of each, and that what cannot be known yet is left out."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from comparison import live
from comparison.arms import Entry
from comparison.live import Live, cells_of, last_row, seconds_left, standing_of, summary
from tests.comparison.test_sweep import finish, path, runs

__all__ = ["path"]


@pytest.fixture
def entries(path: Path) -> list[Entry]:
    """Two cells under two seeds: the first is finished, the second trains, the third has failed."""
    found = runs(path)
    finish(found[0], 1.5)
    speed = {"tokens_per_second": 64.0, "mfu": 0.25, "padding_share": 0.125}
    write(found[1], {"step": 4, "tokens": 256, "loss": 2.5, **speed})
    write(found[2], {"step": 1, "tokens": 64, "loss": None, "tokens_per_second": 32.0})
    return found


def write(entry: Entry, row: dict[str, float | None]) -> None:
    entry.folder.mkdir(parents=True)
    (entry.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def standings(entries: list[Entry]) -> list[live.Standing]:
    return [standing_of(entry, {entries[1].config.name}, {entries[2].config.name}) for entry in entries]


def test_a_row_a_run(entries: list[Entry]) -> None:
    cells = [cells_of(each) for each in standings(entries)]
    assert [row[""] for row in cells] == ["finished", "trains", "failed", "waits"]
    assert [row["tokens"] for row in cells] == ["1.02K / 1.02K", "256 / 1.02K", "64 / 1.02K", "1.02K"]
    assert [row["loss"] for row in cells] == ["1.500", "2.500", "", ""]
    assert [row["MFU"] for row in cells] == ["", "25.0%", "", ""]
    assert [row["padding"] for row in cells] == ["", "12.5%", "", ""]
    assert cells[1]["routing"] == "dense" and cells[3]["routing"] == ""
    assert [row["left"] for row in cells] == ["", "0:12", "", ""], "768 tokens at 64 a second"


def test_time_left_is_that_of_runs_side_by_side(entries: list[Entry]) -> None:
    """768 tokens at 64 a second; 1024 of an arm that has run at 64."""
    found = standings(entries)
    assert seconds_left(found, 1) == pytest.approx(12 + 16) and seconds_left(found, 2) == pytest.approx(16)
    assert summary(found, 1) == "1 of 4 finished, 1 train, 1 failed, 0:28 left"
    assert math.isnan(seconds_left(found[:1], 1)) and summary(found[:1], 1) == "1 of 1 finished, 0 train"


def test_the_last_whole_row_is_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert last_row(file) == {}
    file.write_text("".join(json.dumps({"step": n, "x": "y" * 1000}) + "\n" for n in range(200)) + '{"step": 200, "x"')
    assert last_row(file)["step"] == 199
    file.write_text("\x00\n[1]\n")
    assert last_row(file) == {}


def test_a_terminal_has_a_table_and_a_log_has_lines(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SECONDS", 0.0)
    said: list[str] = []
    screen = io.StringIO()
    groups = {entries[1].config.name}, {entries[2].config.name}
    with Live(entries, 1, said.append, Console(file=screen, force_terminal=True, width=160)) as shown:
        shown.update(*groups)
    assert not said and "bits/byte" in screen.getvalue() and "0:28 left" in screen.getvalue()
    assert "t.a.3.learning_rate_0_003" in screen.getvalue()
    with Live(entries, 1, said.append, Console(file=io.StringIO())) as shown:
        shown.update(*groups)
        assert not said, "lines now and then alone"
        monkeypatch.setattr(live, "QUIET_SECONDS", 0.0)
        shown.update(*groups)
    assert said == [
        "t.a.3.learning_rate_0_003: tokens 256 / 1.02K, loss 2.500, tokens/s 64, MFU 25.0%, routing dense, "
        "padding 12.5%, left 0:12",
        "1 of 4 finished, 1 train, 1 failed, 0:28 left",
    ]
