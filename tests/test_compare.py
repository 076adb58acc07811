"""The command: what it plans, that it goes on where it was stopped, and what it says in the end."""

import re
from pathlib import Path

import pytest

import compare
from comparison import launch, matched
from comparison.arms import expand, read_arms
from planning.device import published
from run.facts import read_run
from run.start import refusing
from settings import Refusal
from tests.comparison.test_arms import ARMS, BASE
from tests.comparison.test_launch import TRAINER
from tests.words import write_words

ASKED = """
import json
arm = config["name"].split(".")[-1]
score = {"none": 0.1, "yarn": 0.9}.get(arm, 0.0)
(folder / "config.toml").write_text(pathlib.Path(sys.argv[1]).read_text())
begin = {"step": 2, "tokens": 128}
(folder / "environment.json").write_text(json.dumps({"branched_from": begin | {"run": "x", "stage": 1}}))
row = {"task": "needle", "length": 64, "depth": 0.0, "score": score, "count": 1}
rows = [row | begin | {"stage": 1, "moment": "start"}, row | {"step": 3, "tokens": 192, "stage": 1}]
(folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A comparison whose runs answer at once what their arm's name says."""
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path)
    (tmp_path / "a.toml").write_text(BASE)
    (tmp_path / "b.toml").write_text(BASE)
    (tmp_path / "arms.toml").write_text(ARMS)
    (tmp_path / "trainer.py").write_text(TRAINER.replace("time.sleep(0.2)", "") + ASKED)
    monkeypatch.setattr(launch, "TRAIN", tmp_path / "trainer.py")
    monkeypatch.setattr(launch, "PAUSE", 0.01)
    return tmp_path / "arms.toml"


def call(*words: object) -> None:
    compare.main(compare.parse_arguments([str(word) for word in words]))


def test_it_plans_trains_and_says_what_was_found(path: Path, capsys: pytest.CaptureFixture) -> None:
    call(path, "--show")
    planned = capsys.readouterr().out
    assert "arms.b.5.yarn" in planned and "12 runs, 12 of them to train, 1 at a time" in planned
    assert "64 tokens, ends at length 64 under yarn" in planned and not Path("runs").exists()
    call(path)
    said = capsys.readouterr().out
    assert "[12/12]" in said and "a, zero-shot, needle at 64: {yarn} above {none} by +0.80" in said
    assert "after 1 step," in said and Path("runs/arms/comparison.html").is_file()
    call(path)
    assert "trained in" not in capsys.readouterr().out, "all were finished"
    call(path, "--show")
    assert "12 runs, 0 of them to train" in capsys.readouterr().out


def test_reports_of_what_is_there_so_far(path: Path, capsys: pytest.CaptureFixture) -> None:
    call(path, "--report")
    assert "Nothing is measured yet of what is claimed." in capsys.readouterr().out
    call(path, "--small", "--name", "few", "only=['a', 'none', 'yarn']")
    out = capsys.readouterr().out
    assert "one seed gives no interval: {yarn} less {none} is +0.80" in out
    assert {folder.name for folder in Path("runs").iterdir()} == {
        "arms",
        "few",
        "few.a.0",
        "few.a.0.none",
        "few.a.0.yarn",
    }


def test_an_arm_that_fails_is_told_of_beside_what_the_others_have_shown(
    path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = (path, "seeds=[0]", "only=['a']")
    Path("fail_arms.a.0.none").touch()
    assert refusing(lambda: call(*few)) == 2
    said = capsys.readouterr()
    assert "[3/3]" in said.out and "arms.a.0.yarn: trained" in said.out and Path("runs/arms/comparison.html").is_file()
    assert "refused: arms.a.0.none: did not finish" in said.err and "another --name" in said.err
    Path("fail_arms.a.0.none").unlink()
    call(*few)
    assert capsys.readouterr().out.count("trained in") == 1


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("context.stages.1.buckets.words = [{ from_tokens = 100_000, share = 1.0 }]", r"words"),
        ('evals = { tasks = ["needle"], needle = { lengths = [64], haystack = "books" } }', r"books"),
        ('data.sources.more = { kind = "text", path = "missing.txt", weight = 0.0 }', r"missing.txt"),
        ("context.stages.1.tokens_per_step = 1_073_741_824", r"tokens_per_step=1073741824"),
        ("parallel.context = 2", r"parallel.context=2 does not divide the 1 ranks"),
        ("parallel.expert = 2", r"parallel.expert=2 does not divide the 1 ranks"),
    ],
)
@pytest.mark.parametrize("option", ["--show", "--small"])
def test_what_one_arm_could_not_be_trained_on_is_refused_before_any_trains(
    path: Path, key: str, expected: str, option: str
) -> None:
    experts = "every.model.moe = { num_experts = 4, experts_per_token = 2, expert_width = 8 }\n"
    path.write_text(experts + ARMS.replace("[arms.yarn]", f"[arms.yarn]\n{key}"))
    with pytest.raises(Refusal, match=rf"^few.a.[03].yarn: .*{expected}"):
        call(path, "--name=few", option)
    assert not Path("runs").exists()
    call(path, "--name=few", "--report")


def test_the_shipped_demonstration_shares_one_base_among_seven_arms(monkeypatch, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    shipped = root / "configs" / "context" / "extension_arms.toml"
    entries = expand(read_arms(shipped, []), shipped, "x")
    assert len(entries) == 2 * 3 * (1 + 7)
    kinds = [entry.config.context.stages[-1].rotary.kind for entry in entries[1:8]]
    assert kinds == ["default", "linear", "ntk", "yarn", "llama3", "abf", "none"]
    for entry in entries:
        assert (entry.arm is None) == (entry.config.branch is None)
        if entry.arm is not None:
            start = entry.config.stages[1].start_tokens
            every = entry.config.evals.every_tokens
            asked = {
                tokens // 4096 - start // 4096 for tokens in range(start + every, entry.config.total_tokens + 1, every)
            }
            assert entry.config.evals.at_stage_starts and {10, 30, 60} <= asked


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--small"], "--small: goes with the file"),
        (["--show", "--report"], "--show, --report: goes with the file"),
        (["--name", "../esc"], "--name '../esc': names a folder"),
        (["--name", "a\nb"], "--name 'a.nb': names a folder"),
        (["--name", "a\n"], "--name 'a.n': names a folder"),
        (["--name", "a", "--out", "b"], "give one of them"),
        (["seeds=[0]"], "give the file of a comparison, or --runs"),
    ],
)
def test_what_does_not_go_with_runs_that_exist_is_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.parse_arguments([*words, "--runs", "f"])
    assert ended.value.code == 2 and re.search(told, capsys.readouterr().err.replace("\\", "."))


PAIR = """
seeds = [0]
bases.words = "base.toml"
[arms.dense]
[arms.moe]
model.num_dense_layers = 0
[match]
to = "dense"
multiple_of = 1
"""
TRAINED = """
total_tokens = 2048
tokens_per_step = 256
device = "cpu"
precision = "fp32"
threads = 1
trial = false
model.num_layers = 1
model.width = 16
model.num_dense_layers = 1
model.feed_forward_width = 64
model.attention = { num_heads = 2, num_kv_heads = 2 }
model.moe = { num_experts = 4, experts_per_token = 2, expert_width = 8 }
data.sources.words = { kind = "text", path = "words.txt", held_out = 0.1 }
optimizer = { kind = "adamw", learning_rate = 1e-3 }
evals.held_out = { lengths = [32], tokens = 512 }
log = { every_steps = 1, tensorboard = false }

[[context.stages]]
until_tokens = 2048
sequence_length = 32
rotary = { kind = "default", base = 1e4 }
"""


def test_a_dense_run_and_a_mixture_of_its_size_are_trained_and_held_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Trained for real, side by side: the mixture as wide as was found, on the same rows at the same steps."""
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path)
    (tmp_path / "base.toml").write_text(TRAINED)
    (tmp_path / "pair.toml").write_text(PAIR)
    call("pair.toml", "jobs=2")
    said = capsys.readouterr().out
    assert "words, moe, beside dense: model.moe.expert_width: 8 -> 31" in said and "[2/2]" in said
    assert "the same data in the same order, 2,048 tokens in 8 steps" in said
    dense, moe = (read_run(Path(f"runs/pair.words.0.{arm}")) for arm in ("dense", "moe"))
    assert (
        moe.config["model"]["moe"]["expert_width"] == 31
        and "expert_width" in Path("runs/pair/matched.json").read_text()
    )
    assert abs(moe.environment["parameters"]["active"] / dense.environment["parameters"]["active"] - 1) < 0.02
    assert [row["documents"] for row in moe.metrics] == [row["documents"] for row in dense.metrics]
    assert [row["distances"] for row in moe.metrics] == [row["distances"] for row in dense.metrics]
    page = Path("runs/pair/comparison.html").read_text()
    assert "parameters that a token meets" in page and "moe" in page
    call("pair.toml", "jobs=2")
    assert "trained in" not in capsys.readouterr().out, "all was there"
    with pytest.raises(Refusal, match=r"matched.json: moe on words was matched for other settings"):
        call("pair.toml", "match.by='total'", "--show")


@pytest.mark.parametrize("name", ["dense_moe", "dense_moe_h200", "isoflop", "sweep"])
@pytest.mark.parametrize("is_small", [False, True])
def test_every_shipped_comparison_can_be_planned(
    name: str, is_small: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped = Path(__file__).parents[1] / "configs" / "compare" / f"{name}.toml"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matched, "device_for", lambda config: published("h200"))
    settings = read_arms(shipped, [], is_small=is_small)
    entries = expand(settings, shipped, "x")
    assert len(entries) == len(settings.chosen_arms) * len(settings.seeds)
    for entry in entries:
        if entry.matched is not None:
            assert abs(entry.matched.measures.active / entry.matched.other.active - 1) < 0.02
    if name == "dense_moe_h200" and not is_small:
        assert entries[1].matched is not None and entries[1].matched.measures.total > 8e8
        assert 0.9e8 < entries[1].matched.measures.active < 1.1e8
