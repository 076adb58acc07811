"""Others' metrics.jsonl under our names, with their units; what says neither a step nor a loss is refused by name."""

import json
from pathlib import Path

import pytest

from comparison.others import read_foreign, read_other, read_runs
from comparison.summary import table_of
from settings import Refusal
from tests.comparison.folders import held_out, write_run


def write(folder: Path, *rows: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder / "metrics.jsonl"


@pytest.mark.parametrize(
    "row",
    [
        {"step": 7, "tokens": 700, "loss": 2.5},
        {"iteration": 7, "consumed_tokens": 700, "lm loss": 2.5},
        {"_step": 7, "train/loss": 2.5, "train/tokens": 700, "_runtime": 3.5},
        {"step": 7, "train": {"loss": 2.5, "n_tokens_seen": 700}},
        {"step": 7, "loss_metrics/global_avg_loss": 2.5, "total_tokens": 700.0},
        {"global_step": 7.0, "train_loss": 2.5, "num_input_tokens_seen": 700},
        {"step": 7, "train/CE loss": 2.5, "throughput/total_tokens": 700},
    ],
)
def test_names_that_others_give(row: dict, tmp_path: Path) -> None:
    ((found,), _) = read_foreign(write(tmp_path, row))
    assert (found["step"], found["tokens"], found["loss"]) == (7, 700, 2.5) and isinstance(found["step"], int)


def test_units_are_ours(tmp_path: Path) -> None:
    row = {"step": 1, "loss": 2, "mfu(%)": 40.0, "memory/max_reserved(GiB)": 2.0, "throughput(tps)": 9.0}
    ((found,), _) = read_foreign(write(tmp_path, row))
    assert found["mfu"] == 0.4 and found["peak_memory_bytes"] == 2**31 and found["tokens_per_second"] == 9.0


def test_a_throughput_that_names_no_unit_is_no_speed(tmp_path: Path) -> None:
    """Megatron's keys: its throughput counts TFLOP a second and GPU."""
    row = {"iteration": 1, "lm loss": 2.0, "throughput": 412.5, "learning-rate": 3e-4, "grad-norm": 0.5}
    ((found,), _) = read_foreign(write(tmp_path, row))
    assert found == {"step": 1, "loss": 2.0, "learning_rate": 3e-4, "gradient_norm": 0.5}


def test_rows_without_a_loss_are_others_and_the_last_of_a_step_counts(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"step": 2, "loss": 3.0},
        {"step": 1, "loss": 9.0},
        {"step": 2, "eval/loss": 1.0},
        {"step": 2, "loss": 2.0},
        '{"step": 3, "loss": NaN}',
    )
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [(row["step"], row["loss"]) for row in read_foreign(path)[0]] == [(1, 9.0), (2, 2.0), (3, None)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"step": 1, "accuracy": 0.5}],
            r"metrics.jsonl, line 1: loss is not there.* loss, train_loss.*step, accuracy",
        ),
        ([{"loss": 1.0}], r"metrics.jsonl, line 1: step is not there"),
        ([], r"metrics.jsonl, line 1: step is not there.*no keys"),
        ([{"step": 1, "loss": 1.0}, {"step": 2, "loss": "low"}], r"metrics.jsonl, line 2: loss='low' is no number"),
        ([{"step": 1, "loss": 1.0}, "{nonsense", {"step": 2, "loss": 1.0}], r"line 2: is no JSON object"),
        ([[1, 2]], r"line 1: is no JSON object"),
        ([{"step": 1, "loss": 1.0}, {"step": 1e300, "loss": 1.0}], r"line 2: step=1e\+300 is beyond 1e\+18"),
        ([{"step": 1, "tokens": 10**400, "loss": 1.0}], r"line 1: tokens=10{19} is beyond 1e\+18"),
        ([{"step": 0.5, "loss": 1.0}], r"line 1: step=0.5 is no whole number"),
    ],
)
def test_what_cannot_be_read_is_refused_by_file_line_and_key(rows: list, words: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=words):
        (read_foreign(write(tmp_path / "x", *rows)))


def test_a_run_of_others_says_what_is_not_known_of_it(tmp_path: Path) -> None:
    run = read_other(write(tmp_path / "theirs", {"iteration": 1, "loss": 2.0}).parent, "theirs")
    assert run.seed is None and run.tokens is None and run.points[0].tokens is None and run.points[0].flops is None
    assert run.notes[0] == "somebody else's metrics: step from iteration, loss from loss"
    assert any("no count of tokens" in note for note in run.notes) and any("no FLOPs" in note for note in run.notes)


def test_places_on_the_axes_add_up(tmp_path: Path) -> None:
    rows = [{"step": n, "tokens": 100 * n, "loss": 1.0, "tps": 50, "flops_per_token": 6.0} for n in (1, 2, 4)]
    run = read_other(write(tmp_path / "theirs", *rows).parent, "theirs")
    assert [(point.tokens, point.flops, point.seconds) for point in run.points] == [
        (100, 600.0, 2.0),
        (200, 1200.0, 4.0),
        (400, 2400.0, 8.0),
    ]


@pytest.mark.parametrize("loss", [10**400, -(10**400), 1e308, float("inf")])
def test_a_loss_beyond_sense_is_that_of_a_run_gone_astray(loss: float, tmp_path: Path) -> None:
    row = {"step": 1, "loss": loss, "tps": 10**400, "mfu": 1e300}
    assert read_foreign(write(tmp_path, row))[0] == [{"step": 1, "loss": None}]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([4096, 4096, 4096], "does not grow, being 4,096 on all 3 rows"),
        ([300, 200, 100], "falls from 300 at step 1 to 200 at step 2"),
        ([-5, 100, 200], "is below 0"),
    ],
)
def test_tokens_that_count_no_sum_are_left_out_and_named(values: list[int], words: str, tmp_path: Path) -> None:
    rows = [{"step": n, "n_tokens_seen": value, "loss": 1.0, "tps": 50.0} for n, value in enumerate(values, 1)]
    run = read_other(write(tmp_path / "theirs", *rows), "theirs")
    assert run.tokens is None and any(f"n_tokens_seen: {words}" in note for note in run.notes)
    assert run.end is not None and run.end.seconds is None and run.median("tokens_per_second") == 50
    assert any("a speed alone" in note for note in run.notes)
    assert "training time" not in [row[""] for row in table_of([run])]


def test_elapsed_time_of_each_step_is_no_time_since_the_start(tmp_path: Path) -> None:
    rows = [{"step": n, "loss": 1.0, "elapsed_time": value} for n, value in enumerate([0.5, 0.4, 0.6], 1)]
    run = read_other(write(tmp_path / "theirs", *rows), "theirs")
    assert run.end is not None and run.end.seconds is None and any("elapsed_time: falls" in note for note in run.notes)


def test_mfu_below_nothing_is_left_out_and_percent_are_shares(tmp_path: Path) -> None:
    """As nanoGPT writes it: -100 until it is known, then percent."""
    rows = [{"iter": n, "train/loss": 1.0, "mfu": value} for n, value in enumerate([-100.0, 40.0, 42.0], 1)]
    run = read_other(write(tmp_path / "theirs", *rows), "theirs")
    assert [row.get("mfu") for row in run.metrics] == [None, 0.4, 0.42]
    assert any("taken as percent" in note for note in run.notes) and any("left out on 1 row " in n for n in run.notes)


def test_a_mark_at_the_start_of_a_file_is_none_of_its_content(tmp_path: Path) -> None:
    path = write(tmp_path, {"step": 1, "loss": 2.0})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_foreign(path)[0] == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("content", ["{nonsense", "[1]", '{"parameters": 3}'])
def test_a_damaged_environment_of_others_is_told_without_our_way_out(content: str, tmp_path: Path) -> None:
    folder = write(tmp_path, {"step": 1, "loss": 2.0}).parent
    (folder / "environment.json").write_text(content)
    with pytest.raises(Refusal, match=r"environment.json: .*move it away") as refused:
        read_other(folder, "theirs")
    assert "--fresh" not in str(refused.value)


def test_labels_make_arms_and_configurations_tell_seeds(tmp_path: Path) -> None:
    for name, seed in (("a0", 0), ("a1", 1), ("b", 0)):
        write_run(tmp_path / name, [held_out(2.0)], seed)
    theirs = write(tmp_path / "theirs", {"step": 1, "loss": 2.0})
    words = [f"a={tmp_path / 'a0'}", f"a={tmp_path / 'a1'}", str(tmp_path / "b"), str(theirs)]
    runs = read_runs(words)
    assert [(run.arm, run.seed) for run in runs] == [("a", 0), ("a", 1), ("b", 0), ("theirs", None)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a={}/a", "a={}/b"], "is arm 'a' with seed 0, and so is .*give one of them another label"),
        (["x={}/a", "y={}/a"], "names a folder twice"),
        (["{}/nothing"], "holds neither config.toml nor metrics.jsonl"),
        (["={}/a"], "write LABEL=PATH"),
        (["{}/empty"], "has measured nothing yet"),
        (["\x1b[31mred={}/a"], "cannot be shown; give it a label"),
        (["{}/\x1b[31m"], "cannot be shown; give it a label"),
        (["/"], "'' cannot be shown"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, [held_out(2.0)])
    write_run(tmp_path / "empty", [])
    (tmp_path / "empty" / "metrics.jsonl").unlink()
    with pytest.raises(Refusal, match=message):
        read_runs([word.format(tmp_path) for word in words])
