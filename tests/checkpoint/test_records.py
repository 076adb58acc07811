"""What stands in a run's files is checked by type, and named by its key; what a killed run leaves is passed over."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from checkpoint.manifest import Damaged
from checkpoint.records import EvalsRow, MetricsRow, Record, State, place_of, read_materials, wrong_with
from run.facts import read_run
from run.files import read_bytes, read_text, write_whole
from run.metrics import read_rows
from settings import Refusal

STEP = {"step": 1, "tokens": 10}
CELL = {**STEP, "task": "needle", "length": 8, "depth": 0.5, "score": None, "count": 4}
POSITIONS = {**STEP, "task": "positions/web", "length": 8, "score": 2.0, "start": 0, "stop": 4}
ROUTING = {**STEP, "task": "routing/web", "length": 8, "score": 1.0, "load_0": 0.5, "load_1": 0.5}
KEPT = {"stage_end": [CELL], "guard": {"passed_over": [[1, 2, "why"]], "in_a_row": 1, "history": {"loss": [1.0]}}}


@pytest.mark.parametrize(
    ("kind", "good", "change", "named"),
    [
        (MetricsRow, STEP, {"loss": "low"}, "loss='low'"),
        (MetricsRow, STEP, {"tokens": True}, "tokens=True"),
        (MetricsRow, STEP, {"tokens": 2**63}, "tokens="),
        (MetricsRow, STEP, {"gradient_norm": 10**400}, "gradient_norm="),
        (MetricsRow, STEP, {"loss": float("nan")}, "loss=nan"),
        (MetricsRow, STEP, {"distances": [0, 1]}, "distances begin"),
        (MetricsRow, STEP, {"distances": [1] * 40}, "distances="),
        (EvalsRow, CELL, {"score": [1]}, r"score=\[1\]"),
        (EvalsRow, CELL, {"depth": ...}, "lacks depth"),
        (EvalsRow, CELL, {"task": "gate/needle"}, "lacks limit"),
        (EvalsRow, POSITIONS, {"stop": None}, "stop is no number"),
        (EvalsRow, ROUTING, {"load_0": ...}, "load_0"),
        (EvalsRow, ROUTING, {"load_1": "x"}, "load_1 is no share"),
        (State, KEPT, {"tokens": "x"}, "tokens='x'"),
        (State, KEPT, {"stage_end": [STEP]}, "stage_end.0.task"),
        (State, KEPT, {"verdict": {"stage": 0}}, "verdict.sequence_length"),
        (State, KEPT, {"guard": {"passed_over": [[1, "why", 2]]}}, "guard.passed_over.0.1"),
        (State, KEPT, {"guard": {"in_a_row": 1}}, "in_a_row=1"),
    ],
)
def test_a_wrong_key_is_named(kind: type[Record], good: dict[str, Any], change: dict[str, Any], named: str) -> None:
    assert wrong_with(good, kind) == ""
    table = {key: value for key, value in {**good, **change}.items() if value is not ...}
    with pytest.raises(Refusal, match=named):
        raise Refusal(wrong_with(table, kind))


def test_a_row_is_refused_by_line_and_what_a_killed_run_leaves_is_none(tmp_path: Path) -> None:
    path = tmp_path / "evals.jsonl"
    left = b"\0" * 40 + b"\n" + b"[" * 100_000 + b"\n" + b"\xff\xfe{\n" + json.dumps(CELL)[:-5].encode()
    path.write_bytes(json.dumps(CELL).encode() + b"\n" + left)
    assert read_rows(path, EvalsRow) == [CELL]
    path.write_text(json.dumps(CELL) + "\n" + json.dumps(CELL | {"length": "8"}) + "\n")
    with pytest.raises(Refusal, match=r"evals\.jsonl, line 2: length='8'"):
        read_rows(path, EvalsRow)


def test_a_state_without_its_place_is_refused() -> None:
    assert place_of(STEP, "x") == (1, 10)
    with pytest.raises(Refusal, match=r"x: state\.json lacks tokens"):
        place_of({"step": 1}, "x")


@pytest.mark.parametrize("text", ["[]", '{"tokenizer": 3}'])
def test_materials_that_are_no_digests_are_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "materials.json").write_text(text)
    with pytest.raises(Damaged, match=r"materials\.json"):
        read_materials(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "config.toml"
    os.mkfifo(pipe)
    for read in (read_bytes, read_text):
        with pytest.raises(Refusal, match=r"config\.toml: is no file"):
            read(pipe)
    with pytest.raises(Refusal, match=r"config\.toml"):
        read_run(tmp_path)
    write_whole(pipe, b"x")
    assert read_text(pipe) == "x"
