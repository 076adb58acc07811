"""A gate's verdict is a function of what was measured, and it holds for the run, for every rank, and the next time."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from checkpoint.checkpoints import read_checkpoint
from context.gate import GateSettings
from context.stages import StageSettings
from evals.__main__ import load_checkpoint
from evals.scoring import Cell
from run import exam
from run.config import RunConfig, load_config
from run.gate import Verdict, judge
from run.metrics import plain
from run.start import refusing
from settings import Refusal

TINY = Path(__file__).parents[1] / "tiny.toml"
STAGES = tuple(
    StageSettings(until_tokens=until, sequence_length=length, rotary={"kind": "default", "base": 1e4})
    for until, length in ((100, 64), (200, 128))
)
NEVER = "context.stages.1.gate={needle = 1.0, max_short_loss_increase = 9.0, action = 'stop'}"
SCORES = st.floats(0, 1)
BITS = st.floats(0, 8)


def tiny(*overrides: str) -> RunConfig:
    return load_config(TINY, list(overrides))


def rows(name: str, file: str = "evals.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path("runs") / name / file).read_text().splitlines()]


def gate_rows(name: str) -> list[dict[str, Any]]:
    return [row for row in rows(name) if row["task"].startswith("gate/")]


def die_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let the process fall over in the `step`-th step that it makes."""
    whole, calls = train.train_step, iter(range(1, 1000))

    def falling(*arguments: Any) -> train.StepReport:
        if next(calls) == step:
            raise KeyboardInterrupt("the power failed")
        return whole(*arguments)

    patch.setattr(train, "train_step", falling)


def needles(*scores: float, length: int = 128) -> list[Cell]:
    return [Cell("needle", length, depth, score, 20) for depth, score in enumerate(scores)]


def held_out(length: int = 64, **bits: float) -> list[Cell]:
    return [Cell(f"held_out/{source}", length, None, score, 1000) for source, score in bits.items()]


def verdict(before: list[Cell], after: list[Cell], **gate: Any) -> Verdict:
    return judge(GateSettings(**gate), STAGES, 1, before, after)


@given(st.lists(SCORES, min_size=1, max_size=5), SCORES)
def test_needles_are_met_where_their_mean_reaches_the_demand(scores: list[float], demand: float) -> None:
    others = needles(0.0, 0.0, length=64) + needles(0.0, length=256) + [Cell("needle/multi", 128, 0.5, 0.0, 20)]
    found = verdict([], needles(*scores) + others, needle=demand)
    assert found.is_met == (sum(scores) / len(scores) >= demand - 1e-9)
    assert (found.findings[0].length, found.findings[0].count) == (128, 20 * len(scores))


def test_ninety_of_a_hundred_are_nine_tenths() -> None:
    scores = [hits / 20 for hits in (17, 19, 18, 19, 17)]
    assert sum(scores) / 5 < 0.9, "the sum of the shares is a hair below"
    assert verdict([], needles(*scores), needle=0.9).is_met
    assert not verdict([], needles(*scores[:-1], 16 / 20), needle=0.9).is_met


@given(BITS, BITS, BITS, BITS, st.floats(0, 1))
def test_every_source_has_to_hold(web: float, web_after: float, code: float, code_after: float, margin: float) -> None:
    """One that became better does not make up for one that became worse; other lengths have no say."""
    before = held_out(web=web, code=code) + held_out(128, web=9.0)
    after = held_out(web=web_after, code=code_after) + held_out(128, web=0.0)
    found = verdict(before, after, max_short_loss_increase=margin)
    limit = margin + 1e-9
    expected = {"held_out/web": web_after - web <= limit, "held_out/code": code_after - code <= limit}
    assert {finding.task: finding.is_met for finding in found.findings} == expected
    assert found.is_met == all(expected.values())
    assert {finding.length for finding in found.findings} == {64}


def test_what_was_not_measured_is_not_met() -> None:
    both = {"needle": 0.0, "max_short_loss_increase": 1.0}
    bad = math.nan
    assert verdict(held_out(web=1.0), held_out(web=1.0) + needles(0.0), **both).is_met
    assert not verdict(held_out(web=1.0), held_out(web=1.0), **both).is_met, "no needle"
    assert not verdict(held_out(web=1.0), held_out(web=1.0) + needles(0.0, bad), **both).is_met
    assert not verdict([], held_out(web=1.0) + needles(0.0), **both).is_met, "nothing before"
    assert not verdict(held_out(web=1.0), needles(0.0), **both).is_met, "nothing after"
    assert not verdict([], needles(0.0), **both).is_met
    assert not verdict(held_out(web=1.0, code=1.0), held_out(web=1.0) + needles(0.0), **both).is_met
    assert not verdict(held_out(web=1.0), held_out(web=bad) + needles(0.0), **both).is_met
    assert not verdict(held_out(web=bad), held_out(web=1.0) + needles(0.0), **both).is_met


@given(st.lists(SCORES | st.just(math.nan), max_size=3), BITS | st.just(math.nan), SCORES)
def test_a_verdict_comes_back_from_json(scores: list[float], bits: float, demand: float) -> None:
    found = verdict(held_out(web=1.0), held_out(web=bits) + needles(*scores), needle=demand, max_short_loss_increase=1)
    again = Verdict.from_json(json.loads(json.dumps(plain(found.to_json()), allow_nan=False)))
    assert str(again) == str(found) and again.is_met == found.is_met
    assert [finding.is_met for finding in again.findings] == [finding.is_met for finding in found.findings]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["context.stages.1.gate={action = 'stop'}"], "context.stages.1.gate: asks nothing"),
        (["context.stages.1.gate={needle = 1.5}"], "context.stages.1.gate.needle=1.5"),
        (["context.stages.1.gate={needle = 0.9, action = 'halt'}"], "context.stages.1.gate.action"),
        (["context.stages.1.gate.needle=0.9", "evals.at_stage_ends=false"], "set evals.at_stage_ends=true"),
        (
            ["context.stages.1.gate.needle=0.9", "evals.tasks=['held_out']"],
            "which evals.tasks leaves out",
        ),
        (
            ["context.stages.1.gate.needle=0.9", "evals.needle.lengths=[256, 64]"],
            r"context.stages.1.gate.needle=0.9 needs needle at length 128; set evals.needle.lengths=\[64, 128, 256\]",
        ),
        (
            ["context.stages.1.gate.max_short_loss_increase=0.1", "evals.held_out.lengths=[128]"],
            r"max_short_loss_increase=0.1 needs held_out at length 64; set evals.held_out.lengths=\[64, 128\]",
        ),
        (["context.stages.0.gate.max_short_loss_increase=0.1"], "context.stages.0.gate.*there is none"),
    ],
)
def test_a_gate_that_could_not_be_judged_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(Refusal, match=expected):
        tiny(*overrides)


def test_a_gate_without_its_table_is_refused() -> None:
    table = tiny("context.stages.1.gate={needle = 0.9, max_short_loss_increase = 0.1}").model_dump(exclude_none=True)
    for task in ("needle", "held_out"):
        evals = {key: value for key, value in table["evals"].items() if key != task}
        with pytest.raises(ValueError, match=rf"needs evals.{task}, which has no table; add \[evals.{task}\]"):
            RunConfig(**(table | {"evals": evals}))


@pytest.mark.parametrize("action", ["continue", "warn"])
def test_a_gate_that_does_not_stop_is_told_and_written_down(
    here: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    gate = f"context.stages.0.gate={{needle = 1.0, action = '{action}'}}"
    train.main(tiny(gate, "context.stages.1.gate={needle = 0.0, max_short_loss_increase = 9.0, action = 'stop'}"))
    said = capsys.readouterr().out
    assert ("warning: the gate of context.stages.0 is not met" in said) == (action == "warn")
    assert "the gate of context.stages.0 is not met: needle at length 64: 0, at least 1 is asked for" in said
    assert "the gate of context.stages.1 is met: needle at length 128" in said
    found = {(row["step"], row["stage"], row["task"]): row for row in gate_rows("tiny")}
    assert list(found) == [(8, 0, "gate/needle"), (12, 1, "gate/needle"), (12, 1, "gate/held_out/words")]
    assert [row["is_met"] for row in found.values()] == [0, 1, 1]
    bits = {row["step"]: row["score"] for row in rows("tiny") if row["task"] == "held_out/words"}
    short = found[12, 1, "gate/held_out/words"]
    assert (short["before"], short["score"], short["length"]) == (bits[8], bits[12], 64)
    assert short["limit"] == bits[8] + 9.0
    verdict = Verdict.from_json(read_checkpoint("runs/tiny/checkpoints/step_00000008")[0]["verdict"])
    assert (verdict.stage, verdict.is_met) == (0, False)


def test_a_gate_changes_no_number(here: Path) -> None:
    train.main(tiny("name=without"))
    train.main(tiny("name=with", "context.stages.1.gate={needle = 1.0}", "evals.at_stage_starts=true"))
    losses = [[row["loss"] for row in rows(name, "metrics.jsonl")] for name in ("without", "with")]
    assert losses[0] == losses[1]


def test_a_gate_that_stops_saves_and_says_the_same_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusing(lambda: train.main(tiny(NEVER))) == 2
    first = capsys.readouterr()
    assert "refused: runs/tiny: the gate of context.stages.1 is not met: needle at length 128" in first.err
    assert "held_out" not in first.err.splitlines()[0], "what is met is not told"
    assert "the same command goes on" not in first.out
    before = {path: path.read_bytes() for path in Path("runs/tiny").rglob("*") if path.is_file()}
    assert Path("runs/tiny/checkpoints/step_00000012") in {path.parent for path in before}
    assert refusing(lambda: train.main(tiny(NEVER))) == 2
    second = capsys.readouterr()
    assert second.err == first.err
    assert {path: path.read_bytes() for path in Path("runs/tiny").rglob("*") if path.is_file()} == before


def test_a_gate_stops_in_the_middle_and_its_ways_out_are_ways_out(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands that the refusal names are run as they stand, the dots filled in."""
    three = (
        "total_tokens=8192",
        "context.stages=[{until_tokens = 2048, sequence_length = 64, rotary = {kind = 'default', base = 1e4}}, "
        "{until_tokens = 4096, sequence_length = 128, rotary = {kind = 'linear', base = 1e4, factor = 2.0}, "
        "gate = {needle = 1.0, action = 'stop'}}, "
        "{until_tokens = 8192, sequence_length = 128, rotary = {kind = 'linear', base = 1e4, factor = 2.0}}]",
    )
    assert refusing(lambda: train.main(tiny("name=first", *three))) == 2
    assert [row["step"] for row in rows("first", "metrics.jsonl")][-1] == 8
    said = capsys.readouterr()
    assert "the same command goes on" not in said.out, "it would say the same again"
    back, on = re.findall(r"name=\.\.\. (branch=.*)", said.err)
    back = back.replace("rotary=... or other keys.", "rotary.base=5e4").replace("name=...", "")
    assert refusing(lambda: train.main(tiny("name=second", *three, *shlex.split(back)))) == 2, "it asks again"
    assert [row["step"] for row in rows("second", "metrics.jsonl")] == [5, 6, 7, 8]
    assert refusing(lambda: train.main(tiny("name=third", *three, *shlex.split(on.rstrip("."))))) == 0
    assert [row["step"] for row in rows("third", "metrics.jsonl")] == list(range(9, 17))


@pytest.mark.parametrize("broken_at", [5, 9, 10, 12])
def test_a_broken_run_judges_as_the_unbroken_one(here: Path, monkeypatch: pytest.MonkeyPatch, broken_at: int) -> None:
    gate = "context.stages.1.gate={needle = 0.0, max_short_loss_increase = 0.01}"
    train.main(tiny("name=whole", gate))
    with monkeypatch.context() as broken:
        die_at(broken_at, broken)
        with pytest.raises(KeyboardInterrupt):
            train.main(tiny("name=broken", gate))
    train.main(tiny("name=broken", gate))
    assert gate_rows("broken") == gate_rows("whole") != []
    assert gate_rows("whole")[1]["before"] is not None


@pytest.mark.parametrize("asks", [(), ("evals.needle.samples=3",)])
def test_a_branch_compares_with_the_end_of_the_stage_before(here: Path, asks: tuple[str, ...]) -> None:
    """Whether the other run has asked it or not."""
    train.main(tiny("name=base"))
    gate = "context.stages.1.gate={max_short_loss_increase = 0.01}"
    train.main(tiny("name=whole", gate))
    train.main(tiny("name=second", gate, "branch={run = 'runs/base', stage = 1}", *asks))
    assert gate_rows("second") == gate_rows("whole") != []


def test_a_loss_that_rises_is_caught(here: Path) -> None:
    wild = "context.stages.1.learning_rate.peak=3.0"
    gate = "context.stages.1.gate={max_short_loss_increase = 0.02, action = 'stop'}"
    with pytest.raises(Refusal, match=r"held_out/words at length 64: \d.\d+ -> \d+.\d+ bits per byte, \+"):
        train.main(tiny(wild, gate))


def test_each_stage_begins_with_its_own_questions(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked once, under the new RoPE and of the weights that the stage before has left."""
    asked: list[Any] = []
    whole = exam.run_suite

    def counting(model: Any, *arguments: Any) -> list[Cell]:
        asked.append(model.rotary)
        return whole(model, *arguments)

    monkeypatch.setattr(exam, "run_suite", counting)
    with monkeypatch.context() as broken:
        die_at(9, broken)
        with pytest.raises(KeyboardInterrupt):
            train.main(tiny("evals.at_stage_starts=true", "evals.every_tokens=6144"))
    assert len(asked) == 2
    train.main(tiny("evals.at_stage_starts=true", "evals.every_tokens=6144"))
    assert len(asked) == 3, "the run went on from the stage's end, and its beginning was asked before that was saved"
    starts = [row for row in rows("tiny") if row.get("moment") == "start"]
    ends = [row for row in rows("tiny") if row["step"] == 8 and "moment" not in row]
    assert {(row["step"], row["tokens"], row["stage"], row["trained_length"]) for row in starts} == {(8, 4096, 1, 64)}
    assert {row["stage"] for row in ends} == {0}
    assert [(row["task"], row["length"]) for row in starts] == [(row["task"], row["length"]) for row in ends]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    loaded = load_checkpoint(Path("runs/tiny/checkpoints/step_00000008"), "cpu")
    loaded.model.use_rotary(tiny().context.stages[1].rotary)
    zero_shot = whole(loaded.model, loaded.config.evals, loaded.materials)
    assert [cell.score for cell in zero_shot] == [row["score"] for row in starts]
    assert [row["score"] for row in starts] != [row["score"] for row in ends], "the RoPE is another"
