"""What a report says of gates, stages and distances is what the run's files say."""

import json
from pathlib import Path
from typing import Any

import pytest

from run import page
from run.facts import RunFacts, read_run
from run.report import cards, status
from run.sections import needle_grids, sections_of
from run.sections_context import boundaries, distances, gates

STAGE = '[[context.stages]]\nuntil_tokens = {}\nsequence_length = {}\nrotary = {{ kind = "default" }}\n'
GATE = 'gate = { needle = 0.9, max_short_loss_increase = 0.02, action = "stop" }\n'
NEEDLE = {"task": "gate/needle", "length": 512, "score": 0.85, "count": 100, "limit": 0.9, "is_met": 0}
SHORT = {
    "task": "gate/held_out/web",
    "length": 128,
    "score": 2.01,
    "count": 9,
    "limit": 2.02,
    "is_met": 1,
    "before": 2.0,
}


@pytest.fixture(autouse=True)
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are built but not painted, which takes most of a report's time."""
    monkeypatch.setattr(page, "png", lambda figure: b"\x89PNG" + bytes(len(figure.axes)))


def run_of(
    folder: Path, evals: list[dict[str, Any]], metrics: list[dict[str, Any]], around: dict[str, Any] | None = None
) -> RunFacts:
    """A run of two stages of ten steps of 100 tokens."""
    stages = STAGE.format(1000, 128) + STAGE.format(2000, 512) + GATE
    (folder / "config.toml").write_text(f'name = "tiny"\ntotal_tokens = 2000\ntokens_per_step = 100\n{stages}')
    (folder / "environment.json").write_text(json.dumps(around or {}))
    for name, rows in (("evals", evals), ("metrics", metrics)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_run(folder)


def at(step: int, stage: int, **rest: Any) -> dict[str, Any]:
    return {"step": step, "tokens": step * 100, "stage": stage, **rest}


def test_the_gate_is_shown_as_asked_and_as_measured(tmp_path: Path) -> None:
    facts = run_of(tmp_path, [at(20, 1, depth=None, **NEEDLE), at(20, 1, depth=None, **SHORT)], [])
    (section,) = gates(facts)
    assert section.table == [
        {
            "stage": "stage 1 (length 512)",
            "asked": "needle, length 512",
            "demand": "at least 90% found",
            "measured": "85.0%",
            "verdict": "not met: stop",
        },
        {
            "stage": "stage 1 (length 512)",
            "asked": "held_out/web, length 128",
            "demand": "at most +0.020 bits per byte",
            "measured": "2.0000 → 2.0100, +0.0100",
            "verdict": "met",
        },
    ]
    (card,) = [card for card in cards(facts) if card.label.startswith("gate")]
    assert (card.label, card.value, card.note) == ("gate of stage 1 (length 512)", "not met", "not met: needle")


@pytest.mark.parametrize("lost", [{"score": None}, {"score": None, "before": None, "limit": None}])
def test_a_number_that_is_none_is_shown_as_none(tmp_path: Path, lost: dict[str, None]) -> None:
    rows = [at(20, 1, depth=None, **{**SHORT, **lost, "is_met": 0}), at(20, 1, depth=None, **{**NEEDLE, "score": None})]
    (section,) = gates(run_of(tmp_path, rows, []))
    assert [row["measured"] for row in section.table] == ["none", "none"]


def test_without_gates_stages_or_distances_there_is_no_section(tmp_path: Path) -> None:
    facts = run_of(tmp_path, [], [at(1, 0, loss=1.0)])
    assert [*gates(facts), *boundaries(facts), *distances(facts)] == []
    assert "Gate" not in {section.title for section in sections_of(facts)}


def test_stages_are_compared_in_numbers(tmp_path: Path) -> None:
    moe = [
        at(step, 0, documents=20, max_violation=0.1 * step, router_entropy=0.9, dead_experts=0) for step in range(1, 11)
    ]
    moe += [at(step, 1, documents=4, max_violation=2.0, router_entropy=0.5, dead_experts=3) for step in range(11, 16)]
    shift = [at(10, 0, task="routing_shift/web", length=128, score=score, layer=0) for score in (0.5, 0.7)]
    (section,) = boundaries(run_of(tmp_path, shift, moe))
    first, second = section.table
    assert first["documents a step"] == "20" and first["tokens a document"] == "5"
    assert first["busiest expert"] == "0.10 → 1.00" and first["choices kept under the new RoPE"] == "–"
    assert second["tokens a document"] == "25" and second["router entropy"] == "0.50 → 0.50"
    assert second["experts without a token"] == "3 at most" and second["choices kept under the new RoPE"] == "60%"
    dense = [at(step, step // 11, documents=20) for step in range(1, 16)]
    (section,) = boundaries(run_of(tmp_path, [], dense))
    assert list(section.table[0]) == ["stage", "documents a step", "tokens a document"]


def test_loads_stand_side_by_side_for_each_moment(tmp_path: Path) -> None:
    load = {"task": "routing/web", "length": 128, "score": 1.0, "load_0": 0.5, "load_1": 0.5}
    evals = [at(10, 0, layer=layer, **load) for layer in (0, 1)]
    evals += [at(10, 1, layer=layer, moment="start", **load) for layer in (0, 1)]
    evals += [at(20, 1, layer=layer, **load) for layer in (0, 1)]
    metrics = [at(step, (step - 1) // 10, documents=3) for step in range(1, 21)]
    (section,) = boundaries(run_of(tmp_path, evals, metrics))
    (picture,) = section.pictures
    assert picture.png == page.encode(b"\x89PNG" + bytes(4)), "three moments and their scale"


def test_what_was_asked_at_a_start_stands_apart(tmp_path: Path) -> None:
    """It is no last evaluation of a stage and no point of a curve, but a grid of its own beside the stages' ends."""
    cells = [{"task": "needle", "length": 128, "depth": 0.5, "score": 0.5, "count": 2, "trained_length": 128}]
    evals = [at(10, 0, **cells[0]), at(10, 1, moment="start", **cells[0])]
    facts = run_of(tmp_path, evals, [])
    assert [moment.title for moment in facts.moments] == ["after stage 0 (length 128)"]
    facts = run_of(tmp_path, [*evals, at(20, 1, **cells[0])], [])
    titles = ["after stage 0 (length 128)", "start of stage 1 (length 512)", "after stage 1 (length 512)"]
    assert (
        [moment.title for moment in facts.moments] == [grid.title for grid in needle_grids(facts, "needle")] == titles
    )
    assert [grid.trained_length for grid in needle_grids(facts, "needle")] == [128, 128, 512]
    assert [snapshot.title for snapshot in facts.snapshots] == titles[::2]
    assert len(facts.evals) == 2 and len(facts.starts) == 1


def test_distances_are_means_of_the_steps_and_sums_of_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels: list[Any] = []
    monkeypatch.setattr("run.sections_context.lines", lambda alt, content, *_: panels.extend(content))
    rows = [at(5, 0, distances=[100, 90, 100]), at(10, 0, distances=[100, 80, 140, 40]), at(15, 1, distances=[100])]
    assert len(list(distances(run_of(tmp_path, [], rows)))) == 1
    share, pairs = panels
    distance, values = share.series["stage 0 (length 128)"]
    assert distance == [1, 2.5, 5.5] and values == pytest.approx([0.85, 0.60, 0.05])
    assert pairs.series["stage 0 (length 128)"][1] == pytest.approx([850, 600, 50])
    assert share.series["stage 1 (length 512)"] == ([], [])


def test_a_branch_counts_its_own_time_and_says_what_it_is(tmp_path: Path) -> None:
    rows = [at(step, 1, loss=1.0, tokens_per_second=100.0) for step in range(11, 21)]
    facts = run_of(tmp_path, [], rows, {"branched_from": {"run": "runs/base", "stage": 1, "step": 10, "tokens": 1000}})
    assert facts.training_seconds() == pytest.approx(10)
    assert status(facts) == "Complete: 2K tokens, from 1K on as a branch of runs/base, in 0:10 of training."
