"""How far a run reaches, from the rows in its folder: effective length, grids over time, loss by position."""

import json
from pathlib import Path

import pytest

from run import sections_reach
from run.facts import read_run
from run.figures import Panel
from run.sections_reach import grids_over_time, positions, reach

CONFIG = """
total_tokens = 400
tokens_per_step = 100
[[context.stages]]
until_tokens = 200
sequence_length = 128
rotary = { kind = "default" }
[[context.stages]]
until_tokens = 400
sequence_length = 512
rotary = { kind = "default" }
"""
HANDLED = {100: 0, 200: 128, 300: 256, 400: 512}
"""Tokens to the longest length that scores well."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(CONFIG)
    rows = []
    for tokens, handled in HANDLED.items():
        where = {"step": tokens // 100, "tokens": tokens, "stage": int(tokens > 200)}
        for length in (64, 128, 256, 512, 1024):
            for depth in (0.0, 1.0):
                score = 1.0 if length <= handled else None if length == 1024 else 0.3
                rows.append(where | {"task": "needle", "length": length, "depth": depth, "score": score, "count": 20})
        for start in (64, 0):
            rows.append(
                where | {"task": "positions/web", "length": 128, "depth": None, "score": 2 - start / 128, "count": 9}
                | {"start": start, "stop": start + 64, "low": 1.0, "high": 2.5}
            )  # fmt: skip
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4, "tokens": 400, "loss": 1.0}) + "\n")
    return tmp_path


@pytest.fixture
def drawn(monkeypatch) -> list[Panel]:
    """The panels that would have been drawn."""
    panels: list[Panel] = []

    def catch(alt, content, facts, columns=1):
        panels.extend(content)
        return alt

    monkeypatch.setattr(sections_reach, "lines", catch)
    monkeypatch.setattr(sections_reach, "to_png", lambda figure: bytes(len(figure.axes)))
    return panels


def test_effective_length_climbs_with_what_is_handled(folder, drawn):
    (section,) = reach(read_run(folder))
    (panel,) = drawn
    tokens, heights = panel.series["effective length"]
    names = dict(panel.y_ticks)
    assert tokens == list(HANDLED) and [names[height] for height in heights] == ["below 64", "128", "256", "512"]
    tokens, heights = panel.series["trained length"]
    assert tokens == [0, 200, 200, 400] and [names[height] for height in heights] == ["128", "128", "512", "512"]
    assert "0.8" in section.text and len(section.pictures) == 2  # curve and grids


def test_grids_come_in_order_each_with_its_trained_length(folder):
    grids = grids_over_time(read_run(folder), "needle")
    assert [(grid.title, grid.trained_length) for grid in grids] == [
        ("100 tokens", 128), ("200 tokens", 128), ("300 tokens", 512), ("400 tokens", 512),
    ]  # fmt: skip
    assert grids[1].scores_DL[0, :2].tolist() == [1.0, 1.0] and str(grids[1].scores_DL[0, 4]) == "nan"


def test_stages_to_come_are_not_drawn(folder, drawn):
    for name in ("evals.jsonl", "metrics.jsonl"):
        rows = [json.loads(row) for row in (folder / name).read_text().splitlines()]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows if row["tokens"] <= 200))
    list(reach(read_run(folder)))
    assert drawn[0].series["trained length"][0] == [0, 200]


def test_a_run_asked_once_has_no_curve(folder, drawn):
    rows = (folder / "evals.jsonl").read_text().splitlines()
    (folder / "evals.jsonl").write_text("".join(row + "\n" for row in rows if '"tokens": 400' in row))
    assert list(reach(read_run(folder))) == [] and drawn == []


def test_loss_by_position_has_a_line_and_a_band_a_stage(folder, drawn):
    (section,) = positions(read_run(folder))
    (panel,) = drawn
    assert list(panel.series) == ["after stage 0 (length 128)", "after stage 1 (length 512)"] == list(panel.bands)
    assert panel.series["after stage 1 (length 512)"] == ([32, 96], [2.0, 1.5])
    assert panel.bands["after stage 0 (length 128)"] == ([1.0, 1.0], [2.5, 2.5]) and "95%" in section.text


def test_rows_of_old_runs_have_no_band(folder, drawn):
    rows = [json.loads(row) for row in (folder / "evals.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("low", None)
    (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    list(positions(read_run(folder)))
    assert drawn[0].bands == {} and len(drawn[0].series) == 2
