"""A branch goes on as the other run would have, differs from its stage on, and is refused another past."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from checkpoint.checkpoints import read_checkpoint
from checkpoint.sealed import read_tensors, verify
from run import exam, record
from run.config import RunConfig, load_config
from run.gate import Verdict
from settings import Refusal

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parents[1] / "tiny.toml"
BRANCH = "branch={run = 'runs/base', stage = 1}"
LINEAR = "context.stages.1.rotary={kind = 'linear', base = 1e4, factor = 2.0}"
BOUNDARY = Path("runs/base/checkpoints/step_00000008")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and the run of twelve steps, eight of them in the first stage, that branches begin with."""
    folder = tmp_path_factory.mktemp("branch")
    words = random.Random(0)
    stock = ["".join(words.choice("abcdefghij") for _ in range(words.randint(2, 7))) for _ in range(50)]
    paragraphs = [" ".join(words.choice(stock) for _ in range(300)) for _ in range(40)]
    (folder / "words.txt").write_text("\n\n".join(paragraphs))
    (folder / "more.txt").write_text("\n\n".join(reversed(paragraphs)))
    with pytest.MonkeyPatch.context() as patch, quiet(patch):
        patch.chdir(folder)
        train.main(tiny("name=base"))
    return folder


@pytest.fixture
def here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that folder to work in."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with quiet(monkeypatch):
        yield tmp_path


@contextmanager
def quiet(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """No reports, as drawing takes longer than training; signal handlers are put back."""
    patch.setattr(record, "write_report", lambda folder: folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def tiny(*overrides: str) -> RunConfig:
    return load_config(TINY, list(overrides))


def rows(name: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = Path("runs") / name / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(name: str, after: int = 0) -> list[tuple[float, ...]]:
    """What must not differ by a single bit between a run and a branch of it that does nothing else."""
    keys = (
        "step",
        "tokens",
        "stage",
        "loss",
        "gradient_norm",
        "learning_rate",
        "max_violation",
        "documents",
        "distances",
    )
    return [tuple(row[key] for key in keys) for row in rows(name) if row["step"] > after]


def scores(name: str, since: int = 0) -> list[tuple[Any, ...]]:
    keys = ("step", "stage", "task", "length", "depth", "score")
    return [
        (*(row[key] for key in keys), row.get("moment")) for row in rows(name, "evals.jsonl") if row["step"] >= since
    ]


def tensors(name: str) -> dict[str, torch.Tensor]:
    """Weights and moments of the last checkpoint."""
    folder = max((Path("runs") / name / "checkpoints").iterdir())
    manifest = verify(folder)
    return read_tensors(folder, "model.safetensors", manifest) | read_tensors(folder, "optimizer.safetensors", manifest)


def die_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let the process fall over in the `step`-th step that it makes."""
    whole, calls = train.train_step, iter(range(1, 1000))

    def falling(*arguments: Any) -> train.StepReport:
        if next(calls) == step:
            raise KeyboardInterrupt("the power failed")
        return whole(*arguments)

    patch.setattr(train, "train_step", falling)


def test_a_branch_with_nothing_changed_is_the_run_it_came_from(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(tiny("name=second", BRANCH))
    assert numbers("second") == numbers("base", after=8) != []
    assert scores("second") == scores("base", since=8)
    ours, theirs = tensors("second"), tensors("base")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    said = capsys.readouterr().out
    assert "branches from runs/base/checkpoints/step_00000008: context.stages.1 begins, 4,096 tokens" in said
    told = [line for line in said.splitlines() if "otherwise than there" in line]
    assert [line.split()[3] for line in told] == ["branch.run:", "branch.stage:"]


@pytest.mark.parametrize("broken_at", [1, 2, 4])
def test_a_broken_branch_goes_on_bit_for_bit(here: Path, monkeypatch: pytest.MonkeyPatch, broken_at: int) -> None:
    """Broken before its first checkpoint it begins again; later it needs the other run no more."""
    overrides = (BRANCH, LINEAR, "evals.at_stage_starts=true")
    train.main(tiny("name=whole", *overrides))
    assert numbers("whole") != numbers("base", after=8)
    with monkeypatch.context() as broken:
        die_at(broken_at, broken)
        with pytest.raises(KeyboardInterrupt):
            train.main(tiny("name=broken", *overrides))
    if broken_at > 1:
        shutil.rmtree("runs/base")
    train.main(tiny("name=broken", *overrides))
    assert numbers("broken") == numbers("whole")
    assert scores("broken") == scores("whole")
    assert all(torch.equal(tensor, tensors("whole")[name]) for name, tensor in tensors("broken").items())


def test_a_branch_of_a_run_that_ended_there(here: Path) -> None:
    """Trained short and finished, then extended: the length of the whole run, and so its schedule, are new."""
    short = tiny("name=base")
    stages = short.context.model_copy(update={"stages": short.context.stages[:1]})
    shutil.rmtree("runs/base")
    train.main(short.model_copy(update={"context": stages, "total_tokens": 4096}))
    train.main(tiny("name=second", BRANCH))
    assert [row["step"] for row in rows("second")] == [9, 10, 11, 12]


def test_a_branch_says_where_it_came_from(here: Path) -> None:
    train.main(tiny("name=second", BRANCH))
    train.main(tiny("name=second", BRANCH))  # finished: nothing changes
    around = json.loads(Path("runs/second/environment.json").read_text())
    digest = json.loads((BOUNDARY / "manifest.json").read_text())["digest"]
    expected = {"run": "runs/base", "stage": 1, "step": 8, "tokens": 4096, "digest": digest}
    assert around["branched_from"] == expected and "restarts" not in around
    assert "branched_from" not in json.loads(Path("runs/base/environment.json").read_text())


def test_a_branch_of_a_branch_begins_where_both_do(here: Path) -> None:
    train.main(tiny("name=second", BRANCH, LINEAR))
    train.main(tiny("name=third", "branch={run = 'runs/second', stage = 1}"))
    assert numbers("third") == numbers("base", after=8)
    assert json.loads(Path("runs/third/environment.json").read_text())["branched_from"]["run"] == "runs/base"
    Path("runs/base/config.toml").write_text(
        Path("runs/base/config.toml")
        .read_text()
        .replace("[model]", '[branch]\nrun = "runs/base"\nstage = 1\n[model]', 1)
    )
    with pytest.raises(Refusal, match="is a branch of itself"):
        train.main(tiny("name=fourth", "branch={run = 'runs/second', stage = 1}"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("context.stages.0.rotary.base=2e4", r"context.stages.0.rotary.base: 10000.0 -> 20000.0"),
        ("context.stages.0.mixture={words = 1.0}", r"context.stages.0.mixture.words: \(left out\) -> 1.0"),
        ("optimizer.learning_rate=1e-2", r"optimizer.learning_rate: 0.003 -> 0.01"),
        ("seed=1", "seed: 0 -> 1"),
        ("model.width=32", "model.width: 16 -> 32"),
        ("data.sources.words.weight=0.8", "data.sources.words.weight: 0.7 -> 0.8"),
        ("data.sources.more={kind = 'text', path = 'more.txt', weight = 0.1}", "data.sources.more.path"),
        ("precision=bf16", 'precision: "fp32" -> "bf16"'),
    ],
)
def test_another_past_is_refused_by_name(here: Path, override: str, expected: str) -> None:
    with pytest.raises(Refusal, match=rf"(?s)branch=.*were trained otherwise:\n.*  {expected}"):
        train.main(tiny("name=second", BRANCH, override))
    assert not Path("runs/second").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ("context.stages.1.mixture={words = 1.0}",),
        ("context.stages.1.sequence_length=256", "evals.needle.samples=1"),
        ("total_tokens=6656", "context.stages.1.until_tokens=6656"),
        ("tokens_per_microbatch=512", "recompute=true", "loss_chunk=128"),
        (
            "data.sources.more={kind = 'text', path = 'more.txt', weight = 0.0}",
            "context.stages.1.mixture={words = 0.5, more = 0.5}",
        ),
    ],
)
def test_what_comes_later_may_differ(here: Path, overrides: tuple[str, ...]) -> None:
    train.main(tiny("name=second", BRANCH, *overrides))
    assert numbers("second") != numbers("base", after=8)
    assert rows("second")[0]["step"] == 9


def test_a_source_that_the_past_drew_from_is_not_new(here: Path) -> None:
    more = "data.sources.more={kind = 'text', path = 'more.txt', weight = 0.5}"
    with pytest.raises(Refusal, match=r"data.sources.more.path"):
        train.main(tiny("name=second", BRANCH, more))
    named = "context.stages.0.mixture={words = 0.7, needles = 0.3}"
    train.main(tiny("name=named", named))
    train.main(tiny("name=third", named, more, "branch={run = 'runs/named', stage = 1}"))


def test_other_data_is_refused(here: Path) -> None:
    Path("words.txt").write_text(Path("words.txt").read_text() + " one more word")
    with pytest.raises(Refusal, match=r"its data was another: sources.needles, sources.words"):
        train.main(tiny("name=second", BRANCH))
    Path("runs/base/materials.json").unlink()
    with pytest.raises(Refusal, match=r"materials.json is missing"):
        train.main(tiny("name=third", BRANCH))
    assert not Path("runs/second").exists() and not Path("runs/third").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("branch={run = 'runs/nowhere', stage = 1}", "runs/nowhere/config.toml: no such file"),
        ("branch={run = 'runs/second', stage = 1}", "this run's own folder"),
    ],
)
def test_no_other_run_is_refused(here: Path, override: str, expected: str) -> None:
    with pytest.raises(Refusal, match=expected):
        train.main(tiny("name=second", override))


@pytest.mark.parametrize(
    ("stage", "expected"), [(0, "greater than or equal to 1"), (2, "the last is context.stages.1")]
)
def test_no_such_stage_is_refused(stage: int, expected: str) -> None:
    with pytest.raises(Refusal, match=expected):
        tiny(f"branch={{run = 'runs/base', stage = {stage}}}")


def test_a_run_without_these_stages_is_refused(here: Path) -> None:
    longer = tiny("name=second").context.stages
    stages = (
        *longer,
        longer[-1].model_copy(update={"until_tokens": 8192}),
        longer[-1].model_copy(update={"until_tokens": 9216}),
    )
    config = tiny("name=second", BRANCH)
    config = config.model_copy(
        update={"context": config.context.model_copy(update={"stages": stages}), "total_tokens": 9216}
    )
    branch = config.branch.model_copy(update={"stage": 3})
    with pytest.raises(Refusal, match="it has 2 of the 3 stages before that one"):
        train.main(config.model_copy(update={"branch": branch}))


def test_a_missing_boundary_is_refused_by_name(here: Path) -> None:
    shutil.rmtree(BOUNDARY)
    with pytest.raises(Refusal, match=r"step_00000008 is missing.*context.stages.1 \(4,096 tokens\)"):
        train.main(tiny("name=second", BRANCH))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "config.toml", "manifest.json"]
)
def test_a_damaged_boundary_is_refused_by_name(here: Path, file: str) -> None:
    content = bytearray((BOUNDARY / file).read_bytes())
    content[len(content) // 2] ^= 1
    (BOUNDARY / file).write_bytes(content)
    with pytest.raises(Refusal, match=r"step_00000008"):
        train.main(tiny("name=second", BRANCH))
    assert rows("second") == []
    (BOUNDARY / file).unlink()
    with pytest.raises(Refusal, match=rf"step_00000008 is damaged: {file}"):
        train.main(tiny("name=second", BRANCH))


def test_a_checkpoint_of_another_run_put_there_is_refused(here: Path) -> None:
    train.main(tiny("name=other", "seed=1"))
    shutil.rmtree(BOUNDARY)
    shutil.copytree("runs/other/checkpoints/step_00000008", BOUNDARY)
    with pytest.raises(Refusal, match="seed: 1 -> 0"):
        train.main(tiny("name=second", BRANCH))


def test_a_verdict_on_the_other_run_does_not_stop_a_branch(here: Path) -> None:
    train.main(tiny("name=warned", "context.stages.0.gate={needle = 1.0, action = 'warn'}"))
    verdict = read_checkpoint("runs/warned/checkpoints/step_00000008")[0]["verdict"]
    assert not Verdict.from_json(verdict).is_met
    gate = "context.stages.0.gate={needle = 0.0, action = 'stop'}"
    train.main(tiny("name=second", "branch={run = 'runs/warned', stage = 1}", gate))
    assert read_checkpoint("runs/second")[0]["step"] == 12


def test_the_end_of_the_stage_before_is_asked_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base has its answers; only another question, or other data to ask of, is asked again."""
    asked: list[str] = []
    whole = exam.run_suite

    def counting(*arguments: Any) -> Any:
        asked.append("asked")
        return whole(*arguments)

    monkeypatch.setattr(exam, "run_suite", counting)
    train.main(tiny("name=alike", BRANCH, "evals.every_tokens=6144"))
    assert len(asked) == 1, "the end of the run alone"
    assert scores("alike")[: len(scores("base", since=8)) // 2] == [row for row in scores("base") if row[0] == 8]
    train.main(tiny("name=otherwise", BRANCH, "evals.needle.samples=3", "evals.every_tokens=6144"))
    assert len(asked) == 3
    before = [row for row in rows("otherwise", "evals.jsonl") if row["step"] == 8 and row["task"] == "needle"]
    assert {row["count"] for row in before} == {3} and {row["stage"] for row in before} == {0}


def test_answers_of_an_earlier_stage_are_not_taken_for_the_last(here: Path) -> None:
    """The base was asked at the end of its first stage, and not at that of its second."""
    stages = ", ".join(
        f"{{until_tokens = {until}, sequence_length = 64, rotary = {{kind = 'default', base = {base}}}}}"
        for until, base in ((2048, 1e4), (5120, 1e2), (6144, 1e1))
    )
    three = (f"context.stages=[{stages}]", "evals.every_tokens=2048")
    train.main(tiny("name=three", *three, "evals.at_stage_ends=false"))
    assert {row[0] for row in scores("three")} == {4, 8, 12}
    train.main(tiny("name=second", *three, "branch={run = 'runs/three', stage = 2}"))
    train.main(tiny("name=asked", *three))
    ends = [row for row in scores("asked") if row[0] == 10]
    assert [row for row in scores("second") if row[0] == 10] == ends != []


def test_the_shift_of_the_routing_is_that_of_the_branch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run has asked what its own next RoPE would do to the routing; a branch has another one."""
    routing, asked = "evals.routing={length = 64, tokens = 256}", []
    whole = exam.shift_routing

    def asking(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return whole(*arguments)

    monkeypatch.setattr(exam, "shift_routing", asking)
    train.main(tiny("name=routed", routing))
    train.main(tiny("name=second", routing, LINEAR, "branch={run = 'runs/routed', stage = 1}"))
    assert asked == [tiny(LINEAR).context.stages[1].rotary]
    shifts = [row for row in scores("second") if row[2].startswith("routing_shift/")]
    assert len(shifts) == 1 and shifts[0][:2] == (8, 0), "one layer of experts, once"
    assert [row[2] for row in scores("second", since=8)] == [row[2] for row in scores("routed", since=8)]


def test_the_weights_that_a_run_began_with_are_not_needed_again(here: Path) -> None:
    initial = "initial.checkpoint=runs/base"
    train.main(tiny("name=warm", initial))
    shutil.rmtree("runs/base")
    train.main(tiny("name=second", initial, "branch={run = 'runs/warm', stage = 1}"))
    assert numbers("second") == numbers("warm", after=8)


def test_boundaries_stay_and_hold_what_a_branch_needs(here: Path) -> None:
    kept = sorted(path.name for path in Path("runs/base/checkpoints").iterdir())
    assert kept == ["step_00000008", "step_00000009", "step_00000012"]
    state, _, _ = read_checkpoint(BOUNDARY)
    assert [row["task"] for row in state["stage_end"]] == [row[2] for row in scores("base") if row[0] == 8]


@pytest.mark.distributed
def test_ranks_branch_from_what_one_process_has_saved_and_stop_alike(here: Path) -> None:
    """Experts shared by two ranks; the gate at the end is told once, and both end with status 2."""
    gate = "context.stages.1.gate={needle = 1.0, action = 'stop'}"
    command = [sys.executable, str(ROOT / "train.py"), str(TINY), "name=second", BRANCH, gate, "parallel.expert=2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            command, env={**shared, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}, stderr=subprocess.PIPE
        )
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert "rank 0: refused: runs/second: the gate of context.stages.1 is not met" in said[0] and not said[1], said
    for ours, theirs in zip(numbers("second"), numbers("base", after=8), strict=True):
        assert ours[:3] == theirs[:3] and ours[3:5] == pytest.approx(theirs[3:5], rel=1e-5)
        assert ours[-2:] == theirs[-2:], "documents and distances are counted over all ranks"
    assert read_checkpoint("runs/second")[0]["verdict"]["stage"] == 1
