"""The door: a checkpoint on the disk is asked as its run would have asked it."""

import json
import os
import re

import pytest
import torch

import evals.__main__ as asking
import train
from checkpoint.checkpoints import Checkpoints
from evals.__main__ import check_out, load_checkpoint, main, parse_arguments, read_rotary, refuse_token_choosers
from evals.defaults import SLOW, choose, tables_around, with_lengths
from evals.suite import TASKS, EvalsSettings, check_suite, run_suite, tasks_of
from model.initialize import initialize
from model.transformer import ModelSettings, build_model
from run.config import load_config
from settings import Refusal, to_dict, validate

CONFIG = """
total_tokens = 1024
tokens_per_step = 256
precision = "fp32"
optimizer = { kind = "adamw", learning_rate = 1e-3, schedule = { kind = "constant" } }

[model]
num_layers = 1
width = 16
attention = { num_heads = 2, num_kv_heads = 1 }
moe = { num_experts = 4, experts_per_token = 2, expert_width = 16 }

[data]
prepared = "PREPARED"
sources = { words = { kind = "text", path = "WORDS", held_out = 0.3 } }

[evals]
seed = 5
needle = { lengths = [48, 96], haystack = "words", samples = 2 }
held_out = { lengths = [32], tokens = 512 }

[[context.stages]]
until_tokens = 512
sequence_length = 32
rotary = { kind = "default", base = 100.0 }

[[context.stages]]
until_tokens = 1024
sequence_length = 64
rotary = { kind = "linear", base = 100.0, factor = 2.0 }
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("door")
    (folder / "words").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        letters = torch.randint(97, 123, (2000,), generator=generator).tolist()
        (folder / "words" / f"{number}.txt").write_text(re.sub("[aeiou]", " ", bytes(letters).decode()))
    text = CONFIG.replace("PREPARED", str(folder / "prepared")).replace("WORDS", str(folder / "words"))
    (folder / "tiny.toml").write_text(text)
    config = load_config(folder / "tiny.toml", [])
    model = build_model(config.model, 257)
    initialize(model, 3, "cpu")
    with torch.no_grad():
        model.head_weight.mul_(20)
    checkpoints = Checkpoints(folder / "run", config.checkpoint, model, [], config, print)
    for step in (2, 3):
        checkpoints.save(step, {"step": step, "tokens": 256 * step})
    checkpoints.close()
    return folder / "run"


def test_asks_what_the_run_would_have_asked(run_folder, tmp_path, capsys):
    main(parse_arguments([str(run_folder), "--out", str(tmp_path)]))
    loaded = load_checkpoint(run_folder, "cpu")
    rows = [json.loads(line) for line in (tmp_path / "evals.jsonl").read_text().splitlines()]
    expected = run_suite(loaded.model, loaded.config.evals, loaded.materials)
    assert [row["score"] for row in rows] == [cell.score for cell in expected]
    assert {row["task"] for row in rows} == {"needle", "effective_length/needle", "held_out/words"}
    assert all((row["step"], row["tokens"], row["trained_length"], row["stage"]) == (3, 768, 64, 1) for row in rows)
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "tiny at step 3" in out and "trained at 64" in out
    lines = [line.split() for line in out.splitlines() if line.startswith(("needle ", "held_out/words "))]
    assert len(lines) == 10 + 1 and all("to" in line for line in lines)


def test_the_stage_is_that_of_the_last_step(run_folder):
    at_border = load_checkpoint(run_folder / "checkpoints" / "step_00000002", "cpu")
    assert at_border.stage.sequence_length == 32 and at_border.step == 2
    assert load_checkpoint(run_folder, "cpu").stage.sequence_length == 64


def test_the_trained_length_is_what_its_stage_has_reached(run_folder, monkeypatch, tmp_path, capsys):
    """Step 3 is the first of a stage whose rows grow from 16 to 64 tokens."""
    text = (run_folder.parent / "tiny.toml").read_text()
    growing = text.replace("sequence_length = 64", 'sequence_length = 64\ngrowth = { kind = "linear", start = 16 }')
    (tmp_path / "tiny.toml").write_text(growing)
    config = load_config(tmp_path / "tiny.toml", [])
    monkeypatch.setattr(asking, "read_recorded", lambda *_: config)
    main(parse_arguments([str(run_folder), "--tasks", "needle", "--lengths", "48", "--out", str(tmp_path / "out")]))
    rows = [json.loads(line) for line in (tmp_path / "out" / "evals.jsonl").read_text().splitlines()]
    assert {row["trained_length"] for row in rows} == {16} and "trained at 16" in capsys.readouterr().out


def test_weights_are_the_checkpoints(run_folder):
    loaded = load_checkpoint(run_folder, "cpu")
    fresh = build_model(loaded.config.model, 257)
    initialize(fresh, 3, "cpu")
    torch.testing.assert_close(loaded.model.head_weight, fresh.head_weight * 20)


def ask(loaded, tasks, lengths):
    return choose(loaded.config.evals, loaded.stage.sequence_length, loaded.materials, tasks, lengths)[0]


def test_every_task_can_be_named_without_a_table(run_folder, tmp_path, capsys):
    """Those that this text is too short for are refused by the key that says so; none is forgotten."""
    loaded = load_checkpoint(run_folder, "cpu")
    assert set(tables_around(64, loaded.materials)) == set(TASKS)
    quick = ["mqar", "induction", "copying", "k_shot_copy", "last_tokens", "long_ppl", "routing_positions", "positions"]
    words = [str(run_folder), "--tasks", ",".join(quick), "--lengths", "24,32", "--out", str(tmp_path)]
    main(parse_arguments(words))
    rows = [json.loads(line) for line in (tmp_path / "evals.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["task"].partition("/")[0] for row in rows)) == [*quick, "effective_length"]
    assert {row["length"] for row in rows if row["task"] in ("induction", "copying", "mqar")} == {24, 32}
    assert (tmp_path / "positions.png").read_bytes().startswith(b"\x89PNG")
    assert "positions.png" in capsys.readouterr().out


def test_without_a_word_everything_possible_is_asked(run_folder):
    loaded = load_checkpoint(run_folder, "cpu")
    settings, left_out = choose(EvalsSettings(), 64, loaded.materials, None, None)
    skipped = [line.partition(" is left out: ")[0] for line in left_out]
    assert sorted([*tasks_of(settings), *skipped, *SLOW]) == sorted(TASKS) and "passkey" in skipped
    assert tasks_of(settings)[:2] == ["held_out", "needle"] and settings.needle.lengths == (32, 64, 128, 256)
    assert settings.passkey is None
    with pytest.raises(Refusal):
        run_suite(loaded.model, choose(EvalsSettings(), 64, loaded.materials, ["passkey"], None)[0], loaded.materials)


def test_lengths_are_given_in_tokens_of_a_row():
    assert with_lengths("x", {"lengths": [8]}, [64, 32]) == ({"lengths": [32, 64]}, [])
    assert with_lengths("x", {"length": 8, "tokens": 9}, [64]) == ({"length": 64, "tokens": 9}, [])
    assert with_lengths("x", {"lags": [8]}, [64, 32]) == ({"lags": [16, 32]}, [])


def test_a_length_that_is_not_asked_is_refused_or_said(run_folder):
    """Every task at lengths of which some cannot be asked: no one is left out in silence."""
    assert with_lengths("x", {"length": 8}, [64, 32, 16])[1] == [
        "x has one length: it is asked at 64, and not at 16, 32"
    ]
    assert with_lengths("x", {"shots": [1]}, [64]) == (
        {"shots": [1]},
        ["x has no lengths: it is asked as it is, whatever --lengths says"],
    )
    for odd, even in ((1, 4), (3, 4), (25, 26)):
        with pytest.raises(Refusal, match=rf"--lengths {odd} is odd, but a row of copying .*use {even}"):
            ask(load_checkpoint(run_folder, "cpu"), ["copying"], [8, odd])
    loaded = load_checkpoint(run_folder, "cpu")
    for task in TASKS:
        lengths = [2, 64]
        try:
            settings, lines = choose(loaded.config.evals, 64, loaded.materials, [task], lengths)
            check_suite(settings, loaded.materials)
        except Refusal as refusal:
            assert re.search(rf"{task}.(lengths=2|lags=1) does not fit: .*; use \d+ or more", str(refusal))
        else:
            table = to_dict(getattr(settings, task))
            assert lines or [table["lengths"], task] == [lengths, "held_out"]


def test_tasks_are_listed(capsys):
    main(parse_arguments(["--list"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(TASKS) and all(len(line) > 30 for line in lines)
    with pytest.raises(SystemExit):
        parse_arguments([])


def test_tasks_and_lengths_of_the_command_line(run_folder):
    loaded = load_checkpoint(run_folder, "cpu")
    settings = ask(loaded, ["routing", "needle"], [128, 64])
    assert tasks_of(settings) == ["routing", "needle"]
    assert settings.needle.lengths == (64, 128) and settings.needle.samples == 2
    assert settings.routing.length == 128 and settings.seed == 5
    assert tasks_of(ask(loaded, None, None)) == ["held_out", "needle"]
    with pytest.raises(Refusal, match="unknown task 'nedle'; did you mean 'needle'"):
        ask(loaded, ["nedle"], None)
    with pytest.raises(Refusal, match=r"evals.needle.lengths=999999 does not fit"):
        run_suite(loaded.model, ask(loaded, ["needle"], [999_999]), loaded.materials)


def test_another_rotation_for_the_same_weights(run_folder, tmp_path):
    yarn = '{ kind = "yarn", base = 100.0, factor = 4.0, original_length = 32 }'
    words = [str(run_folder), "--tasks", "held_out", "--out"]
    main(parse_arguments([*words, str(tmp_path / "own")]))
    main(parse_arguments([*words, str(tmp_path / "yarn"), "--rotary", yarn]))
    own, other = (json.loads((tmp_path / name / "evals.jsonl").read_text()) for name in ("own", "yarn"))
    assert own["score"] != other["score"]
    with pytest.raises(Refusal, match=r"--rotary: rotary.kind: unknown kind 'yarm'; did you mean 'yarn'"):
        read_rotary('{ kind = "yarm" }')
    with pytest.raises(Refusal, match="not a TOML table"):
        read_rotary("yarn please")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", ""], "--tasks '': names nothing"),
        (["--lengths", " , "], "--lengths ' , ': names nothing"),
        (["--lengths", "abc"], "--lengths 'abc': 'abc' is no length"),
        (["--lengths", "64,0"], "--lengths '64,0': '0' is no length; write tokens, 1 or more"),
        (["--lengths=-5"], "--lengths '-5': '-5' is no length"),
        (["--lengths", "1.5"], "'1.5' is no length"),
        (["--lengths", "64,064"], "the same length stands twice"),
        (["--tasks", "needle,mqar,needle"], "tasks: 'needle' stands twice; give it once"),
        (
            ["--at-eval", "token_choice"],
            "--at-eval token_choice: .*'expert_choice', and this one is 'softmax'; leave it out",
        ),
    ],
)
def test_options_that_say_nothing_are_refused_in_a_line(run_folder, words, message):
    with pytest.raises(Refusal, match=message) as refusal:
        main(parse_arguments([str(run_folder), *words]))
    assert "\n" not in str(refusal.value)


def test_only_a_router_that_sees_the_future_is_told_otherwise():
    choice = {"num_experts": 4, "experts_per_token": 2, "expert_width": 8, "router": {"kind": "expert_choice"}}
    shape = {"num_layers": 1, "width": 16, "attention": {"num_heads": 2, "num_kv_heads": 2}}
    experts = validate({**shape, "moe": {**choice, "balance": []}}, ModelSettings, "x")
    refuse_token_choosers(experts, "token_choice")
    with pytest.raises(Refusal, match="and this model is dense; leave it out"):
        refuse_token_choosers(validate({**shape, "feed_forward_width": 16}, ModelSettings, "x"), "token_choice")


def test_answers_never_take_the_place_of_others(run_folder, tmp_path, monkeypatch):
    """What --out cannot be is refused before the checkpoint is read."""
    monkeypatch.setattr(asking, "load_checkpoint", None)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "evals.jsonl").write_text("kept")
    before = sorted(tmp_path.rglob("*")), sorted(run_folder.rglob("*"))
    for out, message in (
        (run_folder, r"holds a run or a checkpoint; give a folder of its own, such as .*run-evals"),
        (run_folder / "checkpoints" / "step_00000003", "holds a run or a checkpoint"),
        (tmp_path / "file", "is there and is no folder"),
        (tmp_path / "file" / "below" / "it", "file is there and is no folder"),
        (tmp_path / "link", "is there and is no folder"),
        (tmp_path / "asked", "evals.jsonl is there already; give another folder"),
    ):
        with pytest.raises(Refusal, match=f"--out {out}: .*{message}"):
            main(parse_arguments([str(run_folder), "--out", str(out)]))
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(Refusal, match=f"nothing may be written in {tmp_path}; give another one"):
        check_out(tmp_path / "new" / "folder", "evals.jsonl")
    check_out(tmp_path / "asked" / "new", "evals.jsonl")
    assert (sorted(tmp_path.rglob("*")), sorted(run_folder.rglob("*"))) == before
    assert (tmp_path / "asked" / "evals.jsonl").read_text() == "kept"


def test_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(Refusal, match="holds no checkpoint"):
        main(parse_arguments([str(tmp_path)]))
    (tmp_path / "evals.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, why in (("evals.jsonl", "is a file"), ("link", "a link that leads nowhere"), ("gone", "no such folder")):
        with pytest.raises(Refusal, match=f"{name}: {why}; give a run's folder"):
            main(parse_arguments([str(tmp_path / name)]))


def test_training_says_what_a_task_leaves_out(run_folder, tmp_path, monkeypatch, capsys):
    def no_further(*_):
        raise Refusal("far enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "check_suite", lambda settings, materials: ["ruler leaves out cwe"])
    monkeypatch.setattr(train, "find_origin", no_further)
    with pytest.raises(Refusal, match="far enough"):
        train.main(load_config(run_folder.parent / "tiny.toml", []))
    assert "ruler leaves out cwe" in capsys.readouterr().out.splitlines()
