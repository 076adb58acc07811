"""The loop as a whole: what it writes, that it resumes bit for bit, that it refuses before it starts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from checkpoint.checkpoints import read_checkpoint
from checkpoint.writing import settle
from run import record, report
from run.config import RunConfig, load_config, rows_of_step
from settings import Refusal

ROOT = Path(__file__).parents[1]
TINY = Path(__file__).parent / "tiny.toml"
STEPS = 12


def tiny(*overrides: str) -> RunConfig:
    return load_config(TINY, list(overrides))


def rows(folder: Path | str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path("runs") / folder / name).read_text().splitlines()]


def numbers(folder: Path | str) -> list[tuple[float, ...]]:
    """What must not change by a single bit when a run is broken off and continued."""
    keys = ("step", "tokens", "stage", "loss", "gradient_norm", "learning_rate", "max_violation", "flops_per_token")
    return [tuple(row[key] for key in keys) for row in rows(folder)]


def scores(folder: Path | str) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in ("step", "task", "length", "score")) for row in rows(folder, "evals.jsonl")]


def die_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process fall over in the middle of a step, as if the power had failed."""
    whole, calls = train.train_step, iter(range(1, 1000))

    def falling(*arguments: Any) -> train.StepReport:
        if next(calls) == step:
            raise KeyboardInterrupt("the power failed")
        return whole(*arguments)

    monkeypatch.setattr(train, "train_step", falling)


def test_a_run_leaves_everything_behind(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "write_report", report.write_report)
    train.main(tiny())
    folder = here / "runs" / "tiny"
    for name in ("config.toml", "environment.json", "metrics.jsonl", "evals.jsonl", "report.html"):
        assert (folder / name).stat().st_size > 0, name
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["step_00000008", "step_00000009", "step_00000012"], "the newest two, and every stage's end"
    recorded = rows("tiny")
    assert [row["step"] for row in recorded] == list(range(1, STEPS + 1))
    assert {"step", "tokens", "stage", "sequence_length", "loss", "bits_per_byte", "learning_rate"} <= recorded[
        0
    ].keys()
    assert {"gradient_norm", "tokens_per_second", "peak_memory_bytes", "balance_loss"} <= recorded[0].keys()
    assert {"router_z_loss", "max_violation", "dead_experts", "router_entropy"} <= recorded[0].keys()
    assert [row["sequence_length"] for row in recorded] == [64] * 8 + [128] * 4
    assert {row["step"] for row in rows("tiny", "evals.jsonl")} == {4, 8, 12}
    assert recorded[-1]["loss"] < recorded[0]["loss"]


@pytest.mark.parametrize("broken_at", [2, 5, 9])
def test_a_broken_run_continues_bit_for_bit(here: Path, monkeypatch: pytest.MonkeyPatch, broken_at: int) -> None:
    train.main(tiny("name=whole"))
    with monkeypatch.context() as broken:
        die_at(broken_at, broken)
        with pytest.raises(KeyboardInterrupt):
            train.main(tiny("name=broken"))
    train.main(tiny("name=broken"))
    assert numbers("broken") == numbers("whole")
    assert {tuple(row) for row in rows("broken")} == {tuple(row) for row in rows("whole")}, "keys, in their order"
    assert scores("broken") == scores("whole")
    (_, _, ours), (_, _, theirs) = read_checkpoint("runs/broken"), read_checkpoint("runs/whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_damaged_checkpoint_is_passed_over_by_name(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(tiny("name=whole"))
    with monkeypatch.context() as broken:
        die_at(8, broken)
        with pytest.raises(KeyboardInterrupt):
            train.main(tiny("name=broken"))
    settle()
    weights = here / "runs/broken/checkpoints/step_00000006/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    train.main(tiny("name=broken"))
    assert "step_00000006 is damaged" in capsys.readouterr().out
    assert numbers("broken") == numbers("whole")


def test_a_finished_run_is_not_trained_again(here: Path) -> None:
    train.main(tiny())
    before = {path: path.stat().st_mtime_ns for path in (here / "runs/tiny/checkpoints").rglob("*")}
    train.main(tiny())
    assert len(rows("tiny")) == STEPS
    assert {path: path.stat().st_mtime_ns for path in (here / "runs/tiny/checkpoints").rglob("*")} == before


def test_fresh_never_continues(here: Path) -> None:
    train.main(tiny())
    train.main(tiny(), fresh=True)
    assert numbers("tiny-2") == numbers("tiny")


def test_another_configuration_is_refused(here: Path) -> None:
    train.main(tiny())
    content = (here / "runs/tiny/config.toml").read_bytes()
    with pytest.raises(Refusal, match=r"(?s)another configuration.*optimizer.learning_rate: 0.003 -> 0.01.*--fresh"):
        train.main(tiny("optimizer.learning_rate=1e-2"))
    assert (here / "runs/tiny/config.toml").read_bytes() == content
    train.main(tiny("log.every_steps=5"))  # changes no number


def test_changed_data_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    die_at(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train.main(tiny())
    (here / "words.txt").write_text((here / "words.txt").read_text() + " one more word")
    with pytest.raises(Refusal, match=r"sources.words"):
        train.main(tiny())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.sources.words.path=nowhere.txt"], "nowhere.txt"),
        (["evals.needle.lengths=[64, 4000000]"], "4000000"),
        (["evals.needle.haystack=wrods"], "words"),
        (["context.stages.1.mixture={wurds = 1.0}"], "words"),
        (["device=cuda"], "cuda"),
        (["model.moe.experts=grouped_mm", "model.moe.expert_width=18"], "expert_width=18"),
    ],
)
def test_refused_before_anything_is_written(here: Path, overrides: list[str], expected: str) -> None:
    if overrides == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(Refusal, match=expected):
        train.main(tiny(*overrides))
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.attention.num_kv_heads=3", "num_kv_heads=3"),
        ("model.moe.experts_per_token=5", "experts_per_token=5"),
        ("total_tokens=6000", "until_tokens=6144"),
        ("context.stages.1.sequence_length=96", "sequence_length=96"),
        ("tokens_per_microbatch=300", "tokens_per_microbatch=300"),
        ("optimizer.lerning_rate=1", "learning_rate"),
        ("model.width='16'", "model.width"),
        ("name=../../elsewhere", "name="),
        ("tokens_per_step=1000000000000000007", "tokens_per_step=1000000000000000007"),
        ("model.width=17", "num_heads=2 must divide width=17"),
        ("model.attention.channels=7", "channels=7 must be even"),
        ("model.moe.router.kind=expert_choice", "balance.kind"),
    ],
)
def test_impossible_values_are_refused_by_name(override: str, expected: str) -> None:
    with pytest.raises(Refusal, match=expected):
        tiny(override)


def test_recompute_and_microbatches_change_no_number_that_matters(here: Path) -> None:
    train.main(tiny("name=plain"))
    train.main(tiny("name=recomputed", "recompute=true"))
    assert numbers("recomputed") == numbers("plain")
    train.main(tiny("name=whole", "tokens_per_microbatch=512"))
    for ours, theirs in zip(rows("whole"), rows("plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-4)


def test_numbers_that_are_none_are_never_saved(here: Path) -> None:
    wild = ("optimizer.learning_rate=1e30", "optimizer.clip=1e30", "checkpoint.every_steps=1")
    with pytest.raises(Refusal, match=r"step \d+: the loss is .*the checkpoint of step \d+ is intact"):
        train.main(tiny(*wild))
    _, _, weights = read_checkpoint("runs/tiny")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize(("ranks", "is_refused"), [(1, False), (2, False), (3, True), (4, True)])
def test_a_step_that_does_not_divide_among_the_ranks_is_refused(ranks: int, is_refused: bool) -> None:
    config = tiny()
    if is_refused:
        with pytest.raises(
            Refusal, match=f"tokens_per_step=512 does not divide among {ranks} ranks.*try tokens_per_step="
        ):
            rows_of_step(config, config.stages.step(0), ranks)
    else:
        assert rows_of_step(config, config.stages.step(0), ranks) == 4


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compilation_changes_no_number_beyond_rounding(here: Path) -> None:
    train.main(tiny("name=plain"))
    train.main(tiny("name=compiled", "compile=true"))
    for ours, theirs in zip(rows("compiled"), rows("plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)


def test_a_dense_model_trains(here: Path) -> None:
    train.main(tiny("name=all-dense", "model.num_dense_layers=2"))
    config = tiny()
    model = config.model.model_copy(update={"moe": None, "num_dense_layers": 0})
    train.main(config.model_copy(update={"name": "without-moe", "model": model}))
    assert numbers_of_dense("all-dense") == numbers_of_dense("without-moe")
    assert "balance_loss" not in rows("all-dense")[0]


def numbers_of_dense(folder: str) -> list[tuple[float, ...]]:
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows(folder)]


def test_bf16_trains_too(here: Path) -> None:
    train.main(tiny("name=fp32"))
    train.main(tiny("name=bf16", "precision=bf16"))
    for ours, theirs in zip(rows("bf16"), rows("fp32"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    assert numbers("bf16") != numbers("fp32")


def test_muon_a_window_pattern_and_a_schedule(here: Path) -> None:
    settings = ["optimizer.kind=muon", "optimizer.schedule={kind = 'wsd', warmup_tokens = 1024}"]
    train.main(tiny("model.attention.window=16", 'model.pattern=["window", "full"]', *settings))
    recorded = rows("tiny")
    assert recorded[-1]["loss"] < recorded[0]["loss"]


def test_a_profile_window_is_written(here: Path) -> None:
    train.main(tiny("profile={start_step = 2, num_steps = 1}"))
    assert [path.name for path in (here / "runs/tiny/profile").iterdir()] == ["step_00000002_rank_0.json"]


def start(*overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
    """A run in a process of its own, in the current folder."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), str(TINY), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_step(name: str, step: int, seconds: float = 120.0) -> None:
    path, end = Path("runs") / name / "metrics.jsonl", time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"{name} did not reach step {step}")


LONG = ("total_tokens=20480", "context.stages.1.until_tokens=20480", "evals.every_tokens=20480")


def test_killed_and_terminated_runs_continue_bit_for_bit(here: Path) -> None:
    train.main(tiny("name=whole", *LONG))
    killed = start("name=signalled", *LONG)
    wait_for_step("signalled", 11)
    killed.kill()
    killed.communicate()
    terminated = start("name=signalled", *LONG)
    wait_for_step("signalled", 20)
    terminated.send_signal(signal.SIGTERM)
    said, _ = terminated.communicate(timeout=60)
    assert terminated.returncode == 0, said
    last = rows("signalled")[-1]["step"]
    assert f"stopped after step {last}; the same command goes on from there" in said
    assert (here / f"runs/signalled/checkpoints/step_{last:08d}").is_dir(), "SIGTERM saves the step it finished"
    final = start("name=signalled", *LONG)
    said, _ = final.communicate(timeout=120)
    assert final.returncode == 0, said
    assert numbers("signalled") == numbers("whole")


@pytest.mark.distributed
def test_two_ranks_give_the_numbers_of_one(here: Path) -> None:
    train.main(tiny("name=one"))
    both = start("name=two", ranks=2)
    said, _ = both.communicate(timeout=180)
    assert both.returncode == 0, said
    for ours, theirs in zip(rows("two"), rows("one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
        assert ours["max_violation"] == pytest.approx(theirs["max_violation"], abs=1e-6)


def test_a_refusal_is_one_message_and_status_2(here: Path) -> None:
    process = start("optimizer.lerning_rate=1")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.count("\n") == 1 and "did you mean 'learning_rate'" in said
