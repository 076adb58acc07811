"""python -m evals.harness: a checkpoint, tasks by name or by file, and what is written of them."""

import importlib.util
import json
import re
import sys
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch

from checkpoint.checkpoints import Checkpoints
from evals.harness import __main__ as door
from evals.harness.__main__ import main, parse_arguments
from model.initialize import initialize
from model.transformer import build_model
from run.config import load_config
from settings import Refusal

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
CONFIG = """
total_tokens = 1024
tokens_per_step = 256
precision = "fp32"
optimizer = { kind = "adamw", learning_rate = 1e-3, schedule = { kind = "constant" } }
data = { sources = { words = { kind = "text", path = "nowhere.txt", held_out = 0.3 } } }

[model]
num_layers = 1
width = 16
feed_forward_width = 24
attention = { num_heads = 2, num_kv_heads = 1 }

[[context.stages]]
until_tokens = 1024
sequence_length = 64
rotary = { kind = "default", base = 100.0 }
"""
TASK = """
task: choose_a_word
dataset_path: json
dataset_kwargs: { data_files: DOCUMENTS, cache_dir: CACHE }
test_split: train
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metadata: { version: 2.0 }
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "tiny.toml").write_text(CONFIG)
    config = load_config(tmp_path / "tiny.toml", [])
    model = build_model(config.model, 257)
    initialize(model, 3, "cpu")
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint, model, [], config, print)
    checkpoints.save(4, {"step": 4, "tokens": 1024})
    checkpoints.close()
    return tmp_path / "run"


@pytest.fixture
def task(tmp_path):
    rows = [{"text": "der Wind" + " und" * n, "choices": ["ab", "cd", "ef"], "gold": n % 3} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TASK.replace("DOCUMENTS", str(tmp_path / "rows.jsonl")).replace("CACHE", str(tmp_path / "cache"))
    (tmp_path / "task.yaml").write_text(text)
    return tmp_path / "task.yaml"


def ask(*words: object) -> None:
    main(parse_arguments([*map(str, words), "--device", "cpu"]))


@pytest.mark.skipif(HAS_HARNESS, reason="it is there")
def test_without_the_package_it_says_how_to_get_it(run):
    with pytest.raises(Refusal, match=r"lm-eval cannot be imported .*: pip install 'longmoe\[eval\]'"):
        ask(run, "hellaswag")


@pytest.mark.skipif(not HAS_HARNESS, reason="pip install 'longmoe[eval]'")
def test_numbers_and_what_they_were_measured_with(run, task, tmp_path, capsys):
    """The run's own data is not needed: the source that the configuration names is nowhere."""
    yarn = '{ kind = "yarn", base = 100.0, factor = 2.0, original_length = 32 }'
    ask(run, task, "--limit", 5, "--rotary", yarn, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "harness.json").read_text())
    assert (report["step"], report["tokens"], report["length"], report["beyond"]) == (4, 1024, 64, "refuse")
    assert report["rotary"]["kind"] == "yarn" and report["precision"] == "float32"
    assert report["n-samples"]["choose_a_word"] == {"original": 6, "effective": 5}
    assert report["versions"] == {"choose_a_word": 2.0}
    score = report["results"]["choose_a_word"]["acc,none"]
    assert 0 <= score <= 1 and re.search(rf"choose_a_word.*acc .*{score:.4g}", capsys.readouterr().out)


@pytest.mark.skipif(not HAS_HARNESS, reason="pip install 'longmoe[eval]'")
def test_requests_that_do_not_fit_are_refused_or_cut_as_asked(run, task, capsys):
    with pytest.raises(Refusal, match=r"requests are longer than length=16; .*--beyond cut"):
        ask(run, task, "--length", 16)
    ask(run, task, "--length", 16, "--beyond", "cut")
    assert "requests are longer than length=16: their beginnings left out" in capsys.readouterr().out


def test_what_cannot_be_written_or_read_is_refused_before_anything_is_asked(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "harness.json").touch()
    with pytest.raises(Refusal, match=r"--out .*out: harness.json is there already"):
        ask(run, "hellaswag", "--out", tmp_path / "out")
    with pytest.raises(Refusal, match=r"--out .*run: holds a run or a checkpoint"):
        ask(run, "hellaswag", "--out", run)


@pytest.mark.skipif(not HAS_HARNESS, reason="pip install 'longmoe[eval]'")
@pytest.mark.parametrize("length", [0, -3])
def test_a_length_of_no_tokens_is_not_the_trained_one(run, length):
    with pytest.raises(Refusal, match=f"--length {length}: a request has tokens; give 1 or more"):
        ask(run, "hellaswag", f"--length={length}")


@pytest.mark.skipif(not HAS_HARNESS, reason="pip install 'longmoe[eval]'")
def test_the_weights_are_the_checkpoints(run, monkeypatch):
    from evals.harness.__main__ import load

    asked, _ = load(parse_arguments([str(run), "x", "--device", "cpu"]))
    fresh = build_model(asked.model.settings, 257)
    initialize(fresh, 3, "cpu")
    assert torch.equal(asked.model.head_weight, fresh.head_weight) and asked.length == 64


def test_the_length_left_out_is_what_was_trained_so_far(run, monkeypatch):
    """Four steps into a stage whose rows grow from 16 to 64 tokens over forty."""
    made = SimpleNamespace(HarnessModel=lambda model, materials, length, beyond: length)
    monkeypatch.setitem(sys.modules, "evals.harness.model", made)
    folder = run / "checkpoints" / "step_00000004"
    growing = load_config(run.parent / "tiny.toml", [
        "total_tokens=10240", "context.stages.0.until_tokens=10240", "context.stages.0.growth.start=16",
        "context.stages.0.growth.kind=linear",
    ])  # fmt: skip
    monkeypatch.setattr(door, "read_recorded", lambda *_: growing)
    length, facts = door.load(parse_arguments([str(folder), "x", "--device", "cpu"]))
    assert length == facts["length"] == facts["trained_length"] == 16


def test_patterns_are_asked_as_what_they_match_and_files_have_to_be_there(tmp_path, monkeypatch):
    names, asked = ["arc_challenge", "arc_easy", "hellaswag"], []

    class Manager:
        def __init__(self, **_):
            pass

        def match_tasks(self, patterns):
            return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]

    package = SimpleNamespace(
        __version__="0",
        tasks=SimpleNamespace(TaskManager=Manager),
        simple_evaluate=lambda **given: asked.append(given["tasks"]),
        utils=SimpleNamespace(make_table=str),
    )
    monkeypatch.setattr(door, "require", lambda: package)
    monkeypatch.setattr(door, "load", lambda arguments: (None, {}))
    (tmp_path / "mine.yaml").touch()
    ask("run", f"arc_*,{tmp_path / 'mine.yaml'},arc_easy")
    assert asked == [["arc_challenge", "arc_easy", str(tmp_path / "mine.yaml")]]
    for wrong in ("nope.yaml", "nope*"):
        with pytest.raises(Refusal, match=rf"'{re.escape(wrong)}': is no YAML file, and lm-eval 0 has no such task"):
            ask("run", wrong)
