"""One report of any runs: known folders in; sentences, tables, pictures and CSVs out."""

import base64
import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from comparison.chapters import chapters
from comparison.curves import MOST_POINTS, together
from comparison.measures import headline
from comparison.others import read_other
from comparison.page import show, write_page
from comparison.pooled import pooled
from comparison.results import Comparison, compare_runs
from comparison.seen import SeenRun
from comparison.sheets import write_sheets
from comparison.summary import settings_table, table_of, unlike
from comparison.verdicts import differences, pairs_of
from tests.comparison.folders import held_out, needles, write_run

GOOD, BAD = {64: 1.0, 256: 0.9}, {64: 1.0, 256: 0.1}
MOE = {"max_violation": 0.5, "dead_experts": 0, "router_entropy": 0.9, "balance_loss": 1.1}


@pytest.fixture
def found(tmp_path: Path) -> Comparison:
    """moe is 0.1 bits better on both sources in each of three seeds, and finds needles twice as far."""
    words = []
    for seed in range(3):
        for arm, shift, scores, more in (("dense", 0.0, BAD, {}), ("moe", -0.1, GOOD, MOE)):
            spread = 0.001 * seed * (1 if arm == "moe" else 2)
            rows = [held_out(2.0 + shift + spread), held_out(3.0 + shift + spread, "b"), *needles(scores, 64)]
            rows += [{"task": "positions/a", "length": 128, "score": 2.0, "start": n, "stop": n + 64} for n in (0, 64)]
            config = f"[model]\nnum_dense_layers = {2 if arm == 'dense' else 0}\n"
            metrics = {**more, "flops_per_token": 6.0, "peak_memory_bytes": 2**30}
            folder = write_run(tmp_path / f"{arm}{seed}", rows, seed, config=config, **metrics)
            words.append(f"{arm}={folder}")
    return compare_runs(words)


def test_every_headline_measure_has_its_sentence(found: Comparison) -> None:
    told = {each.measure.name: each for each in found.differences}
    assert list(told) == ["held_out", "held_out/a@128", "held_out/b@128", "needle", "effective_length/needle"]
    assert str(told["held_out"]).startswith(
        "moe is below dense by 0.101 bits per byte of held-out text, mean of 2 sources [0."
    )
    assert "(3 paired seeds): evidence" in str(told["held_out"])
    assert told["effective_length/needle"].ours == 256 and told["effective_length/needle"].theirs == 64
    assert told["needle"].mean == pytest.approx(0.4) and told["needle"].is_evidence


def test_one_seed_has_an_interval_over_what_was_drawn(found: Comparison) -> None:
    """Over the samples of needles; of the effective length none, as hardly any samples would change it."""
    told = {each.measure.name: each for each in differences([run for run in found.runs if run.seed == 0])}
    assert "an interval over the text alone" in str(told["held_out"])
    assert "an interval over the samples alone" in str(told["needle"])
    reach = str(told["effective_length/needle"])
    assert "above dense by 192 tokens" in reach and "[" not in reach and "interval" not in reach


def test_the_page_holds_everything_in_order(found: Comparison, tmp_path: Path) -> None:
    page = write_page(found, tmp_path / "out", "seeds = [0]").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        *("Verdict", "Arms", "Loss", "Needle by length and depth", "Loss by position", "Held-out text by source"),
        *("Routers", "Speed and memory", "Settings"),
    ]
    assert "<li>moe is below dense by 0.101 bits per byte" in page and "seeds = [0]" in page
    assert "num_dense_layers" in page.split("<h2>Settings</h2>")[1].split("</section>")[0]
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 9 and all(base64.b64decode(each).startswith(b"\x89PNG") for each in pictures)
    assert "http" not in page.replace("http-equiv", ""), "self-contained"
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_sheets_hold_the_numbers(found: Comparison, tmp_path: Path) -> None:
    write_sheets(found.runs, found.differences, tmp_path / "out")
    sheets = {
        name: list(csv.DictReader((tmp_path / "out" / f"{name}.csv").open()))
        for name in ("runs", "curves", "differences")
    }
    runs = sheets["runs"]
    assert [(row["arm"], row["seed"]) for row in runs[:2]] == [("dense", "0"), ("moe", "0")]
    assert float(runs[1]["held_out/a@128"]) == pytest.approx(1.9) and runs[1]["effective_length/needle"] == "256.0"
    assert float(runs[0]["flops"]) == 4000 * 6 and float(runs[0]["seconds"]) == 80 and runs[0]["mfu"] == ""
    assert len(sheets["curves"]) == 6 * (40 + 4)
    last = [row for row in sheets["curves"] if row["measure"] == "needle@256" and row["arm"] == "moe"]
    assert float(last[0]["value"]) == 0.9 and float(last[0]["flops"]) == 24000
    assert [row["verdict"] for row in sheets["differences"]] == ["evidence"] * 5
    assert float(sheets["differences"][0]["bootstrap_low"]) < float(sheets["differences"][0]["difference"])


def test_the_terminal_shows_arms_and_verdicts(found: Comparison, capsys: pytest.CaptureFixture) -> None:
    show(found)
    shown = capsys.readouterr().out
    assert "moe is below dense by 0.101 bits per byte" in shown and "1.00 GiB" in shown and "claims" not in shown


def test_arms_stand_side_by_side(found: Comparison) -> None:
    table = {row[""]: row for row in table_of(found.runs)}
    assert table["seeds"]["moe"] == "0, 1, 2" and table["active for each token"]["dense"] == "2K"
    assert table["FLOPs"]["moe"] == "24K" and table["training time"]["moe"] == "1:20" and "MFU" not in table
    assert list(unlike(found.runs)) == ["moe beside dense: nothing told here differs"]
    (row,) = settings_table(found.runs)
    assert row == {"key": "model.num_dense_layers", "dense": "2", "moe": "0"}


def test_arms_that_are_unlike_are_told(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [held_out(2.0)])
    write_run(tmp_path / "b", [held_out(2.0)])
    (tmp_path / "b" / "environment.json").write_text(json.dumps({"parameters": {"total": 6000, "active": 2000}}))
    runs = compare_runs([str(tmp_path / "a"), str(tmp_path / "b")]).runs
    lacking = "; not known of both: FLOPs a token, FLOPs, peak memory"
    assert list(unlike(runs)) == [f"b beside a: parameters +100.0%{lacking}"]
    assert list(unlike(runs, "b")) == [f"a beside b: parameters -50.0%{lacking}"]


def test_runs_of_one_label_that_are_no_seeds_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = []
    for seed, (routing, config) in enumerate(
        [("dense", 'device = "cpu"\n[model]\nwidth = 8\n'), ("top-1 \x1b[31m of 4", "[model]\nwidth = 16\n")]
    ):
        folder = write_run(tmp_path / f"a{seed}", [held_out(2.0)], seed, config=config)
        (folder / "environment.json").write_text(json.dumps({"routing": routing}))
        words.append(f"a={folder}")
    found = compare_runs(words)
    show(found)
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("warning: a: its 2 runs are no seeds of one arm")]
    assert "differ in model.width;" in line and "device" not in line
    assert "dense / top-1" in shown and "\x1b" not in shown
    assert "are no seeds of one arm" in write_page(found, tmp_path / "out", "").read_text()
    (row,) = [row for row in settings_table(found.runs) if row["key"] == "model.width"]
    assert row["a"] == "8 / 16"


def test_seeds_of_one_arm_are_not_warned_of(found: Comparison) -> None:
    for arm in ("dense", "moe"):
        assert not list(pooled([run for run in found.runs if run.arm == arm]))


def test_bare_metrics_of_others_stand_beside_ours(tmp_path: Path) -> None:
    """No tokens, no evaluations: what is left is the loss, against steps."""
    ours = write_run(tmp_path / "ours", [held_out(2.0), *needles(GOOD)])
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    rows = [{"iteration": n, "lm loss": 3.0, "elapsed_time": n} for n in range(1, 41)]
    (theirs / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare_runs([str(ours), str(theirs)])
    (told,) = found.differences
    assert told.measure.name == "loss" and told.verdict == "one seed" and "theirs is above ours by 0.97" in str(told)
    page = write_page(found, tmp_path / "out", "").read_text()
    assert str(told).endswith("(nats a token compare only where tokenizer and text are the same)")
    assert "no count of tokens" in page and "training loss against tokens, seconds, step" in page


def test_scores_that_are_no_numbers_are_told_as_such(tmp_path: Path) -> None:
    astray: dict[int, float | None] = {64: None, 256: 1.0}
    a, b = (
        write_run(tmp_path / "a", [held_out(None), *needles(astray)]),
        write_run(tmp_path / "b", [held_out(2.0), *needles(GOOD)]),
    )
    found = compare_runs([str(a), str(b)])
    assert [each.verdict for each in found.differences] == ["no verdict"] * 3
    assert all("a (seed 0) went astray" in str(each) for each in found.differences)
    write_page(found, tmp_path / "out", "")
    (row, _) = csv.DictReader((tmp_path / "out" / "runs.csv").open())
    assert row["held_out/a@128"] == ""


def test_lengths_and_cells_are_those_that_both_were_asked(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [held_out(2.0), held_out(1.8, length=512), *needles({64: 1.0, 256: 0.0})])
    b = write_run(tmp_path / "b", [held_out(2.5), *needles({64: 0.5, 1024: 1.0})])
    found = {measure.name: samples for measure, samples in headline(compare_runs([str(a), str(b)]).runs)}
    assert {n: sample.value for n, sample in found["held_out/a@128"].items()} == {0: 2.0, 1: 2.5}
    assert {n: sample.value for n, sample in found["needle"].items()} == {0: 1.0, 1: 0.5}


def test_few_arms_are_held_against_each_other_and_many_against_one() -> None:
    assert list(pairs_of(["a", "b", "c"], "b")) == [("b", "a"), ("b", "c"), ("a", "c")]
    assert list(pairs_of(["a", "b", "c", "d"], "c")) == [("c", "a"), ("c", "b"), ("c", "d")]
    assert not list(pairs_of(["a"], None))


def test_flops_of_older_runs_follow_from_their_configuration(tmp_path: Path) -> None:
    from model.size import flops_per_token
    from run.config import load_config
    from settings import to_toml

    config = load_config(Path(__file__).parents[2] / "configs/quickstart.toml", [])
    row = {"step": 1, "tokens": 4096, "loss": 2.0, "sequence_length": 512}
    run = SeenRun("", "a", 0, tmp_path, [row], config_toml=to_toml(config))
    assert run.points[0].flops == pytest.approx(4096 * flops_per_token(config.model, 257, 512))
    assert run.parameters["total"] > run.parameters["active"] and run.routing.startswith("top-2 of 4")
    assert SeenRun("", "a", 0, tmp_path, [row]).points[0].flops is None


def test_runs_that_are_not_as_far_say_so(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, [held_out(2.0)]) for name in "ab")
    for name in ("metrics.jsonl", "evals.jsonl"):
        rows = [json.loads(line) for line in (b / name).read_text().splitlines()]
        half = [{**row, "tokens": row["tokens"] // 2} for row in rows]
        (b / name).write_text("".join(json.dumps(row) + "\n" for row in half))
    found = compare_runs([str(a), str(b)])
    assert [str(each).endswith("(after 2K and 4K tokens)") for each in found.differences] == [True]
    assert found.runs[1].notes[-1] == "not complete: 2,000 of 4,000 tokens"


def test_the_door_reads_runs_and_writes_beside_none_of_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import compare

    a, b = (write_run(tmp_path / name, [held_out(2.0)]) for name in "ab")
    compare.main(compare.parse_arguments(["--runs", f"first={a}", f"second={b}", "--out", str(tmp_path / "out")]))
    assert "second is level with first in bits per byte" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"comparison.html", "comparison.png", "runs.csv", "curves.csv", "differences.csv"}
    for words in ([], ["config.toml", "--runs", str(a)], ["config.toml", "--out", "x"]):
        with pytest.raises(SystemExit):
            compare.parse_arguments(words)


def test_what_was_matched_and_to_which_arm_is_told(found: Comparison) -> None:
    told = list(chapters(found.runs, found.differences, "moe", ["moe: experts as wide as 72"]))
    arms = next(section for section in told if section.title == "Arms")
    assert arms.points == ["moe: experts as wide as 72", "dense beside moe: nothing told here differs"]
    assert {(each.arm, each.other) for each in replace(found, first="moe").differences} == {("dense", "moe")}


def test_bases_are_compared_apart(tmp_path: Path) -> None:
    runs = [
        read_other(write_run(tmp_path / f"{base}{arm}", [held_out(2.0)]), arm, base) for base in "xy" for arm in "ab"
    ]
    found = differences(runs, resamples=50)
    assert [(each.group, each.arm, each.other) for each in found] == [("x", "b", "a"), ("y", "b", "a")]
    told = list(chapters(runs, found, matched=["b: as wide as a"]))
    assert sum("b: as wide as a" in section.points for section in told) == 1
    titles = [section.title for section in told]
    assert "x: Arms" in titles and "x: Scores" in titles and "y: Settings" in titles and titles.count("Verdict") == 1


def test_long_runs_are_thinned_and_keep_their_mean() -> None:
    curve = together([[(n, 2.0 * n, float(n % 2)) for n in range(5000)]])
    assert len(curve.mean[0]) == MOST_POINTS and curve.mean[0][0] == pytest.approx(9.0)
    assert curve.mean[1] == pytest.approx([0.5] * MOST_POINTS)
    both = together([[(n, float(n), 1.0) for n in range(10)], [(n, n + 2.0, 3.0) for n in range(5, 15)]])
    assert both.mean == ([n + 1.0 for n in range(5, 10)], [2.0] * 5) and len(both.seeds) == 2


def test_a_dense_model_routes_nothing_whatever_its_table_of_experts_says(tmp_path: Path) -> None:
    from run.config import load_config
    from settings import to_toml

    config = load_config(Path(__file__).parents[2] / "configs/quickstart_dense.toml", [])
    assert config.model.moe is not None and config.model.routed is None
    assert SeenRun("", "a", 0, tmp_path, [], config_toml=to_toml(config)).routing == "dense"
