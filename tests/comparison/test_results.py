"""What a comparison says of folders: hand-made rows in, known means, intervals and verdicts out."""

import json
import math
from pathlib import Path

import pytest

from comparison.arms import ArmsSettings, Claim
from comparison.page import show, tables, verdict_lines, write_page
from comparison.results import Arm, Comparison, Estimate, Verdict, bits_at, estimate, read_arm

BEGIN = 100
"""The step at which arms branch."""


def needle(score: float, length: int = 64, depth: float = 0.0) -> dict:
    return {"task": "needle", "length": length, "depth": depth, "score": score, "count": 4}


def position(score: float, start: int, stop: int, source: str = "a") -> dict:
    return {"task": f"positions/{source}", "length": 64, "score": score, "start": start, "stop": stop}


def write(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True)
    stages = "".join(
        f"[[context.stages]]\nuntil_tokens = {t}\nsequence_length = {n}\n" for t, n in ((800, 16), (900, 64))
    )
    (folder / "config.toml").write_text(f"tokens_per_step = 8\ntotal_tokens = 900\n{stages}")
    branch = {"run": "runs/base", "stage": 1, "step": BEGIN, "tokens": 800, "digest": "d"}
    (folder / "environment.json").write_text(json.dumps({"branched_from": branch}))
    placed = [{"tokens": 8 * row.get("step", BEGIN), "step": BEGIN, **row} for row in rows]
    (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in placed))
    return folder


def test_an_arms_rows_lie_by_steps_since_it_branched(tmp_path: Path) -> None:
    rows = [
        needle(0.1) | {"stage": 0},  # asked under the rotation of before: no arm's
        needle(0.2) | {"stage": 1, "moment": "start"},
        needle(0.5) | {"stage": 1, "step": BEGIN + 10},
        needle(0.7) | {"stage": 1, "step": BEGIN + 10, "depth": 1.0},
        needle(0.9) | {"stage": 1, "step": BEGIN + 30},
    ]
    arm = read_arm(write(tmp_path / "x", rows), "a", 3, "yarn")
    assert (arm.base, arm.seed, arm.name) == ("a", 3, "yarn")
    assert {steps: [row["score"] for row in found] for steps, found in arm.rows.items()} == {
        0: [0.2],
        10: [0.5, 0.7],
        30: [0.9],
    }
    assert read_arm(tmp_path / "nothing", "a", 3, "yarn") is None
    assert read_arm(write(tmp_path / "begun", []), "a", 3, "yarn") is None


def test_a_score_that_is_no_number_is_told_as_such(tmp_path: Path) -> None:
    astray = {"score": None, "step": BEGIN + 10}
    rows = [needle(0.0) | astray, position(0.0, 48, 64) | astray]
    arm = read_arm(write(tmp_path / "x", rows), "a", 3, "yarn")
    assert arm is not None and math.isnan(arm.rows[10][0]["score"]) and math.isnan(bits_at(arm.rows[10], 64) or 0.0)


def test_estimates_are_students() -> None:
    """Three values of standard deviation 1: t of 2 degrees of freedom is 4.3027."""
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert str(found) == "2.00 ±2.48" and found.count == 3
    assert estimate([]) is None and math.isnan(estimate([0.5]).half) and str(estimate([0.5])) == "0.50"
    assert estimate([0.5, 0.5]).half == 0


def test_the_loss_beside_a_needle_is_that_of_its_last_positions() -> None:
    rows = [position(3.0, 0, 16), position(2.0, 16, 32), position(1.0, 48, 64), position(1.5, 48, 64, "b"), needle(0.3)]
    assert bits_at(rows, 64) == 1.25 and bits_at(rows, 16) == 3.0 and bits_at(rows, 128) is None
    rows.append({"task": "held_out/a", "length": 128, "score": 4.0})
    assert bits_at(rows, 128) == 4.0


SETTINGS = ArmsSettings(
    bases={"a": "a.toml"},
    arms={"none": {}, "ntk": {}, "yarn": {}, "abf": {}},
    seeds=(0, 1, 2),
    claims=(Claim(above=("yarn", "abf"), below=("none", "ntk"), length=64),),
)
SCORES = {"none": (0.0, 0.1, 0.2), "ntk": (0.1, 0.2, 0.0), "yarn": (0.8, 0.9, 1.0), "abf": (0.6, 0.8, 0.7)}


def comparison(scores: dict[str, tuple[float, ...]], settings: ArmsSettings = SETTINGS) -> Comparison:
    arms = [
        Arm("a", seed, name, {0: [needle(score), needle(score, depth=1.0), position(2.0 - score, 48, 64)]})
        for name, of_seeds in scores.items()
        for seed, score in enumerate(of_seeds)
    ]
    return Comparison(settings, tuple(arms))


def test_groups_are_compared_seed_by_seed() -> None:
    (verdict,) = comparison(SCORES).verdicts()
    # Seeds: (0.7 - 0.05), (0.85 - 0.15), (0.85 - 0.1).
    wanted = estimate([0.65, 0.70, 0.75])
    assert verdict.difference.mean == pytest.approx(wanted.mean) and verdict.difference.half == pytest.approx(
        wanted.half
    )
    assert verdict.nearest == pytest.approx(0.7 - 0.1)
    assert str(verdict) == (
        "a, zero-shot, needle at 64: {yarn, abf} above {none, ntk} by +0.70 [+0.58, +0.82]; "
        "every arm keeps to its side (+0.60)"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"abf": (0.0, 0.0, 0.1)}, "above {none, ntk} by"),
        ({"abf": (0.0, 0.0, 0.1)}, "single arms overlap (-0.07)"),
        ({"yarn": (0.0, 1.0, 0.0), "abf": (0.2, 0.2, 0.2)}, "no evidence that {yarn, abf} differ from {none, ntk}"),
        ({"yarn": (0.0, 0.0, 0.0), "abf": (0.0, 0.1, 0.1), "none": (0.9, 1.0, 1.0), "ntk": (0.9, 1.0, 1.0)}, "BELOW"),
    ],
)
def test_verdicts_say_which_way_or_that_there_is_no_evidence(changes: dict, words: str) -> None:
    (line,) = verdict_lines(comparison(SCORES | changes))
    assert words in line


def test_seeds_that_an_arm_lacks_are_left_out_and_one_seed_has_no_interval() -> None:
    (verdict,) = comparison(SCORES | {"abf": (0.6, 0.8)}).verdicts()
    assert verdict.difference.count == 2 and verdict.difference.mean == pytest.approx((0.65 + 0.70) / 2)
    (alone,) = comparison({name: scores[:1] for name, scores in SCORES.items()}).verdicts()
    assert "one seed gives no interval: {yarn, abf} less {none, ntk} is +0.65" in str(alone)
    assert isinstance(alone, Verdict) and isinstance(alone.difference, Estimate)


def test_a_verdict_names_the_arms_that_were_measured_and_no_others(tmp_path: Path) -> None:
    found = comparison({name: scores for name, scores in SCORES.items() if name in {"yarn", "none"}})
    (verdict,) = found.verdicts()
    assert verdict.difference.mean == pytest.approx(0.9 - 0.1)
    assert "{yarn} above {none} by +0.80" in str(verdict) and "abf" not in str(verdict) and "ntk" not in str(verdict)
    page = write_page(found, tmp_path / "arms", "").read_text()
    assert (
        "<td>yarn</td>" in page
        and "<td>none</td>" in page
        and "abf" not in page.split("Verdict")[1].split("</table>")[0]
    )
    nothing = comparison({"none": SCORES["none"]})
    assert verdict_lines(nothing) == ["Nothing is measured yet of what is claimed."]
    silent = Comparison(SETTINGS.model_copy(update={"claims": ()}), ())
    assert verdict_lines(silent) == ["The configuration claims nothing."] and not tables(silent)


def test_tables_have_a_row_an_arm_and_a_column_a_moment() -> None:
    ((title, rows),) = tables(comparison(SCORES))
    assert title == "a: needle at 64, bits per byte at position 64"
    assert [row["arm"] for row in rows] == list(SETTINGS.arms)
    assert rows[2] == {"arm": "yarn", "zero-shot": "0.90 ±0.25  1.100"}


def test_tables_show_the_moments_that_are_asked_for() -> None:
    arm = Arm("a", 0, "none", {0: [needle(0.1)], 5: [needle(0.2)], 10: [needle(0.3, length=128)]})
    assert Comparison(SETTINGS, (arm,)).moments == [0, 5, 10]
    some = Comparison(SETTINGS.model_copy(update={"after_steps": (0, 10, 60)}), (arm,))
    assert some.moments == [0, 10] and some.lengths == [64, 128]
    (_, rows), (_, longer) = tables(some)
    assert rows == [{"arm": "none", "zero-shot": "0.10  -", "after 10 steps": "-  -"}]
    assert longer[0]["after 10 steps"] == "0.30  -"


def test_terminal_and_page_hold_tables_verdicts_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = comparison(SCORES)
    show(found)
    shown = capsys.readouterr().out
    assert "0.90 ±0.25  1.100" in shown and "{yarn, abf} above {none, ntk} by +0.70" in shown
    page = write_page(found, tmp_path / "arms", "seeds = [0]\n").read_text()
    for words in (
        "+0.70 [+0.58, +0.82]",
        "0.90 ±0.25",
        "12 of 12 runs",
        "a: needles by length and depth",
        "seeds = [0]",
    ):
        assert words in page
    assert page.count("data:image/png;base64,") == 2
