"""The fault campaign itself: it has to see what a broken run has lost, and to say so."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.compare import differences
from benchmarks.faults.moments import PHASES, Clock, last_step, newest_checkpoint, resumed_step

ROOT = Path(__file__).parents[2]


def run_of_six_steps(folder: Path) -> Path:
    """Files as a run leaves them, with numbers that no training has made."""
    run = folder / "runs" / "faults"
    saved = run / "checkpoints" / "step_00000006"
    saved.mkdir(parents=True)
    rows = [{"step": n, "tokens": 512 * n, "loss": 5.0 - n / 7, "tokens_per_second": 100.0 + n} for n in range(1, 7)]
    evals = [{"step": 3, "tokens": 1536, "task": "needle", "depth": d, "score": d / 3} for d in (0.0, 1.0)]
    write(run / "metrics.jsonl", rows)
    write(run / "evals.jsonl", evals)
    for name in ("config.toml", "materials.json", "checkpoints/step_00000006/model.safetensors"):
        (run / name).write_bytes(name.encode() * 3)
    return run


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change(run: Path, name: str, act: Callable[[list[dict[str, Any]]], object]) -> None:
    """Let `act` change the rows of a file."""
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    act(rows)
    write(run / name, rows)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "one digit": (
        lambda run: change(run, "metrics.jsonl", lambda rows: rows[3].update(loss=rows[3]["loss"] + 1e-15)),
        "step 4: loss",
    ),
    "a score": (lambda run: change(run, "evals.jsonl", lambda rows: rows[1].update(score=0.5)), "step 3: score"),
    "a number that is missing": (
        lambda run: change(run, "metrics.jsonl", lambda rows: rows[0].pop("loss")),
        "step 1: loss",
    ),
    "a number too many": (lambda run: change(run, "metrics.jsonl", lambda rows: rows[0].update(new=1)), "step 1: new"),
    "a row doubled": (
        lambda run: change(run, "metrics.jsonl", lambda rows: rows.insert(2, rows[1])),
        "step 2: 1 rows too many",
    ),
    "a row lost": (lambda run: change(run, "metrics.jsonl", lambda rows: rows.pop(2)), "step 3: 1 rows lost"),
    "an eval doubled": (
        lambda run: change(run, "evals.jsonl", lambda rows: rows.append(rows[1])),
        "evals.jsonl: step 3: 1 rows too",
    ),
    "rows out of order": (
        lambda run: change(run, "metrics.jsonl", lambda rows: rows.reverse()),
        "step 6 stands where step 1",
    ),
    "a torn line": (lambda run: (run / "metrics.jsonl").open("a").write('{"step": 7, "to'), "torn line"),
    "no rows": (lambda run: (run / "evals.jsonl").unlink(), "evals.jsonl: is missing"),
    "a temporary file": (lambda run: (run / ".partial_config.toml").touch(), ".partial_config.toml: left over"),
    "a checkpoint half written": (lambda run: (run / "checkpoints/.partial_step_00000009").mkdir(), "left over"),
    "a checkpoint too many": (lambda run: (run / "checkpoints/step_00000003").mkdir(), "step_00000003: left over"),
    "a checkpoint lost": (lambda run: shutil.rmtree(run / "checkpoints/step_00000006"), "step_00000006: is missing"),
    "a byte of a checkpoint": (
        lambda run: (run / "checkpoints/step_00000006/model.safetensors").write_bytes(b"x"),
        "other bytes",
    ),
    "another configuration": (lambda run: (run / "config.toml").write_bytes(b"x"), "config.toml: other bytes"),
    "a file beside the run": (lambda run: (run.parents[1] / "core").touch(), "core: left over"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_difference_is_found(tmp_path: Path, damage: str) -> None:
    run_of_six_steps(tmp_path / "whole")
    act, expected = DAMAGE[damage]
    act(run_of_six_steps(tmp_path / "broken"))
    lines = differences(tmp_path / "whole", tmp_path / "broken")
    assert any(expected in line for line in lines), lines


def test_two_runs_that_differ_in_speed_alone_are_the_same(tmp_path: Path) -> None:
    run_of_six_steps(tmp_path / "whole")
    run = run_of_six_steps(tmp_path / "broken")
    change(run, "metrics.jsonl", lambda rows: [row.update(tokens_per_second=7.0) for row in rows])
    assert differences(tmp_path / "whole", tmp_path / "broken") == []


def clock() -> Clock:
    """Of a run of six steps, two stages, and two checkpoints."""
    rows = {step: 1.0 + step for step in range(1, 7)}
    return Clock(3, [3, 6], rows, {3: 4.1, 6: 7.1}, {3: (4.2, 4.3), 6: (7.2, 7.3)}, 9.0)


def test_kills_come_in_every_phase_and_ahead_of_what_is_saved() -> None:
    dice, drawn = random.Random(0), []
    for done in (0, 3):
        moments = [moment for _ in range(300) if (moment := clock().draw(dice, done))]
        assert all(moment.step > done for moment in moments if moment.phase != "start")
        assert all(0 <= moment.seconds <= clock().spread(moment.phase, moment.step) for moment in moments)
        drawn += moments
    assert {moment.phase for moment in drawn} == set(PHASES)
    assert {moment.step for moment in drawn if moment.phase == "step"} == {1, 2, 3, 4, 5}
    at_the_end = [clock().draw(dice, 6) for _ in range(100)]
    assert {moment.phase for moment in at_the_end if moment} == {"start"} and None in at_the_end


def test_where_a_run_stands_is_read_from_its_files(tmp_path: Path) -> None:
    assert (last_step(tmp_path), newest_checkpoint(tmp_path)) == (0, 0)
    run = run_of_six_steps(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tok')
    assert (last_step(run), newest_checkpoint(run)) == (6, 6)
    assert resumed_step("runs/faults: continues at step 15, 7,680 tokens\n") == 15
    assert resumed_step("attention: full layers by sdpa\n") is None


BROKEN_PRODUCT = """
import random, sys
from pathlib import Path
from benchmarks.faults.bench import Bench
from benchmarks.faults.kills import kill_runs
from benchmarks.faults.lives import warm_up
from benchmarks.faults.moments import Moment

def forget_to_drop_rows():
    import run.metrics
    run.metrics._open_at = lambda path, last_step: path.open("a", encoding="utf-8")

warm_up()
import run.record
run.record.write_report = lambda folder: folder  # drawing takes longer than training here
bench = Bench(Path(sys.argv[1]), 0)
start, clock = bench.whole(1)
clock.draw = lambda dice, done: Moment("step", 0.0, 5) if done < 5 else None
good = kill_runs(start, clock, 1, random.Random(0), above=bench.above)
assert good.problems == [] and good.kills == 1 and good.repeated == 2 and good.lost == 0, good
start = start.prepared(forget_to_drop_rows)
bad = kill_runs(start, clock, 1, random.Random(0), above=bench.above / "bad")
assert any("rows too many" in line for line in bad.problems), bad
"""


def test_a_product_that_doubles_rows_does_not_pass(tmp_path: Path) -> None:
    """In a process of its own: it forks, and this one has computed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BROKEN_PRODUCT, str(tmp_path)]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
